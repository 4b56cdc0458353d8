"""Is it told right which jobs live, how others ended and why, whatever happens to the cluster meanwhile?"""

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import PATIENCE_SECONDS, Cluster, wait_until

from slurm import queue
from slurm.queue import EndedJob

EATS_MEMORY = f"{sys.executable} -c 'import time; held = bytearray(b\"1\") * (300 * 2**20); time.sleep(600)'"
RAISES = f"srun {sys.executable} -c 'raise KeyError(3)'"
KILLS_A_TASK = "srun sh -c 'kill -9 $$'"


@dataclass(frozen=True)
class Slow:
    """Jobs whose ends take up to a minute."""

    timed: str  # with a time limit of a minute
    lost: str  # on a node that was lost
    lost_and_requeued: str


# Told to stop, it says whether Slurm is ending its job, and else has the job requeued.
ASKS_WHEN_TOLD = """
import os, pathlib, signal, sys, time
from slurm import queue
place, job, told = pathlib.Path(sys.argv[1]), os.environ["SLURM_JOB_ID"], []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
(place / "started").touch()
while not told:
    time.sleep(0.05)
being_ended = queue.job_is_being_ended(job)
(place / "answer.new").write_text(str(being_ended))
(place / "answer.new").rename(place / "answer")
if not being_ended:
    queue.requeue(job)
"""


@pytest.fixture
def asked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster that the code under test talks to; what a test left in its queue is cancelled."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    before = set(queue.live_jobs())
    yield cluster
    queue.cancel(set(queue.live_jobs()) - before)
    wait_until(lambda: set(queue.live_jobs()) <= before, "the test's jobs are gone")


@pytest.fixture(scope="module")
def slow(cluster: Cluster) -> Iterator[Slow]:
    """Jobs whose ends take up to a minute, begun before the first test so that they pass while the others go on."""
    timed = cluster.submit("srun sleep 600", "--time=1", "--nodelist=n4")
    lost = [cluster.submit("sleep 600", "--nodelist=n2", option) for option in ("--no-requeue", "--requeue")]
    running = ("squeue", "--noheader", "--states=RUNNING", "--format=%i")
    wait_until(lambda: {timed, *lost} <= set(cluster.run(*running).split()), "they run")
    cluster.stop("n2")
    cluster.up()
    yield Slow(timed, *lost)
    cluster.run("scancel", timed, *lost)


def wait_for_state(job: str, state: str) -> None:
    wait_until(lambda: job in (live := queue.live_jobs()) and live[job].state == state, f"job {job} is {state}")


def wait_for_end(jobs: list[str]) -> dict[str, EndedJob]:
    """Until the accounting has an ending of all, not followed by another attempt, and what they had asked for: it lags."""
    known: dict[str, EndedJob] = {}

    def all_over() -> bool:
        known.update(queue.ended_jobs(jobs))
        over = [known[job] for job in jobs if job in known and known[job].state != "REQUEUED"]
        return len(over) == len(jobs) and all(each.requested_bytes and not each.followed_by for each in over)

    wait_until(all_over, f"jobs {jobs} have ended, not {known}")
    return known


def words_of(cluster: Cluster, job: str) -> str:
    return (cluster.folder / "log" / f"job.{job}.out").read_text()


def submit_asking(cluster: Cluster, place: Path, *options: str) -> str:
    """A job whose task, when told to stop, writes whether Slurm is ending it to `answer`."""
    (place / "task.py").write_text(ASKS_WHEN_TOLD)
    job = cluster.submit(f"PYTHONPATH={Path(__file__).parents[1]} srun {sys.executable} {place}/task.py {place}", *options)
    wait_until((place / "started").exists, f"job {job} starts")
    return job


def answer(place: Path) -> str:
    wait_until((place / "answer").exists, "the job is told to stop, and asks")
    return (place / "answer").read_text()


