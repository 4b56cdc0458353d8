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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import lease
from bench.files import read_json
from bench.runs import SPENT, Run, expert_folders
from slurm import queue
from slurm.cause import first_cause, is_of_another_rank, last_lines, last_words, since_last_start
from slurm.claims import Claim, Work, read_claim
from slurm.submit import output_of
from slurm.task import was_preempted

STATES = ("planned", "queued", "running", "preempted", "failed", "diverged", "done", "stale")
RESUMABLE = ("time limit", "node lost", "preempted", "killed", "unknown")  # the run itself did nothing wrong
NO_MORE_THAN = 3  # changed files that are named

CodeDifference = Callable[[Run], list[str]]
"""The files in which the code that a run was made by differs from this one. `bench.job.difference_of`."""


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
    lines: tuple[str, ...] = ()  # that failed code wrote last

    @property
    def in_hand(self) -> bool:
        """Whether somebody works on it, or will."""
        return self.state in ("queued", "running") or bool(self.jobs)

    @property
    def resumable(self) -> bool:
        """Whether a launch takes it up again without being asked to."""
        return self.state in ("planned", "preempted") or (self.state == "failed" and self.kind in RESUMABLE)


@dataclass(frozen=True)
class Known:
    """What the cluster says, read once for many runs."""

    live: Mapping[str, Any]  # job -> queue.LiveJob
    ended: Mapping[str, Any]  # job -> queue.EndedJob
    warning: str = ""
    answers: bool = True  # else nothing is known of any job


NOTHING = Known({}, {})


def ask_cluster(works: Iterable[Work]) -> Known:
    """One question to the queue and one to the accounting, about all jobs that were ever noted for the works."""
    claims = [claim for work in works if (claim := read_claim(work)) is not None]
    if not claims:
        return NOTHING
    jobs = [claim.job for claim in claims if claim.job]
    try:
        here, why = queue.cluster_is_here()
        if not here:
            return Known({}, {}, f"no cluster can be asked what became of jobs ({why})", answers=False)
        live = queue.live_jobs()
        return Known(live, *_ended(jobs, live))
    except queue.ClusterUnreachable as error:
        return Known({}, {}, str(error), answers=False)


