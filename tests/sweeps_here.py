"""What do the tests of sweeps without a cluster share? Small suites, swept in this process, and ways to look at what came of it.

`no_slurm` and `swept` are fixtures, offered to all tests by conftest.py.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import TINY, Outcome, tsbench
from omegaconf import OmegaConf

from bench.files import read_json, write_json_atomically

BASE = OmegaConf.to_container(OmegaConf.from_dotlist(TINY))
TWO = ({"method": "dense", "label": "Dense"}, {"method": "dtr", "label": "Masked"})
DIVERGES = {"method": "dense", "label": "Too fast", "train": {"lr": 1e30}}


@pytest.fixture
def no_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose PATH has git, and none of Slurm's commands."""
    commands = tmp_path_factory.mktemp("bin")
    (commands / "git").symlink_to(shutil.which("git") or "git")
    monkeypatch.setenv("PATH", str(commands))


def write_suite(folder: Path, *methods: dict[str, Any], name: str = "suite", **others: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "methods": list(methods), **others}))
    return path


def sweep(suite: Path | str, runs: Path, *options: object, cluster: str = "inline") -> Outcome:
    return tsbench("sweep", suite, "--cluster", cluster, "--runs", runs, *options)


def folders(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob("*/config.yaml"))


def row_of(outcome: Outcome, folder: Path) -> str:
    """Of the table of runs, without its id."""
    (row,) = [line for line in outcome.out.splitlines() if line.startswith(f"{folder.name}  ")]
    return row.removeprefix(folder.name).strip()


def made(runs: Path) -> dict[str, int]:
    """When each file of each run was written."""
    return {str(path): path.stat().st_mtime_ns for folder in folders(runs) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of two runs, both done; to be copied."""
    folder = tmp_path_factory.mktemp("swept")
    outcome = sweep(write_suite(folder, *TWO), folder / "results" / "runs")
    assert outcome.code == 0, outcome
    assert "2 done\n" in outcome.out and not outcome.err
    return folder


@pytest.fixture
def swept(swept_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept_once, tmp_path / "swept"))


FILE, OTHER_CODE = "bench/trainer.py", "0" * 12


def make_stale(folder: Path) -> None:
    provenance = read_json(folder / "provenance.json", dict)
    provenance["code_files"][FILE] = OTHER_CODE
    write_json_atomically(folder / "provenance.json", provenance)


def hold_elsewhere(folder: Path) -> None:
    (folder / "lease").mkdir()
    holder = {"token": "t", "host": "elsewhere", "boot_id": "b", "node": "elsewhere", "pid": 1, "cluster": "", "job": ""}
    write_json_atomically(folder / "lease" / "t.json", {**holder, "num_restarts": 0, "flock": False, "taken": "2030-01-01"})
    os.utime(folder / "lease" / "t.json", (time.time() + 3600,) * 2)  # it does not expire while a slow machine looks at it