@pytest.mark.slurm
def test_endings_and_their_causes(asked: Cluster, slow: Slow) -> None:
    submitted = {
        kind: asked.submit(script, "--nodelist=n3")
        for kind, script in {
            "unknown": "true",
            "code": RAISES,
            "killed": KILLS_A_TASK,
            "memory": EATS_MEMORY,
            "memory ": f"srun {EATS_MEMORY}",  # of a task rather than of the script
        }.items()
    }
    jobs = wait_for_end(list(submitted.values()))
    found = {kind: queue.cause(jobs[job], words_of(asked, job)) for kind, job in submitted.items()}
    assert {kind: cause.kind for kind, cause in found.items()} == {kind: kind.strip() for kind in submitted}
    assert found["code"].sentence.endswith("failed with exit code 1: KeyError: 3")
    assert "signal 9 (SIGKILL)" in found["killed"].sentence
    assert "of 100 MB" in found["memory"].sentence and "of 100 MB" in found["memory "].sentence
    assert jobs[submitted["unknown"]].state == "COMPLETED"
    # The controller remembers the same, though less of each.
    remembered = queue.recently_ended(submitted.values())
    assert {job: each.state for job, each in remembered.items()} == {job: each.state for job, each in jobs.items()}
    assert queue.cause(remembered[submitted["memory"]], words_of(asked, submitted["memory"])).kind == "memory"


@pytest.mark.slurm
def test_array_element_by_element(asked: Cluster, slow: Slow) -> None:
    array = asked.submit("sleep 600", "--array=0-3%1", "--job-name=tsbench-array", "--time=20", "--nodelist=n4")
    wait_for_state(f"{array}_0", "RUNNING")
    jobs = queue.live_jobs(["tsbench-array"])
    assert sorted(jobs) == [f"{array}_{index}" for index in range(4)]
    assert (jobs[f"{array}_3"].state, jobs[f"{array}_3"].reason, jobs[f"{array}_3"].seconds_left) == (
        "PENDING",
        "JobArrayTaskLimit",
        1200,
    )
    assert jobs[f"{array}_0"].nodes == "n4" and 600 < jobs[f"{array}_0"].seconds_left <= 1200
    assert abs(time.time() - jobs[f"{array}_0"].started) < 600
    assert queue.live_names().items() >= {f"{array}_{index}": "tsbench-array" for index in range(4)}.items()
    queue.cancel([f"{array}_2"])  # pending: nothing remembers it
    assert sorted(queue.live_jobs(["tsbench-array"])) == [f"{array}_{index}" for index in (0, 1, 3)]
    assert f"{array}_2" not in queue.ended_jobs([f"{array}_2"]) and not queue.recently_ended([f"{array}_2"])
    queue.cancel([f"{array}_2", f"{array}_0", "999999"])
    known = wait_for_end([f"{array}_0"])
    assert queue.cause(known[f"{array}_0"], "").kind == "cancelled"
    queue.cancel([array])
    known = wait_for_end([f"{array}_3"])
    assert queue.cause(known[f"{array}_3"], "").kind == "cancelled"
    assert f"{array}_2" not in known


@pytest.mark.slurm
def test_requeued_job_is_live_and_ended(asked: Cluster, slow: Slow) -> None:
    job = asked.submit("sleep 600", "--nodelist=n3")
    wait_for_state(job, "RUNNING")
    assert not queue.job_is_being_ended(job)
    assert queue.requeue(job)
    assert queue.job_is_being_ended(job)
    assert not queue.requeue(job, tries=1)  # it waits already
    wait_for_state(job, "PENDING")
    assert queue.live_jobs()[job].restarts == 1
    wait_until(lambda: job in (known := queue.ended_jobs([job])) and known[job].state == "REQUEUED", "the accounting knows")
    wait_for_state(job, "RUNNING")
    queue.cancel([job])
    again = wait_for_end([job])[job]
    assert (again.state, [each.state for each in again.earlier]) == ("CANCELLED", ["REQUEUED"])


@pytest.mark.slurm
@pytest.mark.parametrize(("partition", "expected"), [("low", "False"), ("low0", "True")])
def test_preempted(asked: Cluster, slow: Slow, tmp_path: Path, partition: str, expected: str) -> None:
    """With a grace time the job runs on, and requeues itself; without one Slurm is already requeueing it."""
    job = submit_asking(asked, tmp_path, f"--partition={partition}", "--exclusive")
    urgent = asked.submit("sleep 1", "--partition=high", "--exclusive")
    assert answer(tmp_path) == expected
    wait_until(lambda: job in queue.ended_jobs([job]), "its first attempt is over")
    first = queue.ended_jobs([job])[job]
    assert first.state == ("PREEMPTED" if expected == "True" else "REQUEUED")
    assert job in queue.live_jobs()  # in both
    wait_for_end([urgent])


