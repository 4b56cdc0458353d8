"""Which runs of a sweep are started now, and how? Everything that is decided, is decided from their statuses.

A run that is done is never started again; one that somebody works on is left alone; one that is stale or has failed by
its own fault is started again only when asked for (`only`).
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.runs import expert_folder
from slurm.claims import Work
from slurm.commands import ClusterUnreachable
from slurm.local import Job
from slurm.profile import Profile
from slurm.states import CodeDifference, Known, Status, ask_cluster, status_of
from slurm.submit import submit
from slurm.task import Train, forget_restarts

ONLY = ("planned", "failed", "stale")
NOT_ASKED = "not asked for"  # why a run is not started
POLL_SECONDS = 10.0
Statuses = Mapping[str, Status]  # of each run, by its id
Put = Callable[["Item"], None]
"""Write a run's configuration into its folder. `bench.job.place_config`."""
SetAside = Callable[[Path], object]
"""Keep what other code has made, and give its place free. `bench.run_folder.set_aside`."""


@dataclass(frozen=True)
class Item:
    """A run of a sweep, as the launcher sees it."""

    run_id: str
    label: str
    folder: Path
    num_experts: int  # trained in jobs of their own; 0: one job for all
    budget: Mapping[str, Any]
    threads: int
    after: str = ""  # the id of the run that has to be done before
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # settings under which it is to be scored

    @property
    def works(self) -> list[Work]:
        if not self.num_experts:
            return [Work(self.folder, self.folder)]
        return [Work(self.folder, expert_folder(self.folder, i), i) for i in range(self.num_experts)]


@dataclass(frozen=True)
class Choice:
    """What to start now, and why the others are not."""

    start: list[Item]
    reasons: dict[str, str]  # run id -> why not

    def asked(self, statuses: Statuses) -> list[str]:
        """The runs that are to be done in the end."""
        return [run_id for run_id in statuses if self.reasons.get(run_id) != NOT_ASKED]


class Sweep:
    """The runs of a suite in one place, and their statuses."""

    def __init__(self, items: Sequence[Item], difference: CodeDifference) -> None:
        self.items, self.difference = list(items), difference

    def statuses(self) -> tuple[dict[str, Status], Known]:
        known = ask_cluster(work for item in self.items for work in item.works)
        return {i.run_id: status_of(i.works, known, self.difference, i.budget, i.evaluation) for i in self.items}, known

    def choose(self, statuses: Statuses, only: Sequence[str] = (), with_followers: bool = False) -> Choice:
        """What to start now; with `with_followers` also what starts from the weights of a run that is started now.

        ValueError for a name in `only` that is neither of ONLY nor one of the runs (or the beginning of just one).
        """
        named = {name if name in ONLY else self.find(name).run_id for name in only}
        start: list[Item] = []
        reasons: dict[str, str] = {}
        for item in self.items:
            status = statuses[item.run_id]
            reason = _why_not(item, status, named)
            waits = item.after in statuses and statuses[item.after].state != "done"
            if with_followers and item.after in {other.run_id for other in start}:
                waits = False
            if reason:
                reasons[item.run_id] = reason
            elif waits:
                reasons[item.run_id] = f"waits for {item.after}"
            else:
                start.append(item)
        return Choice(start, reasons)

    def find(self, name: str) -> Item:
        found = [item for item in self.items if item.run_id == name] or [i for i in self.items if i.run_id.startswith(name)]
        if len(found) != 1:
            some = ", ".join(item.run_id for item in (found or self.items)[:5])
            what = "more than one run" if found else "no run"
            raise ValueError(f"{name!r} names {what} of this suite: give one of {', '.join(ONLY)}, or a run such as {some}")
        return found[0]


def _why_not(item: Item, status: Status, named: set[str]) -> str:
    """Why a run is not started; "" if it may be."""
    if status.state == "done":
        return "done"
    if status.in_hand:
        return status.state
    if item.run_id in named:
        return ""
    if named:
        return "" if ("planned" if status.state == "preempted" else status.state) in named else NOT_ASKED
    if status.resumable:
        return ""
    return "stale (start it over with --only stale)" if status.state == "stale" else f"{status.state} (see `tsbench status`)"


def make_ready(items: Iterable[Item], statuses: Statuses, put: Put, set_aside: SetAside) -> None:
    """Before they start: what other code has made is kept elsewhere, and of what had been given up, starts are counted anew."""
    for item in items:
        if statuses[item.run_id].state == "stale":
            set_aside(item.folder)
        put(item)
        if statuses[item.run_id].state in ("failed", "diverged") and not statuses[item.run_id].resumable:
            for work in item.works:
                forget_restarts(work)


def start_on_slurm(items: Sequence[Item], train: Train, profile: Profile, snapshot: Path, logs: Path) -> dict[Work, str]:
    """Submit what has not come to its end; work -> job."""
    return submit([work for item in items for work in left_to_do(item)], train, profile, snapshot, logs)


def left_to_do(item: Item) -> list[Work]:
    """An expert that is trained is not trained again; when all are, the job of any of them puts the run together."""
    return [work for work in item.works if not (work.folder / "done").exists()] or item.works[-1:]


def jobs_of(items: Sequence[Item], snapshot: Path, costs: Mapping[str, float]) -> list[Job]:
    """One process per run (or expert), for this machine; those of the costliest runs start first."""
    folders = {item.run_id: item.folder for item in items}
    jobs = []
    for item in items:
        share = 1 / len(item.works)
        for work in left_to_do(item):
            cost, after = costs[item.run_id] * share, folders.get(item.after)
            jobs.append(Job(item.folder, item.label, item.threads, cost, work.expert, snapshot, after, share))
    return jobs


def wait(
    sweep: Sweep, asked: Collection[str], again: Callable[[Choice, Statuses], None], show: Callable[[Statuses], None]
) -> None:
    """Until none of the runs that were asked for is queued or running, and none is left that can be started. What the cluster
    took away is submitted again; what someone cancelled is not. While the cluster does not answer, nothing is decided.
    """
    cancelled: set[str] = set()  # remembered here: of a job that never ran the cluster forgets it within minutes
    while True:
        statuses, known = sweep.statuses()
        if known.answers:
            show(statuses)
            choice = sweep.choose(statuses)
            cancelled |= {run_id for run_id, status in statuses.items() if status.kind == "cancelled"}
            start = [item for item in choice.start if item.run_id in asked and item.run_id not in cancelled]
            if not start and not any(statuses[run_id].in_hand for run_id in asked):
                return
            if start:
                with suppress(ClusterUnreachable):  # what could not be submitted is still to do at the next look
                    again(Choice(start, choice.reasons), statuses)
        time.sleep(POLL_SECONDS)
