"""Does a sweep on a real cluster come to its end, however the cluster or someone ends its jobs?"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from attempts import Attempt
from command import tsbench
from same_runs import assert_nothing_half_written, assert_same_bytes
from slurm_cluster import Cluster, wait_until
from sweeping import LONG, MIDDLE, PATIENCE_SECONDS, REMIX, SIX, TinySuite, images_seen, sessions, tasks_of
from training import exit_codes_of

from bench import checkpoint
from bench.runs import expert_folder, read_run

pytestmark = pytest.mark.slurm

APART = {"method": "multi_expert", "options": {"experts": 3}, "system": {"experts": "separate_jobs"}}
TOGETHER = {**APART, "system": {}}
BEGUN = 2400  # images: well inside of what LONG trains; a third of it, of MIDDLE


def most_at_once(attempts: list[Attempt]) -> int:
    """How many ran at the same time, at the most."""
    changes = [(each.started, 1) for each in attempts] + [(each.ended, -1) for each in attempts]
    running = most = 0
    for _, change in sorted(changes):  # an end before a start of the same second
        running += change
        most = max(most, running)
    return most


@contextmanager
def preempting(cluster: Cluster) -> Iterator[None]:
    """A job of the partition `high` wants all of n1, and has it until the block ends."""
    rival = cluster.submit("sleep 600", "--partition=high", "--cpus-per-task=4", "--chdir=/")  # not a job of the suite
    try:
        yield
    finally:
        cluster.run("scancel", rival)


def test_twelve_runs_as_one_array_with_a_limit(tiny_suite: TinySuite) -> None:
    tiny_suite.write(*SIX, grid={"seed": [0, 1]})
    tiny_suite.write_profile(array_parallelism=4)
    tiny_suite.sweep()
    tiny_suite.undisturbed()  # beside them
    tiny_suite.wait_for("done")
    attempts = tiny_suite.assert_ended(*["COMPLETED"] * 12)
    (array,) = {attempt.job.partition("_")[0] for attempt in attempts}
    assert sorted(attempt.job for attempt in attempts) == sorted(f"{array}_{index}" for index in range(12))
    assert most_at_once(attempts) == 4
    assert [len(sessions(folder)) for folder in tiny_suite.run_folders()] == [1] * 12
    tiny_suite.sweep()
    assert tiny_suite.queue_is_empty() and tiny_suite.attempts() == attempts
    tiny_suite.assert_as_undisturbed()


def test_a_time_limit_interrupts_and_the_same_job_goes_on(tiny_suite: TinySuite) -> None:
    """The run waits for the limit's warning, stopped in the midst of training: its Slurm warns when it likes to."""
    tiny_suite.write(REMIX, **LONG)
    tiny_suite.write_profile(minutes=1, signal_seconds=20)
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN)
    (name,) = tiny_suite.status().jobs
    (task,) = tasks_of(name)
    os.kill(task, signal.SIGSTOP)
    wait_until(lambda: is_warned(task), f"job {name} is warned")
    with suppress(ProcessLookupError):
        os.kill(task, signal.SIGCONT)
    status = tiny_suite.wait_for("queued")[tiny_suite.run_folder().name]
    assert status.jobs == (name,) and status.detail.endswith(f"goes on from {status.fraction:.0%}") and 0 < status.fraction < 1
    tiny_suite.cluster.run("scontrol", "update", f"JobId={name}", "TimeLimit=30")  # a busy machine needs more than a minute
    tiny_suite.undisturbed()  # meanwhile
    tiny_suite.wait_for("done")
    attempts = tiny_suite.assert_ended("REQUEUED", "COMPLETED")
    assert {attempt.job for attempt in attempts} == {name}
    assert [session["slurm"]["restart_count"] for session in sessions(tiny_suite.run_folder())] == [None, "1"]
    assert lost_images(tiny_suite) == 0
    tiny_suite.assert_as_undisturbed()


