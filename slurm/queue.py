"""What does the cluster know about jobs, and what can be asked of it?

A job is named as squeue names it: `12`, or `12_3` for an element of an array. What is not in `live_jobs` may still be
queued again: whoever decides on that asks for live jobs first, then how others ended (`slurm.accounting`), and keeps neither.
"""

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass

from slurm.accounting import AccountingUnavailable as AccountingUnavailable
from slurm.accounting import EndedJob as EndedJob
from slurm.accounting import ended_jobs as ended_jobs
from slurm.accounting import recently_ended as recently_ended
from slurm.cause import Cause as Cause
from slurm.cause import cause as cause
from slurm.commands import OUR_JOBS, PATIENCE_SECONDS, PAUSE_SECONDS, ask, call, records, to_seconds, to_time, why
from slurm.commands import ClusterUnreachable as ClusterUnreachable

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel")
LIVE_FIELDS = ("JobArrayID", "State", "Reason", "NodeList", "StartTime", "TimeLeft", "RestartCnt", "Name")
JOBS_PER_CALL = 500
PING_SECONDS = 10.0  # of one call: without a readable slurm.conf it would try for a minute
REQUEUE_TRIES = 3
# Slurm's own signals reach every process of a job, also the one that is asking for the requeue.
DEAF = 'trap "" TERM USR1 USR2 HUP INT CONT; exec "$@"'
UNHEARD = ("unable to contact slurm controller", "timed out")  # said by an sbatch that reached no controller
# What sbatch says, and what to change in the profile. The more special come first: sbatch may say two of them.
REFUSALS = (
    ("unable to contact slurm controller", "try again when the cluster's controller is up"),
    ("memory specification", "lower `memory_gb`, or name another `partition`"),
    ("generic resource", "correct `gres` or `gpus_per_node`; `sinfo -o '%N %G'` lists what nodes have"),
    ("feature", "correct `constraint`; `sinfo -o '%N %f'` lists what nodes have"),
    (
        "policy",
        "lower what the job asks for, or `max_array_elements`, to what your account and qos allow",
    ),  # accounting/QOS policy
    ("account", "correct `account` or `partition`; `sacctmgr show associations user=$USER format=account,partition` lists yours"),
    ("partition", "correct `partition`; `sinfo -s` lists them"),
    ("qos specification", "correct `qos`; `sacctmgr show associations user=$USER format=account,qos` lists yours"),
    ("array specification", "lower `max_array_elements` to the cluster's MaxArraySize; see `scontrol show config`"),
    ("--time", "correct `minutes`"),
    ("time limit", "lower `minutes` to what the partition allows; `sinfo -o '%P %l'` shows it"),
    ("option", "correct `additional`"),
    (
        "node configuration is not available",
        "lower `gpus_per_node` (or `gres`), `cpus_per_task`, `memory_gb` or `nodes` to what a node has, or change `partition`",
    ),
)


@dataclass(frozen=True)
class LiveJob:
    """A job that waits, runs, or is just being ended (COMPLETING, possibly to be queued again)."""

    job_id: str
    name: str
    state: str  # PENDING, RUNNING, COMPLETING, SUSPENDED, ...
    reason: str  # why it waits; "" if there is none
    nodes: str
    started: float | None  # seconds since the epoch; of a waiting job: when it is expected to
    seconds_left: float | None  # of its time limit; None without one
    restarts: int  # how often it was queued again


def live_jobs(names: Iterable[str] | None = None, patience_seconds: float = PATIENCE_SECONDS) -> dict[str, LiveJob]:
    """All jobs of this user, or those with these names, by id. ClusterUnreachable after that long without an answer."""
    fields = ",".join(f"{name}:|" for name in LIVE_FIELDS)
    printed = ask(*OUR_JOBS, "--array", "--noheader", f"--Format={fields}", patience_seconds=patience_seconds)
    wanted = None if names is None else set(names)
    jobs = parse_live(printed)
    return {job_id: job for job_id, job in jobs.items() if wanted is None or job.name in wanted}


