"""How is one kept posted on runs that train side by side on this machine?"""

import os
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.config import RunConfig
from bench.runs import SPENT
from slurm.local import Job

ALL_SHOWN = 12  # bars; of more runs, only those that run are shown


class Watch:
    """Shows a bar per run on a terminal; elsewhere one line when a run is done. Use as a context, call with the jobs."""

    def __init__(self, configs: Iterable[RunConfig], jobs: list[Job], console: Console, with_names: bool = False) -> None:
        self.console, self.with_names = console, with_names
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[state]:<8}"),
        )
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, *times, console=console, refresh_per_second=2, disable=not console.is_terminal)
        self.budgets = {config.run_id: config.budget for config in configs}
        self.few = len(jobs) <= ALL_SHOWN
        self.tasks: dict[str, TaskID] = {
            each.name: self.bars.add_task(self.describe(each), total=1.0, start=False, visible=self.few, state="waiting")
            for each in jobs
        }
        self.announced: set[str] = set()

    def describe(self, each: Job) -> str:
        return f"{each.label} ({each.name})" if self.with_names else each.label

    def __call__(self, jobs: list[Job]) -> None:
        for each in jobs:
            task = self.tasks[each.name]
            if each.running and not self.bars.tasks[task].started:
                self.bars.start_task(task)
            budget = self.budgets[each.folder.name]
            spent = each.progress().get(SPENT[budget.unit], 0) / (budget.amount * each.share)
            state = "waiting"
            if each.running:
                state = "scoring" if spent >= 1 else "training"
            elif each.finished:
                state = "failed" if each.failure() else "done"
                self.bars.stop_task(task)
            self.bars.update(task, completed=min(spent, 1.0), state=state, visible=self.few or each.running)
            if each.finished and each.name not in self.announced:
                self.announced.add(each.name)
                if not self.console.is_terminal:
                    self.console.print(f"{self.describe(each)}: {state}")

    def __enter__(self) -> "Watch":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()


def default_workers(threads: int) -> int:
    """As many runs at once as this process has processors for."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // threads)
