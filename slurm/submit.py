"""How does work get into the queue of a cluster? As arrays of jobs through submitit, each piece of work once."""

import io
import itertools
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths

from bench.files import make_folder
from slurm import queue
from slurm.cause import SAY_START
from slurm.claims import Claim, Work, give_up, note_job, orphan, read_claim, take
from slurm.profile import Profile
from slurm.task import Task, Train

# A warning that comes while Python still loads would end it: ignored until the task listens (env --ignore-signal is too new).
DEAF_WHILE_LOADING = f"""bash -c 'trap "" USR2; {SAY_START}; exec "$@"' bash"""
SLACK_SECONDS = 60.0  # Slurm may warn of a time limit so much earlier than it was asked to
NO_MORE_THAN = 3  # runs that are named
REQUEUES_OF_SUBMITIT = 1_000_000  # the task counts its own starts, those without progress


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also be asked for its batch script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    @classmethod
    def name(cls) -> str:
        return "slurm"


def make_executor(profile: Profile, job_name: str, logs: Path, snapshot: Path) -> Executor:
    python = f"{DEAF_WHILE_LOADING} {profile.python_command}"
    executor = Executor(logs, max_num_timeout=REQUEUES_OF_SUBMITIT, python=python)
    executor.update_parameters(**profile.sbatch_parameters(job_name, snapshot), srun_args=["--kill-on-bad-exit=1"])
    return executor


def batch_script(profile: Profile, job_name: str, logs: Path, snapshot: Path, count: int) -> str:
    """The script that `submit` would hand to sbatch for an array of `count` (one alone: no array). Writes nothing."""
    executor = make_executor(profile, job_name, logs, snapshot)
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(works: list[Work], train: Train, profile: Profile, snapshot: Path, logs: Path) -> dict[Work, str]:
    """Put into the queue what is in nobody's hands; work -> job.

    ValueError in one sentence if the cluster refuses, ClusterUnreachable if it does not answer: what it took before stays,
    and is named in the sentence; nothing of the rest is left behind.
    """
    make_folder(logs)
    jobs: dict[Work, str] = {}
    elements = min(profile.max_array_elements, queue.max_array_size() or profile.max_array_elements)
    for chunk in _chunks(works, elements):
        if jobs:
            time.sleep(profile.submit_every_seconds)
        try:
            jobs |= _submit_chunk(chunk, train, profile, snapshot, logs)
        except ValueError as error:
            raise ValueError(f"{error}{_submitted_before(jobs)}") from None
        except queue.ClusterUnreachable as error:
            raise queue.ClusterUnreachable(f"{error}{_submitted_before(jobs)}") from None
    return jobs


def _submitted_before(jobs: Mapping[Work, str]) -> str:
    """What to say, after an error, of the arrays that the cluster took; "" if there are none."""
    if not jobs:
        return ""
    arrays = ", ".join(dict.fromkeys(job.partition("_")[0] for job in jobs.values()))
    names = [work.name for work in jobs]
    more = f" and {len(names) - NO_MORE_THAN} more" if len(names) > NO_MORE_THAN else ""
    return (
        f"; submitted before that, and not undone: job {arrays} ({', '.join(names[:NO_MORE_THAN])}{more}); "
        "the same sweep again submits only the rest"
    )


def _submit_chunk(chunk: list[Work], train: Train, profile: Profile, snapshot: Path, logs: Path) -> dict[Work, str]:
    """As one array, what of it is in nobody's hands."""
    token = f"tsbench-{uuid.uuid4().hex[:12]}"
    ours = take(chunk, token, queue.live_names, logs, snapshot)
    if not ours:
        return {}
    try:
        jobs = dict(zip(ours, _submit_one(ours, train, profile, snapshot, logs, token), strict=True))
    except (ValueError, queue.ClusterUnreachable):
        for work in ours:
            give_up(work, token)
        raise
    for work, job in jobs.items():
        note_job(work, token, job)
    return jobs


def _submit_one(works: list[Work], train: Train, profile: Profile, snapshot: Path, logs: Path, token: str) -> list[str]:
    """One array; the elements' jobs. What submitit prints of a refusal is in the error."""
    executor = make_executor(profile, token, logs, snapshot)
    tasks = [_task(train, work, profile) for work in works]
    try:
        with redirect_stderr(io.StringIO()):
            return [job.job_id for job in executor.submit_array(tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise queue.refusal(str(error)) from None


def adopt_orphans(works: Iterable[Work], train: Train, profile: Profile) -> None:
    """Give jobs, whose launcher died right after it submitted them, the task that they wait for (a minute), and note them."""
    unnoted = [work for work in works if (claim := read_claim(work)) is not None and not claim.job]
    names = queue.live_names() if unnoted else {}
    for work in unnoted:
        if (claim := orphan(work, names)) is not None:
            _give_pickle(work, claim, train, profile)
            note_job(work, claim.token, claim.job)  # last: one that is killed before is followed by another that does both


def _give_pickle(work: Work, claim: Claim, train: Train, profile: Profile) -> None:
    path = JobPaths(claim.logs, job_id=claim.job).submitted_pickle
    if not path.exists():
        delayed = DelayedSubmission(_task(train, work, profile))
        delayed.set_timeout(profile.minutes, REQUEUES_OF_SUBMITIT)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        delayed.dump(temporary)
        temporary.replace(path)  # the job may be looking


def _task(train: Train, work: Work, profile: Profile) -> Task:
    earliest_warning = 60 * profile.minutes - profile.signal_seconds - SLACK_SECONDS
    return Task(train, work, profile.restarts_without_progress, earliest_warning)


def output_of(job: str, logs: str) -> list[Path]:
    """Files that the job's ranks have written, by rank; their errors last."""
    all_ranks = (JobPaths(logs, job_id=job, task_id=rank) for rank in itertools.count())
    ranks = list(itertools.takewhile(lambda paths: paths.stdout.exists() or paths.stderr.exists(), all_ranks))
    files = [*(paths.stdout for paths in ranks), *(paths.stderr for paths in ranks)]
    return [path for path in files if path.exists()]


def _chunks(works: list[Work], size: int) -> Iterator[list[Work]]:
    for start in range(0, len(works), size):
        yield works[start : start + size]
