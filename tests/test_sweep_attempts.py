"""Would the tests of sweeps on a cluster notice that two jobs have worked on one run at the same time?"""

from math import inf
from pathlib import Path

import pytest
from attempts import Attempt
from slurm_cluster import Cluster
from submitit.core.utils import DelayedSubmission, JobPaths
from sweeping import TinySuite

from bench.job import work_on
from bench.runs import expert_folder
from slurm.claims import Work
from slurm.task import Task


class Told(TinySuite):
    """Its accounting is what the test says; no attempt has come to save anything."""

    def attempts(self) -> list[Attempt]:
        return list(ATTEMPTS)

    def run_folders(self) -> list[Path]:
        return []


ATTEMPTS: list[Attempt] = []
RUN, OTHER = Path("runs/one"), Path("runs/other")


def assert_one_at_a_time(folder: Path, *given: tuple[str, Work | None, float, float]) -> None:
    """Of jobs, what each works on (None: it was never told), and when."""
    logs = folder / "results" / "jobs" / "suite"
    logs.mkdir(parents=True)
    for job, work, _, _ in given:
        if work is not None:
            DelayedSubmission(Task(work_on, work, 1, 0.0)).dump(JobPaths(logs, job_id=job).submitted_pickle)
    ATTEMPTS[:] = [Attempt(job, "FAILED", started, ended) for job, _, started, ended in given]
    Told(Cluster(folder), folder, folder).assert_one_at_a_time()


@pytest.mark.parametrize("second", ["1_0", "2_0"], ids=["the same job", "another job"])
def test_attempts_that_saved_nothing_count(second: str, tmp_path: Path) -> None:
    work = Work(RUN, RUN)
    with pytest.raises(AssertionError, match=f"one: job 1_0 until 20.0, job {second} from 19.0"):
        assert_one_at_a_time(tmp_path, ("1_0", work, 10.0, 20.0), (second, work, 19.0, 30.0))


def test_one_after_the_other_and_side_by_side_is_well(tmp_path: Path) -> None:
    """Also what was cancelled before it began, what another run's job does, or another expert's, and what has no task."""
    work, expert = Work(RUN, RUN), Work(RUN, expert_folder(RUN, 1), 1)
    assert_one_at_a_time(
        tmp_path,
        *(("1_0", work, 10.0, 20.0), ("1_0", work, 20.0, 30.0), ("2", work, inf, 25.0), ("3", work, 31.0, 40.0)),
        *(("1_1", Work(OTHER, OTHER), 10.0, 40.0), ("1_2", expert, 10.0, 40.0), ("4", None, 10.0, 40.0)),
    )
