"""What do the tests of sweeps on a real cluster share? Tiny suites, sweeps as processes, and undisturbed runs to compare with.

`tiny_suite` (a fixture, offered to all tests by conftest.py) is a suite file, a profile and a folder of runs, to be swept on
the cluster. Nothing here looks into logs: states come from `Sweep.statuses`, attempts from the accounting and the run folders.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import Attempt, assert_apart, attempts_in, attempts_of_works
from command import tsbench
from omegaconf import OmegaConf
from same_runs import assert_nothing_half_written, assert_same_bytes
from slurm_cluster import PATIENCE_SECONDS, Cluster, wait_until
from training import start_command

from bench.files import read_json
from bench.runs import read_run
from bench.sweeps import make_sweep
from slurm.profile import FOLDER
from slurm.states import Known, Status
from slurm.sweep import Sweep

LOOK_SECONDS = 0.5  # between two looks at all runs and the queue: more often, the jobs wait for who looks
BASE = {
    "model": {"depth": 1, "width": 16, "num_heads": 2},
    "train": {"batch_size": 8, "ema_half_life_images": 300},
    "budget": {"unit": "images", "amount": 800},
    "heldout": {"bins": 6, "images_per_bin": 3, "points": 4},
    "evaluation": {"num_samples": 20, "steps": "3", "block_size": 10, "kid_subset_size": 10, "curve_every": 2},
    "system": {"log_every": 5},
}
"""100 steps: over within a second of training."""
LONG = {
    "budget": {"unit": "images", "amount": 12_000},
    "heldout": {"points": 2},
    "evaluation": {"curve_every": 0},
    "system": {"log_every": 10, "checkpoint_every": 100},
}
"""1500 steps: some ten seconds of training, in the midst of which something can happen. For `write`."""
MIDDLE = {
    "budget": {"unit": "images", "amount": 4_000},
    "heldout": {"points": 2},
    "evaluation": {"curve_every": 0},
    "system": {"checkpoint_every": 50},
}
"""500 steps: three or four seconds of training. For `write`."""
QUICK = {"heldout": {"points": 2}, "evaluation": {"curve_every": 0}}
"""BASE without its curves: nothing has to happen while it trains. For `write`."""
SIX = (
    {"method": "dense"},
    {"method": "multi_expert", "options": {"experts": 3}},
    {"method": "dtr"},
    {"method": "switch_dit"},
    {"method": "dit_moe"},
    {"method": "remix_dit", "options": {"bases": 2, "experts": 4}},
)
REMIX = SIX[-1]


@dataclass(frozen=True)
class TinySuite:
    """A suite to sweep: `suite.yaml`, `profile.yaml` and `results/runs` in one folder."""

    cluster: Cluster
    folder: Path
    undisturbed_runs: Path  # of the whole session: each is trained once
    started: list[BaseProcess] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.folder / "results" / "runs"

    @property
    def suite(self) -> str:
        return str(self.folder / "suite.yaml")

    def write(self, *methods: dict[str, Any], grid: dict[str, Any] | None = None, **base: Any) -> None:
        """The suite's file: these entries, and settings on top of BASE (`write(REMIX, **LONG)`)."""
        tree = {"base": OmegaConf.to_container(OmegaConf.merge(BASE, base)), "grid": grid or {}, "methods": list(methods)}
        Path(self.suite).write_text(yaml.safe_dump(tree))

    def write_profile(self, **settings: Any) -> None:
        """The profile `local`, changed."""
        local = yaml.safe_load((FOLDER / "local.yaml").read_text())
        (self.folder / "profile.yaml").write_text(yaml.safe_dump({**local, **settings}))

    def command(self, *options: str) -> list[str]:
        python = [sys.executable, "-m", "bench", "sweep", self.suite, "--cluster", "slurm"]
        return [*python, "--profile", str(self.folder / "profile.yaml"), "--runs", str(self.runs), *options]

    def start(self, *options: str, **environment: str) -> BaseProcess:
        """`tsbench sweep` as a process, which has loaded its modules already: to be waited for, or killed."""
        settings = self.cluster.environment | environment
        process = start_command(*self.command(*options)[3:], environment=settings, folder=self.folder)
        self.started.append(process)
        return process

    def leave(self) -> None:
        """End the processes and jobs that are left, as they may be when a test fails."""
        for process in self.started:
            process.kill()
            process.join()
        if jobs := self.cluster.run("squeue", "--noheader", "--format=%A").split():
            self.cluster.run("scancel", *sorted(set(jobs)))
        wait_until(self.queue_is_empty, "the queue is empty after a test")

    def sweep(self, *options: str, code: int = 0) -> str:
        """`tsbench sweep` in this process, which saves the seconds that Python needs to load; what it prints, errors last."""
        outcome = tsbench(*self.command(*options)[3:])
        assert outcome.code == code, outcome.err
        return outcome.out + outcome.err

    def make_sweep(self) -> Sweep:
        return make_sweep(self.suite, [], self.runs)[1]

    def look(self) -> tuple[dict[str, Status], Known]:
        """What `tsbench status` knows."""
        return self.make_sweep().statuses()

    def statuses(self) -> dict[str, Status]:
        return self.look()[0]

    def states(self) -> list[str]:
        """In the suite's order."""
        return [status.state for status in self.statuses().values()]

    def jobs(self) -> list[str]:
        """That wait or run now, in the suite's order."""
        return [job for status in self.statuses().values() for job in status.jobs]

    def status(self) -> Status:
        """Of the only run."""
        (status,) = self.statuses().values()
        return status

    def run_folders(self) -> list[Path]:
        """In the suite's order."""
        return [item.folder for item in self.make_sweep().items]

    def run_folder(self) -> Path:
        """Of the only run."""
        (folder,) = self.run_folders()
        return folder

    def wait_for(self, *states: str, seconds: float = PATIENCE_SECONDS) -> dict[str, Status]:
        """Until the runs have these states, in order; a single one is meant of all."""
        sweep, deadline = self.make_sweep(), time.monotonic() + seconds
        wanted = [*states] if len(states) > 1 else [*states] * len(sweep.items)
        while True:
            statuses, _ = sweep.statuses()
            if [status.state for status in statuses.values()] == wanted:
                return statuses
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {', '.join(wanted)} within {seconds:g} s, but {statuses}")
            time.sleep(LOOK_SECONDS)

    def wait_for_images(self, num_images: float, place: Path | None = None) -> None:
        """Until the only run, or what works in that folder, has seen that many, as its heartbeat says."""
        place = place or self.run_folder()
        wait_until(lambda: images_seen(place) >= num_images, f"{num_images} images seen in {place}", PATIENCE_SECONDS)

    def attempts(self) -> list[Attempt]:
        """All starts of all jobs that were ever submitted for this suite, in the order of their jobs and times."""
        return attempts_in(self.cluster, self.folder)

    def job_states(self) -> list[str]:
        return [attempt.state for attempt in self.attempts()]

    def assert_ended(self, *states: str) -> list[Attempt]:
        """The accounting, which may lag behind, has these attempts in the end; they are returned."""
        wait_until(lambda: self.job_states() == [*states], f"attempts {states}", PATIENCE_SECONDS)
        return self.attempts()

    def queue_is_empty(self) -> bool:
        return not self.cluster.run("squeue", "--noheader").strip()

    def undisturbed(self) -> list[Path]:
        """The same runs, made in this process without a disturbance (once in a session); in the suite's order."""
        outcome = tsbench("sweep", self.suite, "--cluster", "inline", "--runs", self.undisturbed_runs)
        assert outcome.code == 0, outcome.err
        return [self.undisturbed_runs / folder.name for folder in self.run_folders()]

    def assert_as_undisturbed(self) -> None:
        """Every run is done and has the bytes that it would have had without a disturbance."""
        for folder, undisturbed in zip(self.run_folders(), self.undisturbed(), strict=True):
            assert_same_bytes(folder, undisturbed)
            assert_nothing_half_written(folder)

    def assert_one_at_a_time(self) -> None:
        """No two jobs had one run (or expert) at the same time, also those that were killed before they saved anything."""
        wait_until(lambda: all(each.ended < inf for each in self.attempts()), "all attempts are over", PATIENCE_SECONDS)
        of_works = attempts_of_works(self.attempts(), self.folder / "results" / "jobs" / "suite")
        known = {attempt.job for each in of_works.values() for attempt in each}
        assert {job_of(session) for folder in self.run_folders() for session in sessions(folder)} <= known
        assert_apart(of_works)