def _ended(jobs: list[str], live: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """How jobs ended, and a warning. What the accounting has not heard of yet, the controller still remembers."""
    ended, warning = {}, ""
    try:
        ended = queue.ended_jobs(jobs)
    except queue.AccountingUnavailable as error:
        warning = f"the accounting does not answer ({error}): causes may be missing"
    lagging = [job for job in jobs if job not in live and (job not in ended or ended[job].followed_by)]
    return {**ended, **(queue.recently_ended(lagging) if lagging else {})}, warning


def status_of(
    works: list[Work],
    known: Known,
    difference: CodeDifference,
    budget: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> Status:
    """The status of one run, given all its pieces of work (one, or one per expert).

    `evaluation`: settings under which it has to be scored to be done; by default any.
    """
    run = Run(works[0].run_folder)
    changed = changed_files(run.path, difference)
    fraction = fraction_of(run.path, budget)
    is_made = (run.path / "done").exists()
    if is_made and not changed and (run.is_scored_under(evaluation or {}) or not run.has_pixels(evaluation or {})):
        return Status("done", fraction=1.0)
    each = [_named(work, work_status(work, known)) for work in works]
    if works[0].folder != run.path and (failure := failure_in(run.path)) is not None:
        each.append(failure)  # of the job that put the experts together
    jobs = tuple(job for status in each for job in status.jobs)
    states = [status.state for status in each]
    if "running" in states:
        return Status("running", _phase(run, fraction), fraction, seconds_left(run, fraction), jobs)
    waiting = "queued" if "queued" in states else "preempted" if "preempted" in states and jobs else ""
    if waiting:
        reason = next(status.detail for status in each if status.state == waiting)
        return Status(waiting, "; ".join(filter(None, (reason, _begun(fraction)))), fraction, jobs=jobs)
    if changed and (is_made or has_begun(run.path)):
        return Status("stale", _made_by(changed), 1.0 if is_made else fraction, changed=changed)
    each.sort(key=lambda status: status.resumable)  # what no launch takes up by itself is told first
    worst = next((status for name in ("diverged", "failed", "preempted") for status in each if status.state == name), None)
    if worst is not None:
        return Status(worst.state, worst.detail, fraction, kind=worst.kind, lines=worst.lines)
    if is_made:
        return Status("planned", "trained; to be scored under these settings", fraction)
    told = next((status for status in each if status.detail), Status("planned", _begun(fraction)))
    return Status("planned", told.detail, fraction, kind=told.kind)


def changed_files(folder: Path, difference: CodeDifference) -> tuple[str, ...]:
    """In which the code that a run, or an expert of it, was made by differs from this one."""
    places = [folder, *expert_folders(folder).values()]
    return tuple(dict.fromkeys(file for place in places for file in difference(Run(place))))


def work_status(work: Work, known: Known) -> Status:
    """Of one piece of work; of a run that is trained, whether it is being scored once more."""
    claim = read_claim(work)
    job = claim.job_in({job: live.name for job, live in known.live.items()}) if claim is not None else ""
    if job in known.live:
        live, before = known.live[job], known.ended.get(job)
        if live.state == "PENDING":
            taken = (before is not None and before.state == "PREEMPTED") or was_preempted(work.folder)
            return Status("preempted" if taken else "queued", live.reason, jobs=(job,))
        return Status("running", live.nodes, jobs=(job,))
    holder = lease.read(work.folder)
    if holder is not None and not holder.expired:
        return Status("running", str(holder))
    failure = failure_in(work.folder)
    if failure is not None:
        return failure if claim is None else _with_lines(failure, claim)
    if (work.folder / "done").exists():
        return Status("done", fraction=1.0)
    if claim is None:
        return Status("planned")
    if not claim.job:
        return Status("queued", "being submitted") if claim.launcher_is_alive else Status("planned")
    if not known.answers:
        return Status("planned", f"was given to job {claim.job} of a cluster that cannot be asked")
    return _after(claim.job, claim.logs, known)


def failure_in(folder: Path) -> Status | None:
    """What the code itself has left as the cause; what tells only of another rank's end is none: the job's end tells more."""
    failure = read_json(folder / "failure.json", dict)
    if not failure or is_of_another_rank(first_cause(str(failure["cause"]))):
        return None
    kind = "diverged" if failure["state"] == "diverged" else "code"
    return Status(str(failure["state"]), str(failure["cause"]), kind=kind)


def _with_lines(failure: Status, claim: Claim) -> Status:
    """With what the last job wrote last, if it tells of this failure, and not a process without a job."""
    lines = tuple(last_lines(_last_errors(claim.job, claim.logs))) if claim.job and failure.kind == "code" else ()
    is_told = lines and first_cause(failure.detail).partition("\n")[0][:100] in lines[-1]
    return replace(failure, lines=lines) if is_told else failure


def _named(work: Work, status: Status) -> Status:
    """Which expert it is told of."""
    is_told = work.expert is not None and status.detail
    return replace(status, detail=f"expert {work.expert}: {status.detail}") if is_told else status


def _after(job: str, logs: str, known: Known) -> Status:
    """Why a job ended before its work did."""
    ended = known.ended.get(job)
    if ended is None:
        return Status("planned", f"job {job} is not known to the cluster any more")
    cause = queue.cause(ended, _last_errors(job, logs))
    if cause.kind == "preempted":
        return Status("preempted", cause.sentence, kind=cause.kind)
    if cause.kind == "cancelled":
        return Status("planned", f"job {job} was cancelled", kind=cause.kind)
    if ended.state == "COMPLETED":
        return Status("planned", f"job {job} stopped early")
    return Status("failed", cause.sentence, kind=cause.kind, lines=cause.lines)


def _last_errors(job: str, logs: str) -> str:
    """The end of what each rank wrote as errors since the job's last start; that of the rank that failed first last."""
    files = [path for path in output_of(job, logs) if path.suffix == ".err"] if logs else []
    texts = [text[-8000:] for text in since_last_start([path.read_text(errors="replace") for path in files])]
    return "\n".join(sorted(texts, key=lambda text: not is_of_another_rank(last_words(text))))


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
