"""Does a sweep on a real cluster lose or mislabel nothing when nodes, memory, daemons or disks fail under it?"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

import pytest
from slurm_cluster import Cluster, stand_in, temporary_cluster, wait_until
from sweeping import MIDDLE, PATIENCE_SECONDS, REMIX, TinySuite, images_seen, sessions, suite_on, tasks_of
from training import exit_codes_of

from bench import checkpoint
from bench.files import read_json
from bench.runs import read_run

pytestmark = pytest.mark.slurm

BEGUN = 800  # images: well inside of what MIDDLE trains


def wait_for_attempts(suite: TinySuite, *states: str) -> None:
    """Until the accounting has these, in any order, with their ends: it may lag behind."""

    def are_over() -> bool:
        attempts = suite.attempts()
        return sorted(each.state for each in attempts) == sorted(states) and all(each.ended < inf for each in attempts)

    try:
        wait_until(are_over, f"attempts {states}", PATIENCE_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{error}, but {suite.attempts()}") from None


@contextmanager
def without(cluster: Cluster, daemon: str) -> Iterator[None]:
    """A daemon is down until the block ends."""
    cluster.stop(daemon)
    try:
        yield
    finally:
        cluster.up()


def kill(suite: TinySuite, place: Path | None = None) -> None:
    """The Python process of a run's job, as the kernel or an operator might."""
    folder = place or suite.run_folder()
    os.kill(*tasks_of(read_json(folder / "job.json", dict)["job"]), signal.SIGKILL)


def steps_saved(folder: Path) -> int:
    found = checkpoint.load_latest(folder / "checkpoints")
    return found.counters["steps_done"] if found else 0


def test_a_node_is_lost_and_returns(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, **MIDDLE)
    tiny_suite.write_profile(additional={"nodelist": "n2"})
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN)
    folder = tiny_suite.run_folder()
    with without(tiny_suite.cluster, "n2"):
        undone = images_seen(folder) - 8 * steps_saved(folder)
    status = tiny_suite.wait_for("queued")[folder.name]
    assert status.detail.endswith(f"goes on from {status.fraction:.0%}")
    tiny_suite.wait_for("done")
    wait_for_attempts(tiny_suite, "NODE_FAIL", "COMPLETED")
    assert {attempt.job for attempt in tiny_suite.attempts()} == {*status.jobs}
    assert [session["slurm"]["restart_count"] for session in sessions(folder)] == [None, "1"]
    assert read_run(folder).summary["lost_images"] == undone
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


def test_only_the_job_that_is_warned_starts_again(tiny_suite: TinySuite) -> None:
    """Of an array: its last element has the array's own number."""
    tiny_suite.write(REMIX, grid={"seed": [0, 1]}, **MIDDLE)
    tiny_suite.sweep()
    jobs = tiny_suite.jobs()
    for folder in tiny_suite.run_folders():
        tiny_suite.wait_for_images(BEGUN, folder)
    os.kill(*tasks_of(jobs[-1]), signal.SIGUSR2)
    tiny_suite.wait_for("done")
    wait_for_attempts(tiny_suite, "COMPLETED", "REQUEUED", "COMPLETED")
    assert [attempt.job for attempt in tiny_suite.attempts() if attempt.state == "REQUEUED"] == jobs[-1:]
    tiny_suite.assert_as_undisturbed()


def test_too_little_memory_is_told_and_not_tried_again_unasked(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, **MIDDLE)
    tiny_suite.write_profile(memory_gb=0.2)
    tiny_suite.sweep()
    tiny_suite.wait_for("failed")
    assert tiny_suite.status().kind == "memory"
    told = " of 205 MB): raise memory_gb in the profile"  # the accounting may have the figures later than the end
    wait_until(lambda: told in tiny_suite.status().detail, "the figures", PATIENCE_SECONDS)
    tiny_suite.write_profile()
    tiny_suite.sweep()
    assert tiny_suite.queue_is_empty() and len(tiny_suite.attempts()) == 1
    tiny_suite.sweep("--only", "failed")
    tiny_suite.wait_for("done")
    wait_for_attempts(tiny_suite, "FAILED", "COMPLETED")
    tiny_suite.assert_as_undisturbed()


def test_the_controller_restarts_while_a_sweep_waits(tiny_suite: TinySuite) -> None:
    """The run comes to its end meanwhile, and the sweep asks a controller that is not there."""
    tiny_suite.write(REMIX, **MIDDLE)
    asking = stand_in(tiny_suite.folder, "scontrol", 'echo "$1" >> {folder}/asked; exec {real} "$@"')
    waiting = tiny_suite.start("--wait", **asking)
    tiny_suite.wait_for_images(BEGUN)
    asked = tiny_suite.folder / "asked"
    with without(tiny_suite.cluster, "slurmctld"):
        before = asked.stat().st_size
        wait_until(lambda: asked.stat().st_size > before, "the sweep asks")
        wait_until((tiny_suite.run_folder() / "done").exists, "the run ends", PATIENCE_SECONDS)
        assert waiting.is_alive()
    assert exit_codes_of([waiting], PATIENCE_SECONDS) == [0]
    wait_for_attempts(tiny_suite, "COMPLETED")
    tiny_suite.assert_as_undisturbed()


