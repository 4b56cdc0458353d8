"""What do the tests of leases share? A lease whose holder is no more, and looks at what is there.

`folder` and `outside_slurm` are fixtures, offered to all tests by conftest.py.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import lease

ROOT = Path(__file__).parent.parent
BUSY = "is being worked on by another process"
FOREIGN = {"host": "n4", "boot_id": "boot of n4", "node": "n4"}
PATIENCE_SECONDS = 600.0  # for what takes a second on an idle machine
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")


@pytest.fixture
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these tests are a job themselves, they do not know."""
    for name in (*SLURM, "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that nobody has begun."""
    return tmp_path / "runs" / "abc"


def leave_behind(folder: Path, seconds_ago: float = 5, **changes: Any) -> str:
    """The lease of a process that is no more; its token."""
    holder = replace(lease.this_process(), **{"flock": True, **changes})
    path = folder / "lease" / f"{holder.token}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in asdict(holder).items() if key not in lease.SEEN}))
    renewed = path.stat().st_mtime - seconds_ago
    os.utime(path, (renewed, renewed))
    return holder.token


def token_of(folder: Path) -> str:
    (path,) = (folder / "lease").iterdir()
    return path.stem


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.01)


def wait_until_renewed(path: Path, times: int = 1) -> None:
    """That often since this was called. The first time may have begun before, and the last may not be over."""
    for _ in range(times):
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
