"""Does a job count its starts, remember signals, and ask to be queued again only where that is its business?"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.files import read_json, write_json_atomically
from slurm import queue, task
from slurm.claims import Work
from slurm.task import Task, forget_restarts, has_left_the_queue, how_far, is_being_ended, was_preempted

LIMIT = 2


class Job:
    """What stands in for submitit's environment: the first rank of a job."""

    global_rank = 0
    job_id = "12_3"
    raw_job_id = "12"  # the array's, too


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A job of a cluster, and what it asked to be queued again. The handlers of signals are put back."""
    asked: list[str] = []
    numbers = (*task.WARNINGS, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(task.submitit, "JobEnvironment", Job)
    monkeypatch.setattr(task.TorchDistributedEnvironment, "__init__", lambda self: None)
    monkeypatch.setattr(task.TorchDistributedEnvironment, "export", lambda self, **options: None)
    monkeypatch.setattr(queue, "requeue", asked.append)
    monkeypatch.setattr(queue, "job_is_being_ended", lambda job, patience_seconds: False)
    yield asked
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def ended(folder: Path, *_: object) -> bool:
    return True


def stopped(folder: Path, *_: object) -> bool:
    return False


def task_of(folder: Path, train: task.Train = stopped, limit_seconds: float = 0.0) -> Task:
    return Task(train, Work(folder, folder), LIMIT, limit_seconds)


def test_what_came_to_its_end_is_not_queued_again(requeued: list[str], tmp_path: Path) -> None:
    assert task_of(tmp_path, ended)() == "done" and not requeued


def test_what_was_stopped_is(requeued: list[str], tmp_path: Path) -> None:
    assert task_of(tmp_path)() == "stopped" and requeued == ["12_3"]


def test_a_warning_long_before_the_time_limit_is_a_preemption_until_the_next_start(requeued: list[str], tmp_path: Path) -> None:
    assert task_of(tmp_path)() == "stopped" and not was_preempted(tmp_path)
    assert task_of(tmp_path, limit_seconds=3600)() == "stopped" and was_preempted(tmp_path)
    assert read_json(tmp_path / task.RESTARTS, dict)["count"] == 1  # the note has kept what was counted
    assert task_of(tmp_path, ended)() == "done" and not was_preempted(tmp_path)
    assert requeued == ["12_3", "12_3"]


def test_a_job_that_is_cancelled_or_requeued_by_slurm_does_not_ask(
    requeued: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "job_is_being_ended", lambda job, patience_seconds: job == "12_3" and patience_seconds <= 10)
    assert task_of(tmp_path)() == "stopped" and not requeued


def test_only_the_first_rank_counts_and_asks(requeued: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "global_rank", 1)
    assert task_of(tmp_path)() == "stopped" and not requeued
    assert not (tmp_path / task.RESTARTS).exists()


@pytest.mark.parametrize("number", task.WARNINGS)
def test_a_signal_does_nothing_but_set_a_flag(number: int, requeued: list[str], tmp_path: Path) -> None:
    """The run is given the flag, looks at it when it likes, and everything in between goes on."""
    seen: list[bool] = []

    def train(folder: Path, expert: int | None, should_stop: Callable[[], bool], is_dead: Callable[[str], bool]) -> bool:
        seen.append(should_stop())
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        seen.append(should_stop())
        return False

    assert task_of(tmp_path, train)() == "stopped"
    assert seen == [False, True] and requeued == ["12_3"]


def test_a_cluster_that_does_not_answer_is_asked_to_queue_again_and_takes_no_lease_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise queue.ClusterUnreachable("down")

    monkeypatch.setattr(queue, "job_is_being_ended", unreachable)
    monkeypatch.setattr(queue, "live_jobs", unreachable)
    assert not is_being_ended("12_3") and not has_left_the_queue("12_3")
    monkeypatch.setattr(queue, "live_jobs", lambda patience_seconds: {"12_3": None})
    assert not has_left_the_queue("12_3") and has_left_the_queue("78")


def test_a_job_is_not_started_for_ever(tmp_path: Path) -> None:
    """Three starts without progress are LIMIT restarts; the fourth is one too many."""
    for _ in range(LIMIT + 1):
        task_of(tmp_path).count_start()
    with pytest.raises(RuntimeError, match=r"^started 3 times in a row without getting further than its start:"):
        task_of(tmp_path).count_start()
    failure = read_json(tmp_path / "failure.json", dict)
    assert failure["state"] == "failed" and "--only failed" in failure["cause"]
    forget_restarts(Work(tmp_path, tmp_path))
    task_of(tmp_path).count_start()


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"step-{step:08d}.safetensors").touch()


def samples(folder: Path, count: int) -> None:
    (folder / "parts" / "aa-8").mkdir(parents=True, exist_ok=True)
    (folder / "parts" / "aa-8" / f"round-{count:06d}.safetensors").touch()


PROGRESS: dict[str, Callable[[Path, int], None]] = {
    "a checkpoint": checkpoint,
    "some samples": samples,
    "a place of the curve": lambda folder, count: write_json_atomically(folder / "curve.json", [{}] * (count + 1)),
    "scores": lambda folder, count: write_json_atomically(folder / "eval.json", [{}] * (count + 1)),
}


@pytest.mark.parametrize("what", PROGRESS)
def test_a_start_that_got_further_counts_from_nought(what: str, tmp_path: Path) -> None:
    """A run that is interrupted often is not given up, whatever it is at."""
    for count in range(3 * LIMIT):
        task_of(tmp_path).count_start()
        before = how_far(tmp_path)
        PROGRESS[what](tmp_path, count)
        assert how_far(tmp_path) != before
    with pytest.raises(RuntimeError, match=f"further than {how_far(tmp_path)}:"):
        for _ in range(LIMIT + 2):
            task_of(tmp_path).count_start()


def test_a_job_that_gives_up_does_not_train(requeued: list[str], tmp_path: Path) -> None:
    write_json_atomically(tmp_path / task.RESTARTS, {"place": "", "count": LIMIT})

    def train(*_: object) -> bool:
        pytest.fail("it trained")

    with pytest.raises(RuntimeError, match="times in a row"):
        task_of(tmp_path, train)()
    assert not requeued
