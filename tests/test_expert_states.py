"""Is the status of a run right when some of its experts' jobs have failed?"""

from dataclasses import asdict
from pathlib import Path

from bench.files import write_json_atomically, write_text_atomically
from bench.runs import expert_folder
from slurm.accounting import EndedJob
from slurm.claims import Claim, Work
from slurm.states import Known, Status, status_of

BUDGET = {"unit": "images", "amount": 300}


def make_experts(run: Path, *, trained: tuple[int, ...]) -> list[Work]:
    """Three, each given to an element of job 12; some are trained."""
    works = [Work(run, expert_folder(run, index), index) for index in range(3)]
    for index, work in enumerate(works):
        work.folder.mkdir(parents=True)
        write_json_atomically(work.folder / "job.json", asdict(Claim("token", index, "host", 1, 0.0, job=f"12_{index}")))
        write_json_atomically(work.folder / "progress.json", {"images_seen": 100 if index in trained else 50})
        if index in trained:
            write_text_atomically(work.folder / "done", "")
    return works


def ended(job: str, state: str) -> EndedJob:
    return EndedJob(job, "", state, None, 1, 0, "n1", 0.0, 1.0, 1.0, 60, None)


def status(works: list[Work], *jobs: EndedJob) -> Status:
    return status_of(works, Known({}, {job.job_id: job for job in jobs}), lambda run: [], BUDGET)


def test_a_failed_expert_is_named(tmp_path: Path) -> None:
    works = make_experts(tmp_path, trained=(0, 2))
    told = status(works, ended("12_1", "NODE_FAIL"))
    assert (told.state, told.kind, told.detail) == ("failed", "node lost", "expert 1: job 12_1 lost its node n1")
    assert told.fraction == 250 / 300


def test_a_failure_of_its_own_is_told_before_one_that_a_sweep_mends(tmp_path: Path) -> None:
    works = make_experts(tmp_path, trained=(2,))
    write_json_atomically(works[1].folder / "failure.json", {"state": "failed", "cause": "no such option"})
    told = status(works, ended("12_0", "NODE_FAIL"))
    assert (told.kind, told.detail) == ("code", "expert 1: no such option") and not told.resumable


def test_a_failure_to_put_experts_together_is_the_runs(tmp_path: Path) -> None:
    works = make_experts(tmp_path, trained=(0, 1, 2))
    assert status(works).state == "planned"
    write_json_atomically(tmp_path / "failure.json", {"state": "failed", "cause": "they began with different weights"})
    told = status(works)
    assert (told.state, told.kind, told.detail) == ("failed", "code", "they began with different weights")
