"""What is shown of a sweep in a terminal: what its runs will cost, how far they are, and what to do next."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.planning import PlannedRun
from slurm.profile import Profile
from slurm.states import Status
from slurm.sweep import Choice, Sweep

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "stale": "yellow", "preempted": "yellow"}


def plan_table(planned: Sequence[PlannedRun], statuses: Mapping[str, Status], choice: Choice, profile: Profile) -> Group:
    """What each run costs, and whether it would be started."""
    to_start = [each for each in planned if each.config.run_id not in choice.reasons]
    total = sum(each.device_hours(profile.teraflops) * _left_to_train(statuses[each.config.run_id]) for each in to_start)
    title = f"{count_of(len(planned), 'run')}; to start: {len(to_start)}, in {_number(total)} device-hours"
    table = _table(("Run", "Label", "State"), ("Images", "TFLOPs", "Hours *", "GB *"))
    note = (
        f"* Estimates: device-hours at {profile.teraflops:g} TFLOP/s, an assumption of profile {profile.name}; memory of a rank "
        "for weights, gradients, moments, average and what a step keeps for its backward pass"
    )
    for each in planned:
        costs = (each.num_images, each.train_flops / 1e12, each.device_hours(profile.teraflops), each.memory_bytes / 1e9)
        state = statuses[each.config.run_id].state
        table.add_row(each.config.run_id, escape(each.label), state, *map(_number, costs))
    missing = list(dict.fromkeys(path for each in planned for path in each.missing))
    notes = [Text(note, "dim")]
    if missing:
        notes.append(Text(f"Not here, and needed before any of these runs starts: {', '.join(missing)}", "yellow"))
        if any(each.config.data.path in missing for each in planned):
            notes.append(Text("Costs are those for latents of ImageNet: 4 channels, 1000 classes", "dim"))
    reasons = [Text(f"{run_id}: {reason}") for run_id, reason in choice.reasons.items() if reason != statuses[run_id].state]
    return Group(Text(title, "bold"), table, *notes, *([""] if reasons else []), *reasons)


def print_status(console: Console, sweep: Sweep, statuses: Mapping[str, Status], command: str) -> None:
    """How far the runs are, and what to type next. `command`: the suite as it was typed."""
    console.print(status_view(sweep, statuses))
    for step in next_steps(statuses, command):
        console.print(f"\n{step}", soft_wrap=True, markup=False, highlight=False)


def status_view(sweep: Sweep, statuses: Mapping[str, Status]) -> Group:
    """A row for each run; below, what there is to say of it."""
    counts = Counter(statuses[item.run_id].state for item in sweep.items)
    title = ", ".join(f"{count} {state}" for state, count in counts.items())
    table = _table(("Run", "Label", "State"), ("Done", "Left"))
    table.add_column("Job", overflow="fold")
    for item in sweep.items:
        status = statuses[item.run_id]
        left = "" if status.seconds_left is None else _duration(status.seconds_left)
        jobs = ", ".join(status.jobs[:3]) + (f" and {len(status.jobs) - 3} more" if len(status.jobs) > 3 else "")
        state = f"[{COLOURS[status.state]}]{status.state}[/]" if status.state in COLOURS else status.state
        table.add_row(item.run_id, escape(item.label), state, f"{status.fraction:.0%}", left, jobs)
    details = [Text("\n    ".join([f"{run_id}: {s.detail}", *s.lines])) for run_id, s in statuses.items() if s.detail]
    return Group(Text(title, "bold"), table, *([""] if details else []), *details)


def next_steps(statuses: Mapping[str, Status], command: str) -> list[str]:
    """Commands, by what there is to do."""
    idle = {run_id: status for run_id, status in statuses.items() if not status.in_hand}
    at_fault = [run_id for run_id, status in idle.items() if status.state in ("failed", "diverged") and not status.resumable]
    sweep = f"tsbench sweep {command} --cluster slurm"
    steps = {
        f"Start what is left to do (or --cluster local): {sweep}": any(status.resumable for status in idle.values()),
        f"See what a run has printed: tsbench logs {at_fault[0] if at_fault else ''}": bool(at_fault),
        f"Try failed runs again: {sweep} --only failed": any(idle[run_id].state == "failed" for run_id in at_fault),
        f"Start stale runs over: {sweep} --only stale": any(status.state == "stale" for status in idle.values()),
    }
    return [step for step, is_due in steps.items() if is_due]


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
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def count_of(count: int, one: str, several: str = "") -> str:
    return f"{count} {one}" if count == 1 else f"{count} {several or f'{one}s'}"


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Without lines, to fit 80 columns. Ids are never cut: they are there to be copied."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for word in words:
        table.add_column(word, overflow="fold", no_wrap=word == "Run")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _left_to_train(status: Status) -> float:
    """The part of the budget; what is stale starts over."""
    return 1.0 if status.state == "stale" else 1 - status.fraction


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
