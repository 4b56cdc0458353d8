"""Is the cluster asked once, about jobs alone, and what is known where it does not answer?"""

from pathlib import Path
from typing import Any

import pytest
from claimed import claimed_run, ended, live, status

from slurm import queue, states
from slurm.accounting import EndedJob
from slurm.claims import Work
from slurm.states import Known, ask_cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return claimed_run(tmp_path)


def answers(monkeypatch: pytest.MonkeyPatch, **of_queue: Any) -> list[str]:
    """Let `slurm.queue` answer so (or raise); which of its functions were asked."""
    asked: list[str] = []

    def answering(name: str, answer: Any) -> Any:
        def ask(*arguments: Any) -> Any:
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask

    for name, answer in {"cluster_is_here": (True, ""), **of_queue}.items():
        monkeypatch.setattr(queue, name, answering(name, answer))
    return asked


def test_the_cluster_is_asked_only_about_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch)
    assert ask_cluster([Work(tmp_path, tmp_path)]) == states.NOTHING and not asked


def test_one_question_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, live_jobs=live("RUNNING"), ended_jobs=ended("PREEMPTED"))
    assert ask_cluster([Work(folder, folder)] * 3) == Known(live("RUNNING"), ended("PREEMPTED"))
    assert asked == ["cluster_is_here", "live_jobs", "ended_jobs"]


@pytest.mark.parametrize("late", [{}, ended("REQUEUED", followed_by="RUNNING")], ids=["nothing", "an earlier attempt"])
def test_what_the_accounting_has_not_heard_of_yet_the_controller_tells(
    late: dict[str, EndedJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, live_jobs={}, ended_jobs=late, recently_ended=ended("CANCELLED"))
    known = ask_cluster([Work(folder, folder)])
    assert known == Known({}, ended("CANCELLED"))
    assert status(folder, known).kind == "cancelled"


def test_an_accounting_that_is_down_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = queue.AccountingUnavailable("sacct fails: no database")
    answers(monkeypatch, live_jobs={}, ended_jobs=down, recently_ended=ended("TIMEOUT"))
    known = ask_cluster([Work(folder, folder)])
    assert known.answers and known.warning == "the accounting does not answer (sacct fails: no database): causes may be missing"
    assert status(folder, known).kind == "time limit"


@pytest.mark.parametrize(
    "of_queue",
    [
        {"cluster_is_here": (False, "its controller does not answer")},
        {"live_jobs": queue.ClusterUnreachable("the cluster does not answer squeue")},
        {"live_jobs": {}, "ended_jobs": {}, "recently_ended": queue.ClusterUnreachable("the cluster does not answer squeue")},
    ],
)
def test_of_a_cluster_that_does_not_answer_nothing_is_known(
    of_queue: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, **of_queue)
    known = ask_cluster([Work(folder, folder)])
    assert not known.answers and not known.live and not known.ended and "does not answer" in known.warning
    assert status(folder, known).detail.endswith("cannot be asked")
