"""How do tests get a real Slurm? A local cluster, started once per session and taken down also after a failure.

`cluster` (a fixture, offered to all tests by conftest.py) is the cluster that SLURM_CONF names if that is a local one, as
in CI (only the first of pytest's workers takes it); otherwise a new one in a temporary folder on free ports, so that workers
and the user's own do not meet.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "slurm" / "local_cluster.sh"
MARK = ".tsbench-local-cluster"  # what the script leaves in the folders that are its own
MACHINE_LACKS_SOMETHING = 3  # the script's exit status
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 600.0  # for what takes seconds on an idle machine


def run_script(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """local_cluster.sh with these arguments, and with its settings (CLUSTER_NODES="2") in the environment; never raises."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Poll until the condition holds; TimeoutError, saying `what` did not happen, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Cluster:
    """A local cluster in a folder: its commands, and what tests ask of it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this cluster; nothing of another cluster's, nor of a job around the tests."""
        others = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def script(self, *arguments: str, **settings: str) -> str:
        """`local_cluster.sh ARGUMENTS FOLDER`; what it prints. RuntimeError with its sentence if it fails."""
        done = run_script(*arguments, str(self.folder), **settings)
        if done.returncode == MACHINE_LACKS_SOMETHING:
            pytest.skip(f"{done.stderr.strip()}; then `pytest -m slurm`")
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return done.stdout

    def up(self, **settings: str) -> str:
        """Start the cluster, or what is missing of it; the line to export."""
        return self.script("up", **settings)

    def stop(self, name: str) -> None:
        """End one daemon, or a node (n2) with everything that runs on it, as if its power failed."""
        self.script("stop", name)

    def down(self) -> None:
        self.script("down")

    def run(self, *command: str) -> str:
        """A command on this cluster; its output. RuntimeError with its stderr if it fails."""
        done = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """Submit a shell script with sbatch's options; the job's id. Its output goes to the cluster's folder."""
        output = f"--output={self.folder}/log/job.%j.out"
        return self.run("sbatch", "--parsable", "--mem=100", output, *options, "--wrap", script).strip()

    def accounting(self, job: str) -> list[tuple[str, str, str]]:
        """What sacct says: (job id, state, trackable resources) of every element and every attempt, steps left out."""
        fields = "--format=jobid,state,alloctres"
        lines = self.run("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", fields, "--jobs", job)
        return [(line.split("|")[0], line.split("|")[1], line.split("|")[2]) for line in lines.splitlines()]

    def states(self, job: str) -> list[str]:
        return [state for _, state, _ in self.accounting(job)]

    def wait_for_states(self, job: str, states: list[str]) -> None:
        """Until the accounting has exactly these states for the job's elements and attempts, in order."""
        wait_until(lambda: self.states(job) == states, f"job {job} has states {states}")


def stand_in(folder: Path, command: str, script: str) -> dict[str, str]:
    """An environment in which `command` is this shell script; `{real}` in it is the real one, `{folder}` the folder."""
    real, place = shutil.which(command), folder / "stand_in"
    assert real is not None
    place.mkdir(exist_ok=True)
    (place / command).write_text("#!/bin/sh\n" + script.format(real=real, folder=folder))
    (place / command).chmod(0o755)
    return {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}


def free_ports() -> int:
    """The first of a hundred ports of which those are free that a cluster of four nodes uses."""
    hundreds = range(180, 320)  # below the ports that the kernel gives to clients
    start = os.getpid() % len(hundreds)
    for hundred in [*hundreds[start:], *hundreds[:start]]:
        if not any(in_use(100 * hundred + offset) for offset in (1, 3, 5, 11, 12, 13, 14)):
            return 100 * hundred
    raise RuntimeError("no hundred of free ports between 18000 and 32000: end the clusters that still run")


def in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def temporary_cluster(**settings: str) -> Iterator[Cluster]:
    """A new cluster in a temporary folder on free ports; ended, with all its jobs, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="tsbench-") as parent:
        cluster = Cluster(Path(parent) / "slurm")
        try:
            cluster.up(**{"CLUSTER_PORT": str(free_ports())} | settings)
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes, two pretended GPUs each. Tests leave it as they found it: all daemons running, no jobs."""
    present = Path(os.environ.get("SLURM_CONF", "/nowhere/slurm.conf")).parent
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"  # they stop daemons: no two workers share a cluster
    if is_first and (present / MARK).exists():
        yield Cluster(present)
    else:
        with temporary_cluster() as started:
            yield started