@pytest.mark.slurm
@pytest.mark.parametrize("partition", ["low", "low0"])
def test_preempted_for_good(asked: Cluster, slow: Slow, tmp_path: Path, partition: str) -> None:
    """Where preemption cancels, a grace time still lets the job requeue itself."""
    asked.run("scontrol", "update", f"PartitionName={partition}", "PreemptMode=CANCEL")
    try:
        job = submit_asking(asked, tmp_path, f"--partition={partition}", "--exclusive")
        asked.submit("sleep 1", "--partition=high", "--exclusive")
        if partition == "low":
            assert answer(tmp_path) == "False"
            wait_until(lambda: queue.live_jobs()[job].restarts == 1, "it waits again")
        else:
            assert answer(tmp_path) == "True"
            known = wait_for_end([job])
            assert queue.cause(known[job], "").kind == "preempted"
            wait_until(lambda: job not in queue.live_jobs(), "it is gone")
    finally:
        asked.run("scontrol", "update", f"PartitionName={partition}", "PreemptMode=REQUEUE")


@pytest.mark.slurm
def test_cancelled_while_running(asked: Cluster, slow: Slow, tmp_path: Path) -> None:
    job = submit_asking(asked, tmp_path, "--nodelist=n3")
    queue.cancel([job])
    assert answer(tmp_path) == "True"
    assert queue.cause(wait_for_end([job])[job], "").kind == "cancelled"


@pytest.mark.slurm
def test_what_sbatch_refuses(asked: Cluster, slow: Slow) -> None:
    for option, advice in [
        ("--gres=gpu:9", "`gpus_per_node`"),
        ("--partition=none", "`partition`"),
        ("--mem=90000", "`memory_gb`"),
    ]:
        with pytest.raises(RuntimeError) as refused:
            asked.submit("true", option)
        assert advice in queue.submission_error(str(refused.value).partition(": ")[2])
    assert f"MaxArraySize            = {queue.max_array_size()}\n" in asked.run("scontrol", "show", "config")
    assert queue.cluster_is_here() == (True, "")


@pytest.mark.slurm
def test_node_lost(asked: Cluster, slow: Slow) -> None:
    known = wait_for_end([slow.lost])
    assert queue.cause(known[slow.lost], "") == queue.Cause("node lost", f"job {slow.lost} lost its node n2")
    assert queue.live_jobs()[slow.lost_and_requeued].restarts == 1
    requeued = slow.lost_and_requeued
    wait_until(lambda: requeued in (known := queue.ended_jobs([requeued])) and known[requeued].state == "NODE_FAIL", "it is told")
    queue.cancel([slow.lost_and_requeued])


@pytest.mark.slow
@pytest.mark.slurm
def test_time_limit(asked: Cluster, slow: Slow) -> None:
    found = queue.cause(wait_for_end([slow.timed])[slow.timed], words_of(asked, slow.timed))
    assert found == queue.Cause("time limit", f"job {slow.timed} reached its time limit of 1 minute")


@pytest.mark.slurm
def test_without_accounting_nothing_looks_failed(asked: Cluster, slow: Slow) -> None:
    done, waiting = asked.submit("exit 3"), asked.submit("sleep 600", "--nodelist=n3")
    wait_until(lambda: queue.recently_ended([done]).keys() == {done}, "it has ended")
    asked.stop("slurmdbd")
    try:
        with pytest.raises(queue.AccountingUnavailable, match=r"sacct fails: .*Connection refused"):
            queue.ended_jobs([done])
        assert queue.recently_ended([done])[done].exit_code == 3
        assert waiting in queue.live_jobs()
    finally:
        asked.up()
    assert wait_for_end([done])[done].exit_code == 3


@pytest.mark.slurm
def test_a_controller_that_restarts_is_waited_for(asked: Cluster, slow: Slow) -> None:
    job = asked.submit("sleep 600", "--nodelist=n3")
    asked.stop("slurmctld")
    back = threading.Timer(2, asked.up)
    back.start()
    try:
        here = queue.cluster_is_here(PATIENCE_SECONDS)
        assert queue.live_jobs(patience_seconds=PATIENCE_SECONDS)[job].name == "wrap"
    finally:
        back.join()
    assert here == (True, "")
