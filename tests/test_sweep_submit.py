"""Of several arrays one is refused: what is said, and what is left? With a pretended cluster."""

from pathlib import Path

import pytest

from slurm import submit
from slurm.claims import Work, read_claim
from slurm.commands import ClusterUnreachable
from slurm.profile import Profile

BEFORE = "; submitted before that, and not undone: job "
AGAIN = "; the same sweep again submits only the rest"


@pytest.fixture
def works(tmp_path: Path) -> list[Work]:
    return [Work(tmp_path / f"run{index}", tmp_path / f"run{index}") for index in range(6)]


def submit_until(error: Exception, works: list[Work], num_taken: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arrays of two; the cluster takes that many of them, and then says no. The jobs that runs are noted to have."""
    arrays = iter(range(1, num_taken + 1))

    def answer(ours: list[Work], *rest: object) -> list[str]:
        array = next(arrays, None)
        if array is None:
            raise error
        return [f"{array}_{index}" for index in range(len(ours))]

    monkeypatch.setattr(submit.queue, "live_names", dict)
    monkeypatch.setattr(submit.queue, "max_array_size", lambda: 2)
    monkeypatch.setattr(submit, "_submit_one", answer)
    profile = Profile(device="cpu", submit_every_seconds=0.0)
    with pytest.raises(type(error)) as refused:
        submit.submit(works, lambda *_: True, profile, works[0].folder, works[0].folder.parent / "logs")
    assert "\n" not in str(refused.value)
    return [str(refused.value), *(claim.job for work in works if (claim := read_claim(work)) is not None)]


def test_the_first_array_is_refused(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit_until(ValueError("no: lower it"), works, 0, monkeypatch) == ["no: lower it"]


@pytest.mark.parametrize("kind", [ValueError, ClusterUnreachable])
def test_what_was_submitted_before_is_told(kind: type[Exception], works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    said, *jobs = submit_until(kind("no: lower it"), works, 1, monkeypatch)
    assert said == f"no: lower it{BEFORE}1 (run0, run1){AGAIN}"
    assert jobs == ["1_0", "1_1"]


def test_of_many_runs_some_are_named(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    said, *jobs = submit_until(ValueError("no: lower it"), works, 2, monkeypatch)
    assert said == f"no: lower it{BEFORE}1, 2 (run0, run1, run2 and 1 more){AGAIN}"
    assert jobs == ["1_0", "1_1", "2_0", "2_1"]


def test_submissions_are_apart_in_time(works: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause before each but the first; the cluster's own limit of an array counts where it is lower than the profile's."""
    done: list[object] = []

    def answer(ours: list[Work], *rest: object) -> list[str]:
        done.append([work.name for work in ours])
        return [f"{len(done)}_{index}" for index in range(len(ours))]

    monkeypatch.setattr(submit.queue, "live_names", dict)
    monkeypatch.setattr(submit.queue, "max_array_size", lambda: 4)
    monkeypatch.setattr(submit, "_submit_one", answer)
    monkeypatch.setattr(submit.time, "sleep", done.append)
    for elements, arrays in ((1000, [[*range(4)], 7.5, [4, 5]]), (3, [[*range(3)], 7.5, [*range(3, 6)]])):
        done.clear()
        profile = Profile(device="cpu", submit_every_seconds=7.5, max_array_elements=elements)
        jobs = submit.submit(works, lambda *_: True, profile, works[0].folder, works[0].folder.parent / "logs")
        assert done == [each if isinstance(each, float) else [f"run{index}" for index in each] for each in arrays]
        assert [*jobs] == works
