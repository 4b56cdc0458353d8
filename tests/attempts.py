"""When did which job have a piece of work, as the accounting has it?"""

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path

from slurm_cluster import Cluster
from submitit.core.utils import DelayedSubmission, JobPaths

from slurm.claims import Work
from slurm.task import Task


@dataclass(frozen=True)
class Attempt:
    """One start of a job, as the accounting has it."""

    job: str  # 12_3, or 12
    state: str
    started: float  # seconds since the epoch; inf if it never was
    ended: float  # inf while it runs


def attempts_in(cluster: Cluster, folder: Path) -> list[Attempt]:
    """Of all jobs that were submitted in this folder."""
    fields = "--format=jobid,state,start,end,workdir"
    command = ["env", "SLURM_TIME_FORMAT=%s", "sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", fields]
    printed = cluster.run(*command, "--starttime=now-1days")
    lines = [line.split("|") for line in printed.splitlines()]
    ours = [line for line in lines if line[4] == str(folder)]
    times = [[float(at) if at.isdigit() else inf for at in line[2:4]] for line in ours]
    return [Attempt(line[0], line[1].split()[0], *both) for line, both in zip(ours, times, strict=True)]


def attempts_of_works(attempts: list[Attempt], logs: Path) -> dict[Work, list[Attempt]]:
    """By the tasks that jobs were given, whatever became of them; a job that was never given one has worked on nothing."""
    found: dict[Work, list[Attempt]] = {}
    for attempt in attempts:
        given = JobPaths(logs, job_id=attempt.job).submitted_pickle
        if given.exists():
            task = DelayedSubmission.load(given).function
            assert isinstance(task, Task)
            found.setdefault(task.work, []).append(attempt)
    return found


def assert_apart(of_works: dict[Work, list[Attempt]]) -> None:
    """Of no piece of work two attempts ran at the same time."""
    for work, attempts in of_works.items():
        spans = sorted((each.started, each.ended, each.job) for each in attempts if each.started < each.ended)
        for (_, ended, job), (started, _, later) in pairwise(spans):
            assert ended <= started, f"{work.name}: job {job} until {ended}, job {later} from {started}"
