"""How did a job end, as the cluster's accounting or its controller has it?

No ending is final: a job that was preempted, lost its node or was requeued has an ending here while it waits or runs again.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from slurm.commands import OUR_JOBS, ask, call, records, to_seconds, to_time, why

ACCOUNTED = (
    *("JobID", "State", "ExitCode", "NodeList", "ElapsedRaw", "TimelimitRaw", "ReqMem", "NNodes", "MaxRSS", "Start", "End"),
    "JobName",  # last, as it may hold bars
)
REMEMBERED = ("JobArrayID", "State", "exit_code", "NodeList", "StartTime", "EndTime", "TimeLimit", "Name")
NOT_OVER = {
    *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
    *("REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
}
JOBS_PER_CALL = 500
BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class AccountingUnavailable(RuntimeError):
    """The accounting does not answer. Jobs may have ended, or not, in any way: nothing has failed by that."""


@dataclass(frozen=True)
class Step:
    """A part of a job: `batch` (its script) or `0`, `1`, ... (what the script started with srun)."""

    name: str
    state: str
    exit_code: int
    signal: int  # that ended it; 0 if none did
    max_bytes: int | None  # resident memory of its largest task, as sampled


@dataclass(frozen=True)
class EndedJob:
    """One attempt of a job that is over."""

    job_id: str
    name: str
    state: str  # COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL, PREEMPTED, OUT_OF_MEMORY, REQUEUED, ...
    cancelled_by: int | None  # a user's id
    exit_code: int
    signal: int
    nodes: str
    started: float | None  # seconds since the epoch
    ended: float | None
    elapsed_seconds: float | None
    limit_minutes: int | None
    requested_bytes: int | None  # of one node
    steps: tuple[Step, ...] = ()  # none where the accounting was not asked
    earlier: tuple["EndedJob", ...] = ()  # the attempts before, first to last
    followed_by: str = ""  # state of a later attempt that is not over, or not wholly recorded, such as RUNNING


def ended_jobs(jobs: Iterable[str]) -> dict[str, EndedJob]:
    """How the last attempt that is over ended, by job; a job that the accounting does not know, or that never ended, is left out.

    AccountingUnavailable if the accounting does not answer: then `recently_ended` tells what the controller remembers.
    """
    wanted = expand(jobs)
    bases = sorted({job.partition("_")[0] for job in wanted})
    attempts: dict[str, list[EndedJob]] = {}
    for start in range(0, len(bases), JOBS_PER_CALL):
        chosen = ",".join(bases[start : start + JOBS_PER_CALL])
        fields = f"--format={','.join(ACCOUNTED)}"
        done = call("sacct", "--duplicates", "--noheader", "--parsable2", fields, "--jobs", chosen)
        if done.returncode:
            raise AccountingUnavailable(f"sacct fails: {why(done)}")
        for attempt in parse_accounting(done.stdout):
            attempts.setdefault(attempt.job_id, []).append(attempt)
    found = {job: ended for job, each in attempts.items() if (ended := last_ended(each)) is not None}
    return {job: ended for job, ended in found.items() if job in wanted or job.partition("_")[0] in wanted}


def recently_ended(jobs: Iterable[str]) -> dict[str, EndedJob]:
    """The same, as the controller remembers it: for some minutes (MinJobAge), and without steps, memory and earlier attempts."""
    wanted = expand(jobs)
    fields = ",".join(f"{name}:|" for name in REMEMBERED)
    printed = ask(*OUR_JOBS, "--array", "--states=all", "--noheader", f"--Format={fields}")
    found = {ended.job_id: ended for ended in parse_remembered(printed) if ended.state not in NOT_OVER}
    return {job: ended for job, ended in found.items() if job in wanted or job.partition("_")[0] in wanted}


def expand(jobs: Iterable[str]) -> set[str]:
    """`12_[0-6:3,9%2]` -> 12_0, 12_3, 12_6, 12_9; other names stay."""
    return {element for job in jobs for element in _elements(job)}


def parse_accounting(printed: str) -> list[EndedJob]:
    """Attempts in the accounting's order, with their steps; also those that are not over.

    `12_[0-3]` stands for elements that were never started, but may name some that were: those have records of their own.
    """
    attempts: list[EndedJob] = []
    of_arrays: list[EndedJob] = []
    for row in records(printed, len(ACCOUNTED)):
        job, state, exit_status, nodes, elapsed, limit, requested, num_nodes, max_rss, start, end, name = row
        state, _, canceller = state.partition(" by ")
        exit_code, _, ended_by = exit_status.partition(":")
        job, _, step_name = job.partition(".")
        if step_name:
            step = Step(step_name, state, _whole(exit_code), _whole(ended_by), _bytes(max_rss))
            attempts[-1] = replace(attempts[-1], steps=(*attempts[-1].steps, step))  # below the attempt that it is part of
            continue
        total_bytes = _bytes(requested)
        attempt = EndedJob(
            job_id=job,
            name=name,
            state=state,
            cancelled_by=int(canceller) if canceller.isdigit() else None,
            exit_code=_whole(exit_code),
            signal=_whole(ended_by),
            nodes="" if nodes == "None assigned" else nodes,
            started=to_time(start),
            ended=to_time(end),
            elapsed_seconds=float(elapsed) if elapsed.isdigit() else None,
            limit_minutes=int(limit) if limit.isdigit() else None,
            requested_bytes=total_bytes // max(1, _whole(num_nodes)) if total_bytes else None,
        )
        if "[" in job:
            of_arrays += [replace(attempt, job_id=element) for element in _elements(job)]
        else:
            attempts.append(attempt)
    own = {attempt.job_id for attempt in attempts}
    return attempts + [attempt for attempt in of_arrays if attempt.job_id not in own]


def parse_remembered(printed: str) -> list[EndedJob]:
    jobs = []
    for job, state, exit_status, nodes, start, end, limit, name in records(printed, len(REMEMBERED)):
        started, ended, limit_seconds, status = to_time(start), to_time(end), to_seconds(limit), _whole(exit_status)
        jobs.append(
            EndedJob(
                job_id=job,
                name=name.removesuffix("|"),
                state=state,
                cancelled_by=None,
                exit_code=os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status),
                nodes=nodes,
                started=started,
                ended=ended,
                elapsed_seconds=ended - started if started is not None and ended is not None else None,
                limit_minutes=int(limit_seconds // 60) if limit_seconds is not None else None,
                requested_bytes=None,
            )
        )
    return jobs


def last_ended(attempts: list[EndedJob]) -> EndedJob | None:
    """The last attempt that is over, with those before and what follows.

    What happened while the accounting was down is recorded late and by pieces: the state before the end and its exit code.
    """
    over = [attempt for attempt in attempts if attempt.state not in NOT_OVER and attempt.ended is not None]
    after = "" if attempts[-1] in over else attempts[-1].state
    return replace(over[-1], earlier=tuple(over[:-1]), followed_by=after) if over else None


def _elements(job: str) -> list[str]:
    base, bracket, inside = job.partition("_[")
    if not bracket:
        return [job]
    parts = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", inside.partition("%")[0])
    ranges = [range(int(first), int(last or first) + 1, int(step or 1)) for first, last, step in parts]
    return [f"{base}_{index}" for indices in ranges for index in indices]


def _whole(printed: str) -> int:
    """0 for what is not told."""
    return int(printed) if printed.isdigit() else 0


def _bytes(printed: str) -> int | None:
    """`320640K`, `1.5G`; None for what is not told, and for Slurm's older sizes per CPU."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", printed)
    return int(float(match[1]) * BYTES[match[2]]) if match else None
