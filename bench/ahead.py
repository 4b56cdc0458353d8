"""How is the next step's batch drawn while a GPU computes this one's?

In a thread. Every number of a step follows from the step (`bench.randomness`), so drawing early, or once more, changes none.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

Drawn = TypeVar("Drawn")


class Ahead(AbstractContextManager["Ahead[Drawn]"], Generic[Drawn]):
    """Gives what `draw(step)` returns, step by step; if `early`, that of the next step is drawn while the caller works."""

    def __init__(self, draw: Callable[[int], Drawn], early: bool) -> None:
        self.draw = draw
        self.thread = ThreadPoolExecutor(1, "draw") if early else None
        self.waiting: tuple[int, Future[Drawn]] | None = None

    def take(self, step: int) -> Drawn:
        """What drawing has raised, is raised here."""
        if self.thread is None:
            return self.draw(step)
        begun, self.waiting = self.waiting, None
        drawn = begun[1].result() if begun and begun[0] == step else self.draw(step)
        self.waiting = step + 1, self.thread.submit(self.draw, step + 1)
        return drawn

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:
            self.thread.shutdown()
