"""What do the tests of states share? A run that has been claimed, and what the cluster says of its job."""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.files import write_json_atomically
from bench.runs import Run
from slurm import states
from slurm.accounting import EndedJob
from slurm.claims import Claim, Work
from slurm.queue import LiveJob
from slurm.states import Known, Status, status_of

BUDGET = {"unit": "images", "amount": 1000}
JOB = "12_3"
ENDED = EndedJob(JOB, "tsbench-1", "FAILED", None, 1, 0, "n1", 100.0, 160.0, 60.0, 20, 10**9)


def live(state: str, reason: str = "", name: str = "tsbench-1") -> dict[str, LiveJob]:
    return {JOB: LiveJob(JOB, name, state, reason, "n1", None, None, 0)}


def ended(state: str, **changes: Any) -> dict[str, EndedJob]:
    return {JOB: replace(ENDED, state=state, **changes)}


def claimed_run(root: Path) -> Path:
    """The folder of one that has been prepared and claimed."""
    path = root / "runs" / "dense-0123456789"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{method: dense, seed: 0, budget: {}, diffusion: {}}\n")
    claim(path)
    return path


def claim(place: Path, **changes: Any) -> None:
    record = asdict(Claim("tsbench-1", 3, "login1", os.getpid(), time.time(), JOB, str(place), ""))
    write_json_atomically(place / "job.json", {**record, **changes})


def no_difference(run: Run) -> list[str]:
    return []


def status(folder: Path, known: Known = states.NOTHING, difference: states.CodeDifference = no_difference, **more: Any) -> Status:
    return status_of([Work(folder, folder)], known, difference, BUDGET, **more)