def parse_live(printed: str) -> dict[str, LiveJob]:
    jobs = {}
    for job_id, state, reason, nodes, start, left, restarts, name in records(printed, len(LIVE_FIELDS)):
        jobs[job_id] = LiveJob(
            job_id=job_id,
            name=name.removesuffix("|"),
            state=state,
            reason="" if reason == "None" else reason,
            nodes=nodes,
            started=to_time(start),
            seconds_left=to_seconds(left),
            restarts=int(restarts),
        )
    return jobs


def live_names(patience_seconds: float = PATIENCE_SECONDS) -> dict[str, str]:
    """Job -> its name."""
    return {job_id: job.name for job_id, job in live_jobs(patience_seconds=patience_seconds).items()}


def job_is_being_ended(job: str, patience_seconds: float = PATIENCE_SECONDS) -> bool:
    """Of a job (in either form: Slurm's SLURM_JOB_ID, or 12_3) that was told to stop: False while Slurm lets it run on.

    True where it is cancelled, or Slurm queues it again by itself: then it must not ask for that too. False in a preemption's
    grace time, and before a time limit: then nobody queues it again unless it asks.
    """
    running = ask(*OUR_JOBS, "--states=RUNNING", "--noheader", "--format=%A %i", patience_seconds=patience_seconds)
    return job not in running.split()


def requeue(job: str, tries: int = REQUEUE_TRIES) -> bool:
    """Whether Slurm takes the job back into the queue. It then ends this job, and with it this process.

    The request is deaf to the signals by which Slurm may be ending the job meanwhile, and so is not lost halfway.
    """
    for attempt in range(tries):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        if call("sh", "-c", DEAF, "sh", "scontrol", "requeue", job).returncode == 0:
            return True
    return False


def cancel(jobs: Iterable[str], patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Cancel jobs; those that are gone already do not matter. ClusterUnreachable if some live on after that long."""
    left = sorted(set(jobs))
    deadline = time.monotonic() + patience_seconds
    while left:
        chunks = [left[start : start + JOBS_PER_CALL] for start in range(0, len(left), JOBS_PER_CALL)]
        failed = [(chunk, done) for chunk in chunks if (done := call("scancel", *chunk)).returncode]
        # scancel may also fail because of jobs that are gone: the queue knows better.
        live = live_jobs(patience_seconds=patience_seconds) if failed else {}
        names = {
            name for job in live.values() if job.state != "COMPLETING" for name in (job.job_id, job.job_id.partition("_")[0])
        }
        left = [job for chunk, _ in failed for job in chunk if job in names]
        if left and time.monotonic() >= deadline:
            raise ClusterUnreachable(f"cancelling {len(left)} of the jobs fails ({why(failed[0][1])}): try `scancel {left[0]}`")
        if left:
            time.sleep(PAUSE_SECONDS)


def max_array_size() -> int | None:
    """How many elements an array may have, numbered from 0; None where the cluster does not say."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config").stdout, re.MULTILINE)
    return int(match[1]) if match else None


def refusal(stderr: str) -> ValueError | ClusterUnreachable:
    """What to raise for what sbatch says. A cluster that does not answer may answer later."""
    unheard = any(words in stderr.lower() for words in UNHEARD)
    return (ClusterUnreachable if unheard else ValueError)(submission_error(stderr))


def submission_error(stderr: str) -> str:
    """sbatch's refusal as one sentence, with what to change in the profile."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("Try ")]
    words = re.sub(r"^sbatch: (error: )?(Batch job submission failed: )?", "", lines[-1]) if lines else "it does not say why"
    advice = next((advice for said, advice in REFUSALS if said in stderr.lower()), "change the profile")
    return f"the cluster refuses the job ({words}): {advice}"


def cluster_is_here(patience_seconds: float = PATIENCE_SECONDS) -> tuple[bool, str]:
    """Whether jobs can be submitted from this machine, and what is missing. A controller that is down gets time to restart."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return False, f"{', '.join(missing)} not on the PATH"
    deadline = time.monotonic() + patience_seconds
    while True:
        done = call("scontrol", "ping", seconds=PING_SECONDS)
        if re.search(r"\bis UP\b", done.stdout):
            return True, ""
        if "is DOWN" not in done.stdout:  # no waiting mends the configuration
            return False, why(done)
        if time.monotonic() >= deadline:
            return False, "its controller does not answer"
        time.sleep(PAUSE_SECONDS)