@pytest.fixture(scope="session")
def undisturbed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "runs"


@pytest.fixture
def tiny_suite(cluster: Cluster, undisturbed_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinySuite]:
    """In a folder of its own, with the profile `local`. Its jobs are off the cluster when the test ends, also by a failure."""
    suite = suite_on(cluster, tmp_path, undisturbed_runs, monkeypatch)
    yield suite
    suite.leave()


def suite_on(cluster: Cluster, folder: Path, undisturbed_runs: Path, monkeypatch: pytest.MonkeyPatch) -> TinySuite:
    """In a folder, with the profile `local`; this process talks to that cluster, too."""
    for name in os.environ.keys() - cluster.environment.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr("slurm.sweep.POLL_SECONDS", 1.0)
    monkeypatch.chdir(folder)  # by which the accounting tells jobs of this suite from others
    suite = TinySuite(cluster, folder, undisturbed_runs)
    suite.write_profile()
    return suite


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Of a run's provenance: one for each process (or job) whose work its checkpoints hold."""
    found: list[dict[str, Any]] = read_run(folder).provenance["sessions"]
    return found


def job_of(session: dict[str, Any]) -> str:
    """As the accounting names it."""
    slurm = session["slurm"]
    return f"{slurm['array_job_id']}_{slurm['array_task_id']}" if slurm["array_job_id"] else slurm["job_id"]


def tasks_of(job: str) -> list[int]:
    """Process ids of the Python processes that do the work of a job (on this machine, as are all nodes), by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (line.partition("=") for line in (process / "environ").read_bytes().decode(errors="replace").split("\0"))
            name, environment = (process / "comm").read_text(), {key: value for key, _, value in pairs}
        except OSError:  # it ended meanwhile
            continue
        array = environment.get("SLURM_ARRAY_JOB_ID")
        own = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else environment.get("SLURM_JOB_ID")
        if own == job and "SLURM_PROCID" in environment and name.startswith("python"):
            found[int(environment["SLURM_PROCID"]), int(process.name)] = int(process.name)
    return [pid for _, pid in sorted(found.items())]


def images_seen(place: Path) -> int:
    """By the run, or the expert, that works in this folder, as its heartbeat says; 0 before the first."""
    return int(read_json(place / "progress.json", dict).get("images_seen", 0))