def is_warned(process: int) -> bool:
    """Whether SIGUSR2 waits for the stopped process, or it has ended: Slurm may continue it itself."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    pending = next(line for line in lines if line.startswith("ShdPnd:")).split()[1]
    return int(pending, 16) & 1 << (signal.SIGUSR2 - 1) > 0


def lost_images(suite: TinySuite) -> int:
    """Of the only run, which is done: what it trained and had to train again."""
    return int(read_run(suite.run_folder()).summary["lost_images"])


@pytest.mark.parametrize(("partition", "ending"), [("low", "REQUEUED"), ("low0", "PREEMPTED")], ids=["grace", "no grace"])
def test_preempted_it_goes_on_by_itself(partition: str, ending: str, tiny_suite: TinySuite) -> None:
    """With a grace time the job itself asks to be queued again, and that is all that Slurm knows of it afterwards."""
    tiny_suite.write(REMIX, **LONG)
    tiny_suite.write_profile(partition=partition)
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN)
    with preempting(tiny_suite.cluster):
        tiny_suite.wait_for("preempted")
        assert tiny_suite.status().jobs
        tiny_suite.sweep()  # changes nothing: the job will come back
    tiny_suite.wait_for("done")
    first, second = tiny_suite.assert_ended(ending, "COMPLETED")
    assert first.job == second.job
    assert lost_images(tiny_suite) == 0
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


@contextmanager
def cancelling_preemption(cluster: Cluster, partition: str) -> Iterator[None]:
    change = ("scontrol", "update", f"PartitionName={partition}")
    cluster.run(*change, "PreemptMode=CANCEL")
    try:
        yield
    finally:
        cluster.run(*change, "PreemptMode=REQUEUE")


def test_preemption_that_cancels_is_submitted_again(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, **LONG)
    tiny_suite.write_profile(partition="low0")
    with cancelling_preemption(tiny_suite.cluster, "low0"):
        tiny_suite.sweep()
        tiny_suite.wait_for_images(BEGUN)
        with preempting(tiny_suite.cluster):
            tiny_suite.wait_for("preempted")
            assert not tiny_suite.status().jobs
        waiting = tiny_suite.start("--wait")
        tiny_suite.wait_for_images(2 * BEGUN)
        with preempting(tiny_suite.cluster):
            wait_until(lambda: tiny_suite.job_states()[:2] == ["PREEMPTED"] * 2, "a second preemption", PATIENCE_SECONDS)
        assert exit_codes_of([waiting], PATIENCE_SECONDS) == [0]
    attempts = tiny_suite.assert_ended("PREEMPTED", "PREEMPTED", "COMPLETED")
    assert len({attempt.job for attempt in attempts}) == 3
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


def test_a_killed_task_is_a_failure_that_the_next_sweep_mends(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, **MIDDLE)
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN // 3)
    (name,) = tiny_suite.status().jobs
    os.kill(*tasks_of(name), signal.SIGKILL)
    tiny_suite.wait_for("failed")
    status, folder = tiny_suite.status(), tiny_suite.run_folder()
    assert status.kind == "killed" and status.detail.startswith(f"a task of job {name} was killed by signal 9 (SIGKILL) on n")
    undone = images_seen(folder) - 8 * checkpoint.load_latest(folder / "checkpoints").counters["steps_done"]
    tiny_suite.sweep()
    tiny_suite.wait_for("done")
    attempts = tiny_suite.assert_ended("FAILED", "COMPLETED")
    assert len({attempt.job for attempt in attempts}) == 2
    assert lost_images(tiny_suite) == undone
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


@pytest.mark.slow
def test_a_set_up_that_fails_after_a_kill_is_told_as_such(tiny_suite: TinySuite) -> None:
    """The same job writes into the same files; what killed it before is over, and what ends it now no new attempt mends."""
    tiny_suite.write(REMIX, **MIDDLE)
    broken = tiny_suite.folder / "broken"
    tiny_suite.write_profile(setup=[f"if [ -e {broken} ]; then echo 'module: not found' >&2; exit 3; fi"])
    tiny_suite.sweep()
    tiny_suite.wait_for_images(BEGUN // 3)
    (name,) = tiny_suite.status().jobs
    os.kill(*tasks_of(name), signal.SIGKILL)
    tiny_suite.wait_for("failed")
    assert tiny_suite.status().kind == "killed"
    broken.touch()
    tiny_suite.cluster.run("scontrol", "requeue", name)
    tiny_suite.assert_ended("REQUEUED", "FAILED")
    status = tiny_suite.wait_for("failed")[tiny_suite.run_folder().name]
    assert status.kind == "code" and status.detail == f"job {name} failed with exit code 3: module: not found"
    tiny_suite.sweep()
    assert tiny_suite.queue_is_empty() and len(tiny_suite.attempts()) == 2


def test_experts_in_jobs_of_their_own(tiny_suite: TinySuite) -> None:
    tiny_suite.write(TOGETHER, **LONG)
    (together,) = tiny_suite.undisturbed()
    tiny_suite.write(APART, **LONG)
    tiny_suite.sweep()
    folder = tiny_suite.run_folder()
    places = [expert_folder(folder, index) for index in range(3)]
    tiny_suite.wait_for_images(BEGUN // 3, places[1])
    array = tiny_suite.status().jobs[0].partition("_")[0]
    os.kill(*tasks_of(f"{array}_1"), signal.SIGKILL)
    tiny_suite.wait_for("failed")
    status = tiny_suite.status()
    assert status.kind == "killed" and status.detail.startswith(f"expert 1: a task of job {array}_1 was killed")
    assert [(place / "done").exists() for place in places] == [True, False, True] and not (folder / "done").exists()
    tiny_suite.sweep()
    tiny_suite.wait_for("done")
    attempts = tiny_suite.assert_ended("COMPLETED", "FAILED", "COMPLETED", "COMPLETED")
    assert len({attempt.job for attempt in attempts}) == 4
    assert_same_bytes(folder, together)
    assert_nothing_half_written(folder)
    assert sorted(session["expert"] for session in sessions(folder) if "expert" in session) == [0, 1, 1, 2]


def test_cancelled_by_run_and_by_suite(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, grid={"seed": [0, 1]}, **LONG)
    tiny_suite.sweep()
    for folder in tiny_suite.run_folders():
        tiny_suite.wait_for_images(BEGUN, folder)
    first, second = tiny_suite.run_folders()
    job_of_first, job_of_second = tiny_suite.jobs()
    cancel(tiny_suite, first.name)
    live = tiny_suite.look()[1].live
    assert job_of_first not in live or live[job_of_first].state == "COMPLETING"
    assert live[job_of_second].state == "RUNNING"
    cancel(tiny_suite, tiny_suite.suite)
    tiny_suite.wait_for("planned")
    assert_saved_at_its_last_step(first)
    assert_saved_at_its_last_step(second)
    assert tiny_suite.queue_is_empty()
    assert [status.kind for status in tiny_suite.statuses().values()] == ["cancelled"] * 2
    tiny_suite.assert_ended("CANCELLED", "CANCELLED")
    tiny_suite.sweep()
    tiny_suite.wait_for("done")
    tiny_suite.assert_ended("CANCELLED", "CANCELLED", "COMPLETED", "COMPLETED")
    tiny_suite.assert_one_at_a_time()
    tiny_suite.assert_as_undisturbed()


def cancel(suite: TinySuite, what: str) -> None:
    outcome = tsbench("cancel", what, "--runs", suite.runs)
    assert outcome.code == 0, outcome.err


def assert_saved_at_its_last_step(folder: Path) -> None:
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None and 8 * found.counters["steps_done"] == images_seen(folder) < LONG["budget"]["amount"]
    assert_nothing_half_written(folder)
