"""Who may work on a run folder, when several machines share it?

A holder has one file in the folder `lease` of the run, named after its token, and touches it every RENEW_SECONDS. Each step is
one that a file system does at once and for all machines, also NFS, where locks need not reach other nodes:

    take        rename an own folder, with the own file in it, to `lease`: fails while that holds a file
    renew       touch the own file: fails once it is gone, and can never renew another's lease
    take over   remove the file of a holder that is gone, by its token; then take, which one of many can
    leave       remove the own file

A process of this machine is gone when the kernel has freed its flock; a job, when Slurm has requeued it or says that it is
dead; any other holder, when its lease has not been renewed for EXPIRE_SECONDS by the clock of the file system.

A holder that only seemed gone (paused, or cut off) finds its file missing when it next renews, and `lost` becomes True. Until
then both believe to hold the run: for RENEW_SECONDS at most, as `lost` itself asks the file system after a pause.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from bench.files import make_folder

RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 120.0  # well above what an NFS client may remember of a file (60 s), plus RENEW_SECONDS
NUM_ATTEMPTS = 100
RETRY_SECONDS = 0.05
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
CANDIDATES = ".lease-*"  # what one that was killed while taking leaves
SEEN = ("renewed_seconds_ago", "has_ended")  # of a holder, not written
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


class LeaseLost(RuntimeError):
    """Another process has taken over the run: nothing more may be written to it."""


class Held(ValueError):
    """Another process works on the run."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder, as it wrote itself down, and what can be seen of it from here."""

    token: str
    host: str
    boot_id: str  # of the running kernel: with `host`, which machine it is
    node: str  # the host as Slurm calls it
    pid: int
    cluster: str
    job: str  # 12, or 12_3 in an array; "" outside Slurm, as is the cluster
    num_restarts: int  # how often Slurm has requeued the job
    flock: bool  # whether it holds one, and that shows: not on every file system
    taken: str  # UTC
    renewed_seconds_ago: float = 0.0
    has_ended: bool = False  # for certain: it was a process of this machine

    def __str__(self) -> str:
        who = f"job {self.job}" if self.job else f"process {self.pid}"
        return f"{who} on {self.node}, renewed {max(0, round(self.renewed_seconds_ago))} s ago"

    @property
    def expired(self) -> bool:
        """Whether anyone may take over, whatever became of it."""
        return self.renewed_seconds_ago > EXPIRE_SECONDS

    @property
    def machine(self) -> tuple[str, str]:
        return self.host, self.boot_id


class Lease:
    """Our hold on a run folder."""

    def __init__(self, path: Path, file: TextIO, renewed: float) -> None:
        self._path, self._file, self._renewed = path, file, renewed
        self._lost = False
        self._left = threading.Event()
        HELD.add(self)
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another may hold the run by now; once True, it stays so. Costs nothing but after a pause."""
        if time.monotonic() - self._renewed > EXPIRE_SECONDS:  # the thread has been paused as we have
            self._renew()
        return self._lost

    def check(self) -> None:
        """LeaseLost if another holds the run, as the file system says at this moment."""
        self._renew()
        if self._lost:
            raise LeaseLost(f"run {self._path.parents[1].name} has been taken over by another process: this one stops")

    def leave(self) -> None:
        if self not in HELD:  # a child of the holder's
            return
        HELD.discard(self)
        self._left.set()
        self._file.close()  # before its removal, or NFS keeps it under another name
        with suppress(OSError):  # what cannot be removed expires
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()

    def disown(self) -> None:
        """What a forked child does: it shares the flock, and would keep it when the holder dies."""
        self._file.close()
        self._lost = True

    def _keep(self) -> None:
        while not self._lost and not self._left.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> None:
        """Touch our file. That needs no space, so a full disk loses no lease."""
        if self._lost:
            return
        now = time.monotonic()
        try:
            os.utime(self._path)
            self._renewed = now
        except OSError as error:  # any but GONE may pass; we try again until the lease has expired
            if error.errno in GONE or now - self._renewed > EXPIRE_SECONDS:
                self._lost = True


# flock rather than lockf: that is not inherited, but is lost as soon as anything in the process closes any descriptor of the
# file, such as one that copies or reads the run folder. Inheritance is mended instead: a forked child closes its copy before
# anything else, and Python closes it in every other program that is started.
HELD: set[Lease] = set()


def _disown_all() -> None:
    for lease in HELD:
        lease.disown()
    HELD.clear()


os.register_at_fork(after_in_child=_disown_all)


@contextmanager
def hold(folder: Path, is_dead: Callable[[str], bool] | None = None) -> Iterator[Lease]:
    """Hold a run folder, which is made if need be; Held if another process holds it, ValueError if it cannot be written.

    `is_dead` is asked about the job of a holder that runs in one: "12", or "12_3" in an array; a RuntimeError of it passes on.
    """
    folder = Path(folder).absolute()
    make_folder(folder)
    try:
        lease = _take(folder, is_dead)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None
    try:
        yield lease
    finally:
        lease.leave()


def read(folder: Path) -> Holder | None:
    """Who holds a run folder, maybe expired; None if nobody does. By the clock of this machine; writes nothing."""
    holder = _look(Path(folder) / "lease", time.time())
    return None if holder is None or holder.has_ended else holder


def this_process() -> Holder:
    """A holder with a new token."""
    host, boot_id = this_machine()
    of_slurm = os.environ.get
    array = of_slurm("SLURM_ARRAY_JOB_ID")
    return Holder(
        token=secrets.token_hex(8),
        host=host,
        boot_id=boot_id,
        node=of_slurm("SLURMD_NODENAME") or host,
        pid=os.getpid(),
        cluster=of_slurm("SLURM_CLUSTER_NAME", ""),
        job=f"{array}_{of_slurm('SLURM_ARRAY_TASK_ID')}" if array else of_slurm("SLURM_JOB_ID", ""),
        num_restarts=int(of_slurm("SLURM_RESTART_COUNT", "0")),
        flock=False,
        taken=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def this_machine() -> tuple[str, str]:
    """The host's name and its kernel's boot id. Neither alone will do: names repeat, and so do ids of copied virtual machines."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return os.uname().nodename, boot_id.read_text().strip() if boot_id.exists() else ""