@pytest.mark.slow
def test_the_controller_is_down_when_a_sweep_submits_again(tiny_suite: TinySuite) -> None:
    """The second submission begins while the controller is there, and meets none; it is made once more."""
    tiny_suite.write(REMIX, **MIDDLE)
    script = """echo >> {folder}/calls
[ $(wc -l < {folder}/calls) -ne 2 ] || while [ ! -e {folder}/down ]; do sleep 0.1; done
{real} "$@"; code=$?; echo $code >> {folder}/codes; exit $code
"""
    waiting = tiny_suite.start("--wait", **stand_in(tiny_suite.folder, "sbatch", script))
    tiny_suite.wait_for_images(BEGUN)
    kill(tiny_suite)
    wait_until(lambda: lines_of(tiny_suite, "calls") == 2, "the sweep submits again", PATIENCE_SECONDS)
    with without(tiny_suite.cluster, "slurmctld"):
        (tiny_suite.folder / "down").touch()
        wait_until(lambda: lines_of(tiny_suite, "codes") == 2, "its submission fails", PATIENCE_SECONDS)
    assert exit_codes_of([waiting], PATIENCE_SECONDS) == [0]
    assert (tiny_suite.folder / "codes").read_text().split() == ["0", "1", "0"]
    wait_for_attempts(tiny_suite, "FAILED", "COMPLETED")
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


def lines_of(suite: TinySuite, name: str) -> int:
    return (suite.folder / name).read_text().count("\n")


@pytest.mark.slow
def test_the_accounting_is_down_while_a_sweep_waits(tiny_suite: TinySuite) -> None:
    """One run ends well, one is killed: the controller still knows how, and it is started again."""
    tiny_suite.write(REMIX, grid={"seed": [0, 1]}, **MIDDLE)
    tiny_suite.sweep()
    _, killed = tiny_suite.run_folders()
    with without(tiny_suite.cluster, "slurmdbd"):
        tiny_suite.wait_for_images(BEGUN, killed)
        kill(tiny_suite, killed)
        assert tiny_suite.wait_for("done", "failed")[killed.name].kind == "killed"
        assert tiny_suite.look()[1].warning.startswith("the accounting does not answer")
        assert "warning: the accounting does not answer" in tiny_suite.sweep("--wait")
        assert tiny_suite.states() == ["done", "done"]
    wait_for_attempts(tiny_suite, "COMPLETED", "FAILED", "COMPLETED")
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: run as root")
def test_the_disk_is_full_while_a_run_saves(undisturbed_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "results" / "runs") as disk, temporary_cluster(CLUSTER_NODES="1") as cluster:
        suite = suite_on(cluster, tmp_path, undisturbed_runs, monkeypatch)
        suite.write(REMIX, **MIDDLE)
        suite.sweep()
        suite.wait_for_images(BEGUN)
        fill(disk / "other_files")
        status = suite.wait_for("failed")[suite.run_folder().name]
        assert status.kind == "code" and "No space left on device" in status.detail
        steps = steps_saved(suite.run_folder())
        assert BEGUN // 16 <= steps < 500
        suite.sweep()
        assert suite.queue_is_empty()
        (disk / "other_files").unlink()
        suite.sweep("--only", "failed")
        suite.wait_for("done")
        wait_for_attempts(suite, "FAILED", "COMPLETED")
        assert 0 <= read_run(suite.run_folder()).summary["lost_images"] <= 8 * 50
        suite.assert_as_undisturbed()


@contextmanager
def small_disk(place: Path, megabytes: int = 16) -> Iterator[Path]:
    """Mounted there until the block ends. Nodes that start later see it, too."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_the_restart_limit_counts_only_starts_without_progress(tiny_suite: TinySuite) -> None:
    """Two runs are killed again and again: one before it saves anything, the other after each of its checkpoints."""
    often = {**REMIX, "system": {"checkpoint_every": 20}}
    tiny_suite.write({"method": "dense", "system": {"checkpoint_every": 0}}, often, **MIDDLE)
    tiny_suite.write_profile(restarts_without_progress=1)
    stuck, getting_on = tiny_suite.run_folders()
    for num_starts in (1, 2, 3):
        before = steps_saved(getting_on)
        tiny_suite.sweep()
        wait_until(lambda n=num_starts: starts_in_vain(stuck) == n, f"start {num_starts}", PATIENCE_SECONDS)
        if num_starts <= 2:
            kill(tiny_suite, stuck)
        wait_until(lambda steps=before: steps_saved(getting_on) > steps, "progress", PATIENCE_SECONDS)
        kill(tiny_suite, getting_on)
        tiny_suite.wait_for("failed")
    status = tiny_suite.statuses()[stuck.name]
    assert status.kind == "code" and status.detail.startswith("started 2 times in a row without getting further than its start")
    tiny_suite.sweep()
    tiny_suite.wait_for("failed", "done")
    tiny_suite.sweep("--only", "failed")
    tiny_suite.wait_for("done")
    wait_for_attempts(tiny_suite, *["FAILED"] * 6, *["COMPLETED"] * 2)
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


def starts_in_vain(folder: Path) -> int:
    restarts = read_json(folder / "restarts.json", dict)
    return restarts["count"] + 1 if restarts else 0
