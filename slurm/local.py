"""How are several runs trained side by side on this machine?

One process per run, so that each keeps its number of threads: several many-threaded trainers beside each other slow
each other down many times over. The longest start first. Progress comes from the run folders, never from log text.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import lease
from bench.files import read_json, read_text
from bench.runs import expert_folder, read_run

POLL_SECONDS = 0.5


@dataclass
class Job:
    """One run folder that holds a configuration, and the process that works on it."""

    folder: Path
    label: str
    threads: int
    cost: float = 0.0  # any unit; larger ones start first
    expert: int | None = None  # of the run, if its experts train in jobs of their own
    snapshot: Path | None = None  # folder of the code to run; this code by default
    after: Path | None = None  # folder of a run that has to be done before
    share: float = 1.0  # of the run's budget that is this process's
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        safe = []
        if self.snapshot is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.snapshot), os.environ.get("PYTHONPATH"))))
            safe = ["-P"]  # or the code in the current folder would come first
        with open(self.folder / "log.txt", "ab") as log:
            command = [sys.executable, *safe, "-m", "bench", "train", str(self.folder)]
            command += [] if self.expert is None else ["--expert", str(self.expert)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    @property
    def name(self) -> str:
        return self.folder.name if self.expert is None else f"{self.folder.name}:{self.expert}"

    @property
    def place(self) -> Path:
        """The folder that it works in."""
        return self.folder if self.expert is None else expert_folder(self.folder, self.expert)

    @property
    def may_start(self) -> bool:
        return self.after is None or (self.after / "done").exists()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def finished(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def progress(self) -> dict[str, Any]:
        """The run's heartbeat; empty before the first."""
        progress: dict[str, Any] = read_json(self.place / "progress.json", dict)
        return progress

    def failure(self) -> str:
        """One sentence on why a finished process has not done its work; empty if it has."""
        code = None if self.process is None else self.process.returncode
        if self.expert is not None and code == 0 and (self.place / "done").exists():
            return ""  # the job of another expert puts the run together
        if cause := read_run(self.folder).failure:
            return cause
        if (self.folder / "done").exists():
            return ""
        if self.process is None:
            return f"it starts from {self.after.name}, which is not done" if self.after else "it was not started"
        if code is not None and code < 0:
            return f"its process was ended by signal {-code}"
        lines = read_text(self.folder / "log.txt").strip().splitlines()
        return lines[-1] if lines else f"its process ended with code {code}"


def run_side_by_side(jobs: list[Job], workers: int, watch: Callable[[list[Job]], None]) -> dict[str, str]:
    """Run all jobs, at most `workers` at a time; name -> cause for those that failed.

    One that fails does not stop the others. On an interrupt the processes are ended, and wait to be resumed.
    """
    waiting = sorted(jobs, key=lambda job: -job.cost)
    try:
        while waiting or any(job.running for job in jobs):
            able = [job for job in waiting if job.may_start]
            for job in able[: workers - sum(job.running for job in jobs)]:
                waiting.remove(job)
                job.start()
            watch(jobs)
            if not any(job.running for job in jobs) and not any(job.may_start for job in waiting):
                break  # what is left waits for runs that failed
            time.sleep(POLL_SECONDS)
        watch(jobs)
    finally:
        left = [job.process for job in jobs if job.running and job.process is not None]
        for process in left:
            process.terminate()
        for process in left:
            process.wait()
    return {job.name: cause for job in jobs if (cause := job.failure())}


def end_process(folder: Path) -> bool:
    """Ask the process on this machine that works on a run folder, if there is one, to save and end; whether there was one."""
    holder = lease.read(folder)
    if holder is None or holder.job or holder.machine != lease.this_machine() or not holder.flock:
        return False  # nobody, a job of the cluster's, or one that cannot be told from here
    os.kill(holder.pid, signal.SIGTERM)
    return True
