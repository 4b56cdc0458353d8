"""What does a person see while a run trains? A bar with rate, time left and loss; nothing when output is not a terminal."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingBar:
    """Use as a context; `update` with the part of the budget that is spent."""

    def __init__(self, label: str, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
        )
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal and sys.stderr.isatty()))
        self.task = self.bar.add_task(label, total=1.0, rate=0.0, loss=float("nan"))

    def update(self, spent: float, images_per_second: float, loss: float) -> None:
        self.bar.update(self.task, completed=spent, rate=images_per_second, loss=loss)

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
