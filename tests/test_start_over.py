"""Does a stale run start over only where no job of the code that made it can come later, and share the new folder?"""

import time
from dataclasses import asdict
from pathlib import Path

import pytest
from command import assert_refused, tsbench
from sweeps_here import folders, make_stale, sweep

from bench.files import write_json_atomically
from bench.sweeps import make_sweep
from slurm import sweep as module
from slurm.claims import Claim
from slurm.queue import LiveJob
from slurm.states import Known

pytestmark = pytest.mark.usefixtures("no_slurm")


@pytest.fixture
def runs(swept: Path) -> Path:
    """Two, both made by other code; the first was given to job 12."""
    place = swept / "results" / "runs"
    for folder in folders(place):
        make_stale(folder)
    claim = Claim("tsbench-1", 0, "login1", 1, time.time(), "12", str(swept))
    write_json_atomically(folders(place)[0] / "job.json", asdict(claim))
    return place


@pytest.mark.parametrize("cluster", ["inline", "local", "slurm"])
def test_not_while_its_job_cannot_be_seen(cluster: str, runs: Path) -> None:
    """The cluster may answer again when the new run is submitted, and have the job of the old one."""
    suite, (given, other) = runs.parents[1] / "suite.yaml", folders(runs)
    words = (f"{given.name} cannot start over", "may still be queued", "no cluster can be asked", "delete job.json")
    for only in ("stale", given.name):
        assert_refused(sweep(suite, runs, "--only", only, cluster=cluster), *words)
    assert folders(runs) == [given, other] and not (runs / "set_aside").exists()
    assert sweep(suite, runs, "--only", "stale", "--dry-run", cluster=cluster).code == 0


def test_what_no_job_was_given_starts_over_without_a_cluster(runs: Path) -> None:
    suite, (given, other) = runs.parents[1] / "suite.yaml", folders(runs)
    assert sweep(suite, runs, "--only", other.name).code == 0
    (given / "job.json").unlink()
    assert sweep(suite, runs, "--only", "stale").code == 0
    assert len([*(runs / "set_aside").iterdir()]) == 2
    assert tsbench("status", suite, "--runs", runs).out.startswith("2 done\n")


def test_a_done_run_whose_job_waits_does_not(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was to be scored once more; as long as the job lives, it has the run."""
    job = LiveJob("12", "tsbench-1", "PENDING", "Resources", "", None, None, 0)
    monkeypatch.setattr(module, "ask_cluster", lambda works: Known({"12": job}, {}))
    _, suite_sweep = make_sweep(str(runs.parents[1] / "suite.yaml"), [], runs)
    statuses, _ = suite_sweep.statuses()
    assert [statuses[folder.name].state for folder in folders(runs)] == ["queued", "stale"]
    assert [item.folder for item in suite_sweep.choose(statuses, ["stale"]).start] == folders(runs)[1:]
