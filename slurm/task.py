"""What does a job do on its node, and how does it end well whatever the cluster does?

The cluster warns a job before it ends it: SIGUSR2 some time before the time limit or a preemption, SIGTERM when it
means it. Our handlers only set a flag. The trainer saves at its next step, on all ranks; then the job asks to be
queued again, unless the cluster is ending it for good or queues it again by itself. submitit's own handler would do
all that inside the signal handler, and report a job that Slurm's SIGTERM meets there as failed for ever.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.helpers import TorchDistributedEnvironment

from bench.files import read_json, write_json_atomically
from bench.lease import Held
from bench.stopping import StopFlag
from slurm import queue
from slurm.claims import Work

RESTARTS = "restarts.json"
ANSWER_SECONDS = 10.0  # a job that is told to stop has no more time to wait
WARNINGS = (signal.SIGUSR2, signal.SIGTERM)
IN_VAIN = "started {count} times in a row without getting further than {place}: see its log, then sweep with --only failed"

Train = Callable[[Path, int | None, Callable[[], bool], Callable[[str], bool]], bool]
"""(run folder, expert or None, whether to stop, whether a job is dead) -> whether it came to its end. `bench.job.work_on`."""


@dataclass(frozen=True)
class Task:
    """One piece of work, as submitit calls it on every rank of the job. `train` is found by its name in the job's code."""

    train: Train
    work: Work
    restarts_without_progress: int
    limit_seconds: float  # after which a warning can be that of the time limit

    def __call__(self) -> str:
        warned, started = StopFlag().listen(*WARNINGS), time.monotonic()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler only writes a line
        environment = submitit.JobEnvironment()
        is_main = environment.global_rank == 0
        if is_main:
            self.count_start()
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            if self.train(self.work.run_folder, self.work.expert, warned, has_left_the_queue):
                return "done"
        except Held as error:  # no failure of the run's: it goes on elsewhere
            print(error)
            return "held by another"
        job = environment.job_id  # 12_3: by its plain number an array's last element is the array, all of which would restart
        if is_main and not is_being_ended(job):
            if time.monotonic() - started < self.limit_seconds:
                self.note_preemption()
            queue.requeue(job)
        return "stopped"

    def note_preemption(self) -> None:
        """For who looks while the job waits: once it does, Slurm forgets why. The next start takes the note away."""
        record = read_json(self.work.folder / RESTARTS, dict)
        write_json_atomically(self.work.folder / RESTARTS, {**record, "preempted": True})

    def count_start(self) -> None:
        """Refuse to start for ever: RuntimeError, and the run failed, after too many starts that got no further."""
        before = read_json(self.work.folder / RESTARTS, dict)
        place = how_far(self.work.folder)
        count = before["count"] + 1 if before and before["place"] == place else 0
        write_json_atomically(self.work.folder / RESTARTS, {"place": place, "count": count})
        if count > self.restarts_without_progress:
            cause = IN_VAIN.format(count=count, place=place or "its start")
            write_json_atomically(self.work.folder / "failure.json", {"state": "failed", "cause": cause})
            raise RuntimeError(cause)


def was_preempted(folder: Path) -> bool:
    """Whether the last job in a folder asked to be queued again because the cluster wanted its place."""
    return bool(read_json(folder / RESTARTS, dict).get("preempted"))


def has_left_the_queue(job: str) -> bool:
    """For certain; a cluster that does not answer may still have it."""
    try:
        return job not in queue.live_jobs(patience_seconds=ANSWER_SECONDS)
    except queue.ClusterUnreachable:
        return False


def is_being_ended(job: str) -> bool:
    """By the cluster, which needs no request of ours; a cluster that does not answer may have to be asked."""
    try:
        return queue.job_is_being_ended(job, patience_seconds=ANSWER_SECONDS)
    except queue.ClusterUnreachable:
        return False


def how_far(folder: Path) -> str:
    """A word for what the folder holds that was hard to make: it changes when a run makes progress."""
    checkpoints = sorted(path.stem for path in folder.glob("checkpoints/step-*.s*"))  # .safetensors, .sharded
    num_curve, num_parts = len(read_json(folder / "curve.json", list)), len(list(folder.glob("parts/*/*.safetensors")))
    made = {"curve": num_curve, "samples": num_parts, "scores": len(read_json(folder / "eval.json", list))}
    return " ".join([*checkpoints[-1:], *(f"{what}-{count}" for what, count in made.items() if count)])


def forget_restarts(work: Work) -> None:
    """Someone has looked at it, and wants it started again."""
    (work.folder / RESTARTS).unlink(missing_ok=True)
