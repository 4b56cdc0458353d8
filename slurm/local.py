"""How are several runs trained side by side on this machine?

One process per run, so that each keeps its number of threads: several many-threaded trainers beside each other slow
each other down many times over. The longest start first. Progress comes from the run folders, never from log text.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.files import read_json, read_text
from bench.runs import read_run

POLL_SECONDS = 0.5


@dataclass
class Job:
    """One run folder that holds a configuration, and the process that works on it."""

    folder: Path
    label: str
    threads: int
    cost: float = 0.0  # any unit; larger ones start first
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with open(self.folder / "log.txt", "ab") as log:
            command = [sys.executable, "-m", "bench", "train", str(self.folder)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def finished(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def progress(self) -> dict[str, Any]:
        """The run's heartbeat; empty before the first."""
        progress: dict[str, Any] = read_json(self.folder / "progress.json", dict)
        return progress

    def failure(self) -> str:
        """One sentence on why a finished process left no `done`; empty if it did."""
        if (self.folder / "done").exists():
            return ""
        cause = read_run(self.folder).failure
        if cause:
            return cause
        code = self.process.returncode if self.process else None
        if code is not None and code < 0:
            return f"its process was ended by signal {-code}"
        lines = read_text(self.folder / "log.txt").strip().splitlines()
        return lines[-1] if lines else f"its process ended with code {code}"


def run_side_by_side(jobs: list[Job], workers: int, watch: Callable[[list[Job]], None]) -> dict[str, str]:
    """Run all jobs, at most `workers` at a time; run folder's name -> cause for those that failed.

    One that fails does not stop the others. On an interrupt the processes are ended, and wait to be resumed.
    """
    waiting = sorted(jobs, key=lambda job: -job.cost)
    try:
        while waiting or any(job.running for job in jobs):
            while waiting and sum(job.running for job in jobs) < workers:
                waiting.pop(0).start()
            watch(jobs)
            time.sleep(POLL_SECONDS)
        watch(jobs)
    finally:
        left = [job.process for job in jobs if job.running and job.process is not None]
        for process in left:
            process.terminate()
        for process in left:
            process.wait()
    return {job.folder.name: cause for job in jobs if (cause := job.failure())}
