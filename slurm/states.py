"""How far is each run of a sweep? Told from run folders and the queue, never from log text.

planned    nothing works on it; it may have begun, and goes on from its checkpoint
queued     a job for it waits in the queue
running    a job, or a process on this or another machine, works on it
preempted  the cluster took its job away; it waits to go on, or to be swept again
failed     with the cause: time limit, memory, node lost, killed, or the code
diverged   a loss was not finite
done       everything is there
stale      begun or made by other code than this
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lease
from bench.files import read_json
from bench.runs import SPENT, Run, expert_folders, run_state
from slurm import queue
from slurm.claims import Work, read_claim
from slurm.submit import output_of

STATES = ("planned", "queued", "running", "preempted", "failed", "diverged", "done", "stale")
RESUMABLE = ("time limit", "node lost", "preempted", "killed", "unknown")  # the run itself did nothing wrong
NO_MORE_THAN = 3  # changed files that are named

CodeDifference = Callable[[Run], list[str]]
"""The files in which the code that a run was made by differs from this one. `bench.provenance.difference_of`."""


@dataclass(frozen=True)
class Status:
    """Of a run, or of one piece of work."""

    state: str
    detail: str = ""
    fraction: float = 0.0  # of the budget
    seconds_left: float | None = None  # of training, while it runs
    jobs: tuple[str, ...] = ()
    kind: str = ""  # of a failure
    changed: tuple[str, ...] = ()  # files, of a stale run

    @property
    def resumable(self) -> bool:
        """Whether a launch takes it up again without being asked to."""
        return self.state in ("planned", "preempted") or (self.state == "failed" and self.kind in RESUMABLE)


@dataclass(frozen=True)
class Known:
    """What the cluster says, read once for many runs."""

    live: Mapping[str, Any]  # job -> queue.LiveJob
    ended: Mapping[str, Any]  # job -> queue.EndedJob; empty where the accounting does not answer
    warning: str = ""


NOTHING = Known({}, {})


def ask_cluster(works: Iterable[Work]) -> Known:
    """One question to the queue and one to the accounting, about all jobs that were ever noted for the works."""
    claims = [claim for work in works if (claim := read_claim(work)) is not None]
    if not claims or not queue.cluster_is_here()[0]:
        return NOTHING
    live = queue.live_jobs()
    jobs = [claim.job for claim in claims if claim.job]
    try:
        return Known(live, queue.ended_jobs(jobs))
    except queue.AccountingUnavailable as error:
        return Known(live, queue.recently_ended(jobs), f"the accounting does not answer ({error}): causes may be missing")


def status_of(works: list[Work], known: Known, difference: CodeDifference, budget: Mapping[str, Any]) -> Status:
    """The status of one run, given all its pieces of work (one, or one per expert)."""
    run = Run(works[0].run_folder)
    changed = tuple(difference(run))
    folder_state = run_state(run.path) if run.path.exists() else "planned"
    fraction = fraction_of(run.path, budget)
    if folder_state == "done":
        return Status("stale" if changed else "done", _made_by(changed) if changed else "", 1.0, changed=changed)
    each = [work_status(work, known) for work in works]
    jobs = tuple(job for status in each for job in status.jobs)
    states = [status.state for status in each]
    if "running" in states:
        return Status("running", _phase(run, fraction), fraction, seconds_left(run, fraction), jobs)
    waiting = next((s for s in ("queued", "preempted") if s in states and jobs), "")
    if waiting:
        reason = next(status.detail for status in each if status.state == waiting)
        return Status(waiting, "; ".join(filter(None, (reason, _begun(fraction)))), fraction, jobs=jobs)
    if changed and has_begun(run.path):
        return Status("stale", _made_by(changed), fraction, changed=changed)
    worst = next((status for name in ("diverged", "failed", "preempted") for status in each if status.state == name), None)
    if worst is not None:
        return Status(worst.state, worst.detail, fraction, kind=worst.kind)
    told = next((status for status in each if status.detail), Status("planned", _begun(fraction)))
    return Status("planned", told.detail, fraction, kind=told.kind)


def work_status(work: Work, known: Known) -> Status:
    """Of one piece of work that has not come to its end."""
    claim = read_claim(work)
    job = claim.job_in({job: live.name for job, live in known.live.items()}) if claim is not None else ""
    if job in known.live:
        live, before = known.live[job], known.ended.get(job)
        if live.state == "PENDING":
            taken = before is not None and before.state == "PREEMPTED"
            return Status("preempted" if taken else "queued", live.reason, jobs=(job,))
        return Status("running", live.nodes, jobs=(job,))
    if (work.folder / "done").exists():
        return Status("done", fraction=1.0)
    holder = lease.read(work.folder) if work.folder.exists() else None
    if holder is not None and not holder.expired:
        return Status("running", str(holder))
    failure = read_json(work.folder / "failure.json", dict)
    if failure:
        kind = "diverged" if failure["state"] == "diverged" else "code"
        return Status(str(failure["state"]), str(failure["cause"]), kind=kind)
    if claim is None:
        return Status("planned")
    if not claim.job:
        return Status("queued", "being submitted") if claim.launcher_is_alive else Status("planned")
    return _after(claim.job, claim.logs, known)


def _after(job: str, logs: str, known: Known) -> Status:
    """Why a job ended before its work did."""
    ended = known.ended.get(job)
    if ended is None:
        return Status("planned", f"job {job} is not known to the cluster any more")
    cause = queue.cause(ended, _last_words(job, logs))
    if cause.kind == "preempted":
        return Status("preempted", cause.sentence, kind=cause.kind)
    if cause.kind == "cancelled":
        return Status("planned", f"job {job} was cancelled", kind=cause.kind)
    if ended.state == "COMPLETED":
        return Status("planned", f"job {job} stopped early")
    return Status("failed", cause.sentence, kind=cause.kind)


def _last_words(job: str, logs: str) -> str:
    """The end of what the job wrote as errors: for the wording of a cause alone."""
    files = output_of(job, logs) if logs else []
    return files[-1].read_text(errors="replace")[-8000:] if files else ""


def fraction_of(folder: Path, budget: Mapping[str, Any]) -> float:
    """Of the budget, as the heartbeats have it; over its experts where they train apart."""
    places = [folder, *expert_folders(folder).values()]
    key = SPENT[str(budget["unit"])]
    spent = [float(read_json(place / "progress.json", dict).get(key, 0.0)) for place in places]
    return min(1.0, max(spent[0], sum(spent[1:])) / float(budget["amount"]))


def seconds_left(run: Run, fraction: float) -> float | None:
    """Of training, at the pace so far; None before there is one, and while the run is sampled and scored."""
    progress = read_json(run.path / "progress.json", dict)
    ranks = int(run.provenance.get("world_size") or 1)
    if not 0 < fraction < 1 or not progress:
        return None
    return float(progress["device_seconds"]) / ranks * (1 - fraction) / fraction


def has_begun(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*")) or any(folder.glob("experts/*/checkpoints/step-*"))


def _phase(run: Run, fraction: float) -> str:
    if fraction < 1:
        return ""
    curve = len(read_json(run.path / "curve.json", list))
    return f"sampling and scoring ({curve} of its curve)" if curve else "sampling and scoring"


def _begun(fraction: float) -> str:
    return f"goes on from {fraction:.0%}" if fraction else ""


def _made_by(changed: tuple[str, ...]) -> str:
    more = f" and {len(changed) - NO_MORE_THAN} more" if len(changed) > NO_MORE_THAN else ""
    return f"made by other code: {', '.join(changed[:NO_MORE_THAN])}{more}"
