"""Which job is a piece of work in the hands of? One record per run folder, taken before anything is submitted.

Two launches of one suite at once: the first to write `job.json` has the work, the other leaves it alone. A launcher
that is killed between submitting and noting the job's number has left a token, which is also the job's name: the next
launch finds the job by it. This keeps the queue free of duplicates; that a run is never trained twice at once, even
so, is the lease's doing (`bench.lease`), which the job takes itself.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.files import make_folder, read_json, write_json_atomically
from bench.lease import this_machine

FILE = "job.json"
LAUNCH_SECONDS = 600.0  # a launcher that cannot be seen from here, and has not noted a job by then, is dead


@dataclass(frozen=True)
class Work:
    """What one job does: a run, or one expert of it (`expert`), which has a folder of its own inside the run's."""

    run_folder: Path
    folder: Path
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.run_folder.name if self.expert is None else f"{self.run_folder.name}:{self.expert}"


@dataclass(frozen=True)
class Claim:
    """Who submits, or has submitted, a piece of work."""

    token: str  # of the submission; the job's name in the queue
    index: int  # the work's place in the submission: the element of its array
    host: str  # of the launcher
    pid: int
    claimed: float  # seconds since the epoch
    job: str = ""  # "12_3" or "12", once the cluster has it
    logs: str = ""  # folder of the job's output
    snapshot: str = ""  # folder of the code that it runs
    boot_id: str = ""  # of the launcher's kernel: with `host`, which machine it is
    launcher_started: int | None = None  # as `started_at` has it: a process id alone may be another's by now

    @property
    def launcher_is_alive(self) -> bool:
        """As far as can be told from here: one that cannot be seen counts as alive for a while."""
        started = started_at(self.pid) if (self.host, self.boot_id) == this_machine() else None
        if started is None or self.launcher_started is None:
            return time.time() - self.claimed < LAUNCH_SECONDS
        return started == self.launcher_started

    def job_in(self, names: Mapping[str, str]) -> str:
        """The job: as noted or, where the launcher did not come to that, as found in the queue (job id -> name); or ''."""
        if self.job:
            return self.job
        array = [job for job, name in names.items() if name == self.token]
        exact = [job for job in array if job.partition("_")[2] == str(self.index)]
        alone = [job for job in array if "_" not in job and self.index == 0]
        return (exact or alone or [""])[0]


def started_at(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the machine did; 0 if there is none, None if it is hidden."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except PermissionError:  # another user's, whose /proc may be closed to us
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    except OSError:
        return None
    return 0 if state == "Z" else int(fields[18])  # dead, but nobody has asked how it ended; proc(5): field 22


def read_claim(work: Work) -> Claim | None:
    """The last one, whether its job lives or not."""
    record = read_json(work.folder / FILE, dict)
    try:
        return Claim(**record) if record else None
    except TypeError:
        raise ValueError(f"{work.folder / FILE} is no job record: delete it, once `squeue` shows no job of this run") from None


def is_in_hand(claim: Claim, names: Mapping[str, str]) -> bool:
    """Whether the queue (job id -> name) or a living launcher has the work."""
    return claim.job_in(names) in names or (not claim.job and claim.launcher_is_alive)


def take(works: list[Work], token: str, live_names: Callable[[], Mapping[str, str]], logs: Path, snapshot: Path) -> list[Work]:
    """Claim what nobody has in hand; the works that are now ours, numbered in their order.

    The queue (job id -> name) is asked after the claims were read: one that has changed since then is another launcher's,
    whose job that answer may not hold yet.
    """
    before = {work: read_claim(work) for work in works}
    names = live_names()
    ours: list[Work] = []
    for work, claim in before.items():
        with _only_one(work):
            if read_claim(work) == claim and (claim is None or not is_in_hand(claim, names)):
                own = _own_claim(token, len(ours), logs, snapshot)
                write_json_atomically(work.folder / FILE, asdict(own))
                ours.append(work)
    return ours


def _own_claim(token: str, index: int, logs: Path, snapshot: Path) -> Claim:
    host, boot_id = this_machine()
    pid = os.getpid()
    started = started_at(pid)
    return Claim(token, index, host, pid, time.time(), "", str(logs), str(snapshot), boot_id, started)


def orphan(work: Work, names: Mapping[str, str]) -> Claim | None:
    """The claim, with its job, of a launcher that died before it could note that job; None if there is nothing to note."""
    claim = read_claim(work)
    job = claim.job_in(names) if claim is not None and not claim.job else ""
    if claim is None or not job or claim.launcher_is_alive:
        return None
    return replace(claim, job=job)


def note_job(work: Work, token: str, job: str) -> None:
    """The cluster has it."""
    claim = read_claim(work)
    assert claim is not None and claim.token == token, f"the claim of {work.name} was taken away"
    write_json_atomically(work.folder / FILE, asdict(replace(claim, job=job)))


def give_up(work: Work, token: str) -> None:
    """The cluster did not want it."""
    claim = read_claim(work)
    if claim is not None and claim.token == token and not claim.job:
        (work.folder / FILE).unlink()


@contextmanager
def _only_one(work: Work) -> Iterator[None]:
    """Launchers look and claim one after the other."""
    make_folder(work.folder)
    with open(work.folder / ".claim", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
