"""What is shown of a sweep in a terminal: what its runs will cost, and how far they are."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.planning import PlannedRun
from slurm.profile import Profile
from slurm.states import Status
from slurm.sweep import Choice, Sweep

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "stale": "yellow", "preempted": "yellow"}


def plan_table(planned: Sequence[PlannedRun], statuses: Mapping[str, Status], choice: Choice, profile: Profile) -> Table:
    """What each run costs, and whether it would be started."""
    to_start = [each for each in planned if each.config.run_id not in choice.reasons]
    total = sum(each.device_hours(profile.teraflops) for each in to_start)
    table = Table(
        title=f"{len(planned)} runs; to start: {len(to_start)}, in {total:.3g} device-hours *",
        caption=f"* Estimates: at {profile.teraflops:g} TFLOP/s sustained by a device (an assumption of profile {profile.name}); "
        "memory per rank: weights, gradients, moments, average and what one step keeps for its backward pass",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("Run", "Label", "State"):
        table.add_column(column)
    for column in ("Images", "TFLOPs", "Device-hours *", "Memory (GB) *"):
        table.add_column(column, justify="right")
    for each in planned:
        run_id, state = each.config.run_id, statuses[each.config.run_id].state
        reason = choice.reasons.get(run_id, state)
        costs = (each.num_images, each.train_flops / 1e12, each.device_hours(profile.teraflops), each.memory_bytes / 1e9)
        table.add_row(run_id, each.label, state if reason == state else f"{state}: {reason}", *map(_number, costs))
    return table


def status_table(sweep: Sweep, statuses: Mapping[str, Status]) -> Table:
    counts = Counter(statuses[item.run_id].state for item in sweep.items)
    title = ", ".join(f"{count} {state}" for state, count in counts.items())
    table = Table(title=title, title_justify="left")
    for column in ("Run", "Label", "State", "Done", "Left", "Job", "What"):
        table.add_column(column, overflow="fold")
    for item in sweep.items:
        status = statuses[item.run_id]
        left = "" if status.seconds_left is None else _duration(status.seconds_left)
        jobs = ", ".join(status.jobs[:3]) + (f" and {len(status.jobs) - 3} more" if len(status.jobs) > 3 else "")
        state = f"[{COLOURS[status.state]}]{status.state}[/]" if status.state in COLOURS else status.state
        table.add_row(item.run_id, item.label, state, f"{status.fraction:.0%}", left, jobs, escape(status.detail))
    return table


class Changes:
    """Prints a line for each run whose state is another than when it was called before."""

    def __init__(self, sweep: Sweep, console: Console) -> None:
        self.sweep, self.console = sweep, console
        self.shown: dict[str, str] = {}

    def __call__(self, statuses: Mapping[str, Status]) -> None:
        for item in self.sweep.items:
            status = statuses[item.run_id]
            if self.shown.get(item.run_id) != status.state:
                self.shown[item.run_id] = status.state
                detail = f" ({status.detail})" if status.detail else ""
                line = f"{time.strftime('%H:%M:%S')} {item.run_id} {item.label}: {status.state}{detail}"
                self.console.print(line, markup=False, highlight=False)


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
