"""Why did a job end?

Told from what the accounting has. Errors that the job wrote only give the words, and tell a death by memory from another one:
where Slurm watches memory without cgroups, both are FAILED.
"""

import pwd
import re
import signal
from dataclasses import dataclass

from slurm.accounting import EndedJob

KINDS = ("time limit", "memory", "node lost", "preempted", "cancelled", "code", "killed", "unknown")
CRASHES = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)  # a program brings these upon itself
SIGNALS_OF_OTHERS = (signal.SIGKILL, signal.SIGTERM)
TOO_MUCH_MEMORY = re.compile(r"^slurmstepd\S*: error:.*(exceeded.* memory limit|oom.kill)", re.IGNORECASE | re.MULTILINE)
TASK_KILLED = re.compile(r"^srun: error: .*task.*: Killed", re.MULTILINE)
SAY_START = 'echo "tsbench: start $((${SLURM_RESTART_COUNT:-0} + 1)) of this job" >&2'
"""Shell text with which the batch script and each rank begin: when a job starts again, it writes on in the files it has."""
START = re.compile(r"tsbench: start (\d+) of this job\n")
TRACEBACK = "Traceback (most recent call last):\n"
OF_SLURM = re.compile(r"^(srun|slurmstepd\S*|slurmd\S*): ")
OF_RANK = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)  # torch's mark on a traceback's lines
# What a rank says when another one is gone (gloo has no exception of its own, nccl a DistBackendError) or has failed.
OF_ANOTHER_RANK = re.compile(r"(\S+: )?(\[\S*gloo/|rank \d+ stops because )|(\w+\.)*Dist\w*Error: ")
PASSED_ON = re.compile(r"^rank \d+ stops because rank \d+ failed: ")  # before what the rank that failed first said
LONGEST = 300  # characters of a line that the code said
MOST_LINES = 3


@dataclass(frozen=True)
class Cause:
    """Why a job ended."""

    kind: str  # one of KINDS
    sentence: str  # for people
    lines: tuple[str, ...] = ()  # that the code wrote last, if it is the cause


def cause(ended: EndedJob, stderr_tail: str) -> Cause:
    """Why this attempt ended; `stderr_tail` is the end of what it wrote as errors, or ""."""
    job = f"job {ended.job_id}"
    if ended.state in ("TIMEOUT", "DEADLINE"):
        limit = f" of {_count(ended.limit_minutes, 'minute')}" if ended.limit_minutes is not None else ""
        return Cause("time limit", f"{job} reached its time limit{limit}")
    if _took_too_much_memory(ended, stderr_tail):
        return Cause("memory", f"{job} took more memory than it had asked for{_sizes(ended)}: raise memory_gb in the profile")
    if ended.state in ("NODE_FAIL", "BOOT_FAIL"):
        return Cause("node lost", f"{job} lost its node {ended.nodes}".rstrip())
    if ended.state == "PREEMPTED":
        return Cause("preempted", f"{job} was preempted")
    if ended.state == "CANCELLED":
        return Cause(
            "cancelled", f"{job} was cancelled" + (f" by {_user(ended.cancelled_by)}" if ended.cancelled_by is not None else "")
        )
    if ended.state == "FAILED" and ended.nodes:
        return _failure(ended, stderr_tail)
    if ended.state == "FAILED":
        return Cause("unknown", f"{job} could not be started")
    if ended.state == "COMPLETED":
        return Cause("unknown", f"{job} ended without an error")
    return Cause("unknown", f"{job} ended as {ended.state}")


def _failure(ended: EndedJob, stderr_tail: str) -> Cause:
    exit_code, number = _end_of_tasks(ended)
    lines = tuple(last_lines(stderr_tail))
    then = f": {lines[-1].strip()}" if lines else ""
    where = f" on {ended.nodes}" if ended.nodes else ""
    if number in CRASHES:
        return Cause("code", f"job {ended.job_id} crashed with {_signal(number)}{where}{then}", lines)
    if TASK_KILLED.search(stderr_tail):  # one task's death makes others fail, whose exit codes hide it
        number = signal.SIGKILL
    if number:
        return Cause("killed", f"a task of job {ended.job_id} was killed by {_signal(number)}{where}")
    return Cause("code", f"job {ended.job_id} failed with exit code {exit_code}{then}", lines)


def _end_of_tasks(ended: EndedJob) -> tuple[int, int]:
    """Exit code and signal of what srun started, or of the script where that is all."""
    for step in ended.steps:
        if step.name.isdigit() and (step.exit_code or step.signal):
            return step.exit_code, step.signal
    # A shell ends with 128 + signal where its command was killed; sacct leaves the 128 out.
    number = ended.signal or (ended.exit_code & 127 if ended.exit_code & 127 in SIGNALS_OF_OTHERS else 0)
    return ended.exit_code, number


def _took_too_much_memory(ended: EndedJob, stderr_tail: str) -> bool:
    if "OUT_OF_MEMORY" in (ended.state, *(step.state for step in ended.steps)):
        return True
    signals = {ended.signal, ended.exit_code & 127, *(step.signal for step in ended.steps)}
    if ended.state not in ("FAILED", "CANCELLED") or not signals & {signal.SIGKILL, 125}:
        return False
    most, asked = _most_bytes(ended), ended.requested_bytes
    return bool(most and asked and most > asked) or TOO_MUCH_MEMORY.search(stderr_tail) is not None


def _most_bytes(ended: EndedJob) -> int:
    return max((step.max_bytes or 0 for step in ended.steps), default=0)


def _sizes(ended: EndedJob) -> str:
    most, asked = _most_bytes(ended), ended.requested_bytes
    return f" ({most / 2**20:.0f} of {asked / 2**20:.0f} MB)" if asked and most > asked else ""


def since_last_start(texts: list[str]) -> list[str]:
    """What the ranks have written as errors since their job's last start; a rank that did not start then is left out."""
    parts = [START.split(text) for text in texts]  # ..., number of the last start, what followed
    numbers = [int(each[-2]) if len(each) > 1 else 1 for each in parts]
    return [each[-1] for each, number in zip(parts, numbers, strict=True) if number == max(numbers)]


def last_lines(stderr_tail: str) -> list[str]:
    """The end of the last traceback (file and line, code, exception), or the last lines that are not Slurm's."""
    _, traceback, after = OF_RANK.sub("", stderr_tail).rpartition(TRACEBACK)
    lines = [line[:LONGEST] for line in after.splitlines() if line.strip(" ^~") and not OF_SLURM.match(line)]
    if traceback:
        raised = next((place for place, line in enumerate(lines) if not line.startswith(" ")), len(lines))
        lines = lines[: raised + 1]
    return lines[-MOST_LINES:]


def last_words(stderr_tail: str) -> str:
    """The line of the last exception, or the last line that is not Slurm's; "" if there is none."""
    return "".join(last_lines(stderr_tail)[-1:]).strip()


def is_of_another_rank(said: str) -> bool:
    """Whether an exception says only that another rank of the job has failed or was ended."""
    return OF_ANOTHER_RANK.match(said) is not None


def first_cause(said: str) -> str:
    """What the rank that failed first has said, where another passes it on."""
    return PASSED_ON.sub("", said, count=1)


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else ""
    return f"signal {number} ({name})" if name else f"signal {number}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