def _take(folder: Path, is_dead: Callable[[str], bool] | None) -> Lease:
    us = this_process()
    place, candidate = folder / "lease", folder / f".lease-{us.token}"
    own = candidate / f"{us.token}.json"
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, candidate, ignore_errors=True)
        candidate.mkdir()
        file = undo.enter_context(open(own, "x"))
        us = replace(us, flock=_flock(file, own))
        file.write(json.dumps({key: value for key, value in asdict(us).items() if key not in SEEN}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
        for _ in range(NUM_ATTEMPTS):
            renewed = time.monotonic()
            os.utime(own)
            if _rename(candidate, place, own.name):
                undo.pop_all()
                return Lease(place / own.name, file, renewed)
            _make_room(place, us, own.stat().st_mtime, is_dead)
    raise ValueError(f"{place} holds other files than a lease: delete it unless the run is being worked on")


def _rename(candidate: Path, place: Path, name: str) -> bool:
    """Whether it could be renamed: only one can, as long as `place` holds a file."""
    try:
        os.rename(candidate, place)
    except OSError as error:
        if (place / name).exists():  # done, but NFS lost the answer and asked again
            return True
        if error.errno not in OCCUPIED:
            raise
        return False
    return True


def _make_room(place: Path, us: Holder, now: float, is_dead: Callable[[str], bool] | None) -> None:
    """Remove the file of a holder that is gone; Held if one works on the run."""
    holder = _look(place, now)
    if holder is None:
        time.sleep(RETRY_SECONDS)  # it has just left, and another may be about to take the run
    elif _is_gone(holder, us, is_dead):
        (place / f"{holder.token}.json").unlink(missing_ok=True)
    else:
        raise Held(f"run {place.parent.name} is being worked on by another process ({holder}): wait for it or stop it first")
    with suppress(OSError):  # not every file system renames over an empty folder
        place.rmdir()


def _is_gone(holder: Holder, us: Holder, is_dead: Callable[[str], bool] | None) -> bool:
    if (holder.cluster, holder.job) == (us.cluster, us.job) and holder.num_restarts < us.num_restarts:
        return True  # Slurm has requeued this very job
    if holder.job and is_dead is not None and is_dead(holder.job):
        return True
    if holder.flock and holder.machine == us.machine:
        return holder.has_ended  # however long it has been paused
    return holder.expired


def _look(place: Path, now: float) -> Holder | None:
    """The holder as seen at the time `now`; None if there is none."""
    try:
        for name in os.listdir(place):
            if name.endswith(".json"):
                with open(place / name, encoding="utf-8") as file:  # opening makes NFS ask for the file's time
                    holder = Holder(**json.load(file))
                    seconds = now - os.fstat(file.fileno()).st_mtime
                    ended = holder.flock and holder.machine == this_machine() and _flock_is_free(file)
                    return replace(holder, renewed_seconds_ago=seconds, has_ended=ended)
    except OSError as error:
        if error.errno not in GONE:
            raise
    except (ValueError, TypeError):
        raise ValueError(f"{place / name} is damaged: delete it unless the run is being worked on") from None
    return None


def _flock(file: TextIO, path: Path) -> bool:
    """Take the flock of our own new file; whether that shows to others on this machine."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without: then only time tells
        return False
    with open(path) as other:
        return not _flock_is_free(other)


def _flock_is_free(file: TextIO) -> bool:
    """Shared, so that those who look do not stand in each other's way. Free only if surely so."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
