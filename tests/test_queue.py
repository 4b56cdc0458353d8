"""Is it told right which jobs live, how others ended and why, whatever happens to the cluster meanwhile?"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, wait_until

from slurm import accounting, commands, queue
from slurm.cause import KINDS, last_words
from slurm.queue import EndedJob, LiveJob

# Printed by Slurm 22.05.8: a job whose name holds bars and a line's end, an array with an element that runs, held ones.
SQUEUE = """\
8|RUNNING|None|n1|1795235133|UNLIMITED|0|a|b
second line|
9|PENDING|job requeued in held state|||N/A|1|wrap|
1_0|COMPLETING|None|n[1-2]|1795235133|364-23:59:57|2|tsbench-1|
1_2|PENDING|JobArrayTaskLimit||N/A|1:30|0|tsbench-1|
"""
# One job that was requeued and runs, one over memory, one of several tasks that failed, an array cancelled while its first ran.
SACCT = """\
30|REQUEUED|0:0|n3|2|60|100M|1||1795235133|1795235135|wrap
30.batch|CANCELLED|0:15|n3|2|||1|3044K|1795235133|1795235135|batch
30|RUNNING|0:0|n1|1|60|100M|1||1795235141|Unknown|wrap
30.batch|RUNNING|0:0|n1|1|||1||1795235141|Unknown|batch
5|FAILED|9:0|n2|1|525600|200M|2||1795234960|1795234961|a|b
5.batch|FAILED|9:0|n2|1|||1|10660K|1795234960|1795234961|batch
5.0|CANCELLED by 0|0:9|n2|1|||1|1.5G|1795234960|1795234961|python3
40.batch|CANCELLED||n2|28|||1||1795235133|1795235161|batch
45_0|FAILED|1:0|n1|1|UNLIMITED|0|1||1795236445|1795236446|wrap
45_[0-3:2,5%1]|CANCELLED by 1234567|0:0|None assigned|0|Partition_Limit|100M|1||None|1795236446|wrap
""".replace("40.batch", "5.extern")
TRACEBACK = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    load()
bench.journal.Damaged: no such weights
which is more than one line

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 5, in <module>
    raise KeyError(3)
KeyError: 3
srun: error: n1: task 0: Exited with exit code 1
"""
SLURMSTEPD = "slurmstepd-n2: error: StepId=5.0 exceeded memory limit (328335360 > 104857600), being killed\n"
FIVE_SECONDS = 5.0

EATS_MEMORY = f"{sys.executable} -c 'import time; held = bytearray(b\"1\") * (300 * 2**20); time.sleep(60)'"
RAISES = f"srun {sys.executable} -c 'raise KeyError(3)'"
KILLS_A_TASK = "srun sh -c 'kill -9 $$'"
# Told to stop, its task says whether Slurm is ending it, and ends. Python is what Slurm's signal reaches first.
ASKS_WHEN_TOLD = """\
import pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from slurm import queue
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
pathlib.Path({place!r} + "/started").touch()
while not told:
    time.sleep(0.05)
ended = queue.job_is_being_ended({job})
(pathlib.Path({place!r}) / "answer.new").write_text(str(ended))
(pathlib.Path({place!r}) / "answer.new").rename({place!r} + "/answer")
if not ended:
    queue.requeue({job})
time.sleep(60)
"""


def ended(job: str = "5", **fields: object) -> EndedJob:
    values = dict(name="wrap", state="FAILED", cancelled_by=None, exit_code=1, signal=0, nodes="n2", started=1.0, ended=2.0)
    values |= dict(elapsed_seconds=1.0, limit_minutes=None, requested_bytes=100 * 2**20)
    return EndedJob(job, **{**values, **fields})


def step(**fields: object) -> accounting.Step:
    return accounting.Step(**{"name": "0", "state": "FAILED", "exit_code": 0, "signal": 0, "max_bytes": None, **fields})


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a shell script in the place of a command of Slurm's; the file to which it adds its arguments, one call a line."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def make(name: str, script: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
        (tmp_path / "bin" / name).chmod(0o755)
        return calls

    return make


# --- what is printed ------------------------------------------------------------------------------


def test_live_jobs_as_printed() -> None:
    jobs = queue.parse_live(SQUEUE)
    assert list(jobs) == ["8", "9", "1_0", "1_2"]
    assert jobs["8"] == LiveJob("8", "a|b", "RUNNING", "", "n1", 1795235133.0, None, 0)
    assert jobs["9"] == LiveJob("9", "wrap", "PENDING", "job requeued in held state", "", None, None, 1)
    assert jobs["1_0"].seconds_left == 364 * 86400 + 86397
    assert jobs["1_2"].seconds_left == 90


def test_attempts_as_printed() -> None:
    attempts = accounting.parse_accounting(SACCT)
    assert [(each.job_id, each.state, len(each.steps)) for each in attempts] == [
        ("30", "REQUEUED", 1),
        ("30", "RUNNING", 1),
        ("5", "FAILED", 3),
        ("45_0", "FAILED", 0),  # though the record of the elements that never started names it too
        ("45_2", "CANCELLED", 0),
        ("45_5", "CANCELLED", 0),
    ]
    killed = attempts[2]
    assert (killed.name, killed.exit_code, killed.nodes, killed.limit_minutes) == ("a|b", 9, "n2", 525600)
    assert (killed.requested_bytes, killed.steps[1].max_bytes) == (100 * 2**20, 3 * 2**29)  # of one node of two
    assert (killed.steps[1].signal, killed.started, killed.elapsed_seconds) == (9, 1795234960.0, 1.0)
    assert (attempts[3].requested_bytes, attempts[3].limit_minutes) == (None, None)  # --mem=0: all that there is
    assert (attempts[5].cancelled_by, attempts[5].nodes, attempts[5].started) == (1234567, "", None)


def test_no_ending_is_final() -> None:
    requeued, running = accounting.parse_accounting(SACCT)[:2]
    assert accounting.last_ended([requeued, running]).followed_by == "RUNNING"
    again = accounting.last_ended([requeued, ended("30")])
    assert (again.state, [each.state for each in again.earlier], again.followed_by) == ("FAILED", ["REQUEUED"], "")
    assert accounting.last_ended([running]) is None


def test_remembered_jobs_as_printed() -> None:
    printed = "4|FAILED|35072|n2|1795235133|1795235143|1-00:01:00|wrap|\n6|FAILED|9|n2|1795235133|N/A|UNLIMITED|wrap|\n"
    by_shell, by_signal = accounting.parse_remembered(printed)
    assert (by_shell.exit_code, by_shell.signal, by_shell.limit_minutes, by_shell.elapsed_seconds) == (137, 0, 1441, 10.0)
    assert (by_signal.exit_code, by_signal.signal, by_signal.limit_minutes, by_signal.elapsed_seconds) == (0, 9, None, None)
    assert queue.cause(by_shell, "").kind == queue.cause(by_signal, "").kind == "killed"


def test_lists_of_elements() -> None:
    assert accounting.expand(["12_[0-6:3,9%2]", "13", "14_2"]) == {"12_0", "12_3", "12_6", "12_9", "13", "14_2"}


@pytest.mark.parametrize(
    ("job", "stderr", "kind", "words"),
    [
        (ended(state="TIMEOUT", limit_minutes=60), "", "time limit", "job 5 reached its time limit of 60 minutes"),
        (ended(state="DEADLINE"), "", "time limit", "time limit"),
        (ended(state="OUT_OF_MEMORY", signal=125), "", "memory", "raise memory_gb in the profile"),
        (ended(steps=(step(signal=9, max_bytes=300 * 2**20),)), "", "memory", "(300 of 100 MB)"),
        (ended(exit_code=0, signal=9), SLURMSTEPD, "memory", "more memory"),
        (ended(state="CANCELLED", steps=(step(signal=9),)), SLURMSTEPD, "memory", "more memory"),
        (ended(exit_code=1), SLURMSTEPD, "code", "exit code 1"),  # words alone end no job
        (ended(steps=(step(exit_code=1, max_bytes=300 * 2**20),)), "", "code", "exit code 1"),
        (ended(state="NODE_FAIL"), TRACEBACK, "node lost", "job 5 lost its node n2"),
        (ended(state="PREEMPTED"), TRACEBACK, "preempted", "preempted"),
        (ended(state="CANCELLED", cancelled_by=os.getuid()), "", "cancelled", "was cancelled by "),
        (ended(state="CANCELLED", cancelled_by=1234567), "", "cancelled", "by user 1234567"),
        (ended(state="CANCELLED"), TRACEBACK, "cancelled", "job 5 was cancelled"),
        (ended(steps=(step(signal=9, max_bytes=9),)), "", "killed", "was killed by signal 9 (SIGKILL) on n2"),
        (ended(exit_code=9), "", "killed", "signal 9"),
        (ended(exit_code=143), "", "killed", "signal 15 (SIGTERM)"),
        (ended(exit_code=15, steps=(step(exit_code=1),)), TRACEBACK, "code", "exit code 1: KeyError: 3"),
        (ended(steps=(step(exit_code=1),)), TRACEBACK + "srun: error: n2: task 1: Killed\n", "killed", "SIGKILL"),
        (ended(steps=(step(signal=11),)), "", "code", "crashed with signal 11 (SIGSEGV) on n2"),
        (ended(exit_code=3), "module: not found\nsrun: error: n1: task 0: Exited\n", "code", "exit code 3: module: not found"),
        (ended(nodes="", started=None), "", "unknown", "could not be started"),
        (ended(state="COMPLETED", exit_code=0), TRACEBACK, "unknown", "ended without an error"),
        (ended(state="LAUNCH_FAILED"), "", "unknown", "ended as LAUNCH_FAILED"),
    ],
)
def test_causes(job: EndedJob, stderr: str, kind: str, words: str) -> None:
    found = queue.cause(job, stderr)
    assert found.kind == kind and kind in KINDS
    assert words in found.sentence and "\n" not in found.sentence


def test_last_words() -> None:
    assert last_words("") == ""
    assert last_words(TRACEBACK) == "KeyError: 3"
    assert last_words(TRACEBACK.partition("\nDuring")[0]) == "bench.journal.Damaged: no such weights"
    assert last_words("one\ntwo\nslurmstepd-n1: error: *** JOB 3 ON n1 CANCELLED ***\n\n") == "two"


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "`gpus_per_node`"),
        (
            "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: ...",
            "`memory_gb`",
        ),
        ("sbatch: error: Invalid generic resource (gres) specification", "`gres`"),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", "`constraint`"),
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", "correct `partition`; `sinfo"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "correct `account`",
        ),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "`qos`"),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", "`max_array_elements`"),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or "
            "time limits)",
            "account and qos allow",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "lower `minutes`",
        ),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", "controller is up"),
        ("sbatch: unrecognized option '--nosuch'\nTry \"sbatch --help\" for more information", "`additional`"),
        ("sbatch: error: something new", "change the profile"),
        ("", "it does not say why"),
    ],
)
def test_refusals(stderr: str, advice: str) -> None:
    sentence = queue.submission_error(stderr)
    assert advice in sentence
    assert sentence.startswith("the cluster refuses the job (") and "sbatch:" not in sentence and "\n" not in sentence


# --- a cluster that does not answer ---------------------------------------------------------------


def test_asks_again_after_a_failure(pretend: Callable[[str, str], Path], tmp_path: Path) -> None:
    calls = pretend(
        "squeue",
        f'[ -e {tmp_path}/up ] || {{ touch {tmp_path}/up; echo "error" >&2; exit 1; }}; echo "8|RUNNING|None|n1|1|1:00|0|a|"',
    )
    assert list(queue.live_jobs(patience_seconds=FIVE_SECONDS)) == ["8"]
    assert list(queue.live_jobs(["b"])) == []
    assert len(calls.read_text().splitlines()) == 3


def test_gives_up_in_one_sentence(pretend: Callable[[str, str], Path]) -> None:
    calls = pretend("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(queue.ClusterUnreachable, match="does not answer squeue .*Unable to contact") as caught:
        queue.live_jobs(patience_seconds=1.2)
    assert "\n" not in str(caught.value)
    assert len(calls.read_text().splitlines()) == 3  # at once, after a pause, and when patience ends


def test_never_hangs(pretend: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("squeue", "sacct", "scontrol"):
        pretend(name, "echo retrying >&2; exec sleep 60")
    monkeypatch.setattr(commands.call, "__kwdefaults__", {"seconds": 0.3})
    monkeypatch.setattr(queue, "PING_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(queue.ClusterUnreachable, match="retrying"):
        queue.live_jobs(patience_seconds=0.5)
    with pytest.raises(queue.AccountingUnavailable, match="retrying"):
        queue.ended_jobs(["8"])
    assert queue.cluster_is_here() == (False, "retrying")
    assert queue.max_array_size() is None
    assert not queue.requeue("8", tries=1)
    assert time.monotonic() - began < FIVE_SECONDS


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.cluster_is_here() == (False, "sbatch, squeue, sacct, scontrol, scancel not on the PATH")
    assert queue.max_array_size() is None
    with pytest.raises(queue.ClusterUnreachable, match="not on the PATH"):
        queue.live_jobs()
    with pytest.raises(queue.AccountingUnavailable, match="not on the PATH"):
        queue.ended_jobs(["8"])


def test_a_users_own_filters_do_not_count(pretend: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_CLUSTERS", "big")
    pretend("squeue", 'echo "1|$SQUEUE_STATES|$SLURM_CLUSTERS|n1|1|1:00|0|a|"')
    assert (queue.live_jobs()["1"].state, queue.live_jobs()["1"].reason) == ("", "big")


def test_cancelling_asks_the_queue_who_is_left(pretend: Callable[[str, str], Path]) -> None:
    calls = pretend("scancel", 'echo "scancel: error: Kill job error on job id 9: Invalid job id specified" >&2; exit 1')
    pretend("squeue", 'echo "9|COMPLETING|None|n1|1|1:00|0|a|"')
    queue.cancel(["9", "8", "12_3"])
    assert calls.read_text() == "12_3 8 9\n"
    pretend("squeue", 'echo "12_3|PENDING|None|n1|1|1:00|0|a|"')
    with pytest.raises(queue.ClusterUnreachable, match="1 jobs cannot be cancelled"):
        queue.cancel(["9", "12"], patience_seconds=0.5)
    calls.unlink()
    queue.cancel([])
    assert not calls.exists()


def test_requeue_is_deaf_and_tries_again(pretend: Callable[[str, str], Path], tmp_path: Path) -> None:
    calls = pretend(
        "scontrol", f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; exit 1; }}; kill -TERM $$; kill -USR2 $$; exit 0"
    )
    assert queue.requeue("12_3")
    assert calls.read_text() == "requeue 12_3\n" * 2
    pretend("scontrol", "exit 1")
    assert not queue.requeue("12_3", tries=1)


# --- a real cluster -------------------------------------------------------------------------------


@pytest.fixture
def asked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster that the code under test talks to; what a test left in its queue is cancelled."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    before = set(queue.live_jobs())
    yield cluster
    queue.cancel(set(queue.live_jobs()) - before)
    wait_until(lambda: set(queue.live_jobs()) <= before, "the test's jobs are gone")


@pytest.fixture(scope="module")
def timed_out(cluster: Cluster) -> str:
    """A job that will reach its time limit, of a minute, while other tests go on."""
    return cluster.submit("srun sleep 600", "--time=1", "--nodelist=n4", "--job-name=timed")


def wait_for_end(jobs: list[str], seconds: float = 60) -> dict[str, EndedJob]:
    """Until the accounting has an ending of all, not followed by another attempt."""
    known: dict[str, EndedJob] = {}

    def all_over() -> bool:
        known.update(queue.ended_jobs(jobs))
        return all(job in known and not known[job].followed_by and known[job].state != "REQUEUED" for job in jobs)

    wait_until(all_over, f"jobs {jobs} have ended, not {known}", seconds)
    return known


def words_of(cluster: Cluster, job: str) -> str:
    return (cluster.folder / "log" / f"job.{job}.out").read_text()


def submit_asking(cluster: Cluster, place: Path, *options: str) -> str:
    """A job whose task, when told to stop, writes whether Slurm is ending it to `answer`."""
    root = str(Path(__file__).parents[1])
    (place / "task.py").write_text(
        ASKS_WHEN_TOLD.format(root=root, place=str(place), job="__import__('os').environ['SLURM_JOB_ID']")
    )
    job = cluster.submit(f"srun {sys.executable} {place}/task.py", *options)
    wait_until((place / "started").exists, f"job {job} starts")
    return job


def answer(place: Path) -> str:
    wait_until((place / "answer").exists, "the job is told to stop, and asks")
    return (place / "answer").read_text()


@pytest.mark.slurm
def test_endings_and_their_causes(asked: Cluster, timed_out: str) -> None:
    submitted = {
        "unknown": asked.submit("true"),
        "code": asked.submit(RAISES),
        "killed": asked.submit(KILLS_A_TASK),
        "memory": asked.submit(EATS_MEMORY),
        "memory ": asked.submit(f"srun {EATS_MEMORY}"),
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
def test_array_element_by_element(asked: Cluster, timed_out: str) -> None:
    array = asked.submit("sleep 60", "--array=0-3%1", "--job-name=tsbench-array", "--time=2", "--nodelist=n4")
    wait_until(lambda: queue.live_jobs().get(f"{array}_0", None) is not None, "the array is in the queue")
    wait_until(lambda: queue.live_jobs()[f"{array}_0"].state == "RUNNING", "its first element runs")
    jobs = queue.live_jobs(["tsbench-array"])
    assert sorted(jobs) == [f"{array}_{index}" for index in range(4)]
    assert (jobs[f"{array}_3"].state, jobs[f"{array}_3"].reason, jobs[f"{array}_3"].seconds_left) == (
        "PENDING",
        "JobArrayTaskLimit",
        120,
    )
    assert jobs[f"{array}_0"].nodes == "n4" and 100 < jobs[f"{array}_0"].seconds_left <= 120
    assert abs(time.time() - jobs[f"{array}_0"].started) < 60
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
def test_requeued_job_is_live_and_ended(asked: Cluster, timed_out: str) -> None:
    job = asked.submit("sleep 60", "--nodelist=n3")
    wait_until(lambda: queue.live_jobs()[job].state == "RUNNING", "it runs")
    assert not queue.job_is_being_ended(job)
    assert queue.requeue(job)
    assert queue.job_is_being_ended(job)
    assert not queue.requeue(job, tries=1)  # it waits already
    wait_until(lambda: queue.live_jobs()[job].state == "PENDING", "it waits again")
    assert queue.live_jobs()[job].restarts == 1
    assert queue.ended_jobs([job])[job].state == "REQUEUED"
    wait_until(lambda: queue.live_jobs()[job].state == "RUNNING", "it runs again")
    queue.cancel([job])
    again = wait_for_end([job])[job]
    assert (again.state, [each.state for each in again.earlier]) == ("CANCELLED", ["REQUEUED"])


@pytest.mark.slurm
@pytest.mark.parametrize(("partition", "expected"), [("low", "False"), ("low0", "True")])
def test_preempted(asked: Cluster, timed_out: str, tmp_path: Path, partition: str, expected: str) -> None:
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
def test_preempted_for_good(asked: Cluster, timed_out: str, tmp_path: Path, partition: str) -> None:
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
def test_cancelled_while_running(asked: Cluster, timed_out: str, tmp_path: Path) -> None:
    job = submit_asking(asked, tmp_path, "--nodelist=n3")
    queue.cancel([job])
    assert answer(tmp_path) == "True"
    assert queue.cause(wait_for_end([job])[job], "").kind == "cancelled"


@pytest.mark.slurm
def test_what_sbatch_refuses(asked: Cluster, timed_out: str) -> None:
    for option, advice in [
        ("--gres=gpu:9", "`gpus_per_node`"),
        ("--partition=none", "`partition`"),
        ("--mem=90000", "`memory_gb`"),
    ]:
        with pytest.raises(RuntimeError) as refused:
            asked.submit("true", option)
        assert advice in queue.submission_error(str(refused.value).partition(": ")[2])
    assert queue.max_array_size() == 1001
    assert queue.cluster_is_here() == (True, "")


@pytest.mark.slurm
def test_without_accounting_nothing_looks_failed(asked: Cluster, timed_out: str) -> None:
    done = asked.submit("exit 3")
    wait_until(lambda: queue.recently_ended([done]).keys() == {done}, "it has ended")
    asked.stop("slurmdbd")
    try:
        with pytest.raises(queue.AccountingUnavailable, match="sacct fails: .*Connection refused"):
            queue.ended_jobs([done])
        assert queue.recently_ended([done])[done].exit_code == 3
        assert timed_out in queue.live_jobs() | queue.recently_ended([timed_out])
    finally:
        asked.up()
    assert wait_for_end([done])[done].exit_code == 3


@pytest.mark.slurm
def test_a_controller_that_restarts_is_waited_for(asked: Cluster, timed_out: str) -> None:
    job = asked.submit("sleep 60", "--nodelist=n3")
    asked.stop("slurmctld")
    back = threading.Timer(2, asked.up)
    back.start()
    try:
        here = queue.cluster_is_here()
        assert queue.live_jobs()[job].name == "wrap"
    finally:
        back.join()
    assert here == (True, "")


@pytest.mark.slurm
def test_node_lost(asked: Cluster, timed_out: str) -> None:
    job = asked.submit("sleep 60", "--nodelist=n2", "--no-requeue")
    again = asked.submit("sleep 60", "--nodelist=n2")
    wait_until(lambda: all(queue.live_jobs()[each].state == "RUNNING" for each in (job, again)), "both run")
    asked.stop("n2")
    asked.up()
    lost = wait_for_end([job])[job]
    assert queue.cause(lost, "") == queue.Cause("node lost", f"job {job} lost its node n2")
    assert queue.live_jobs()[again].restarts == 1
    assert queue.ended_jobs([again])[again].state == "NODE_FAIL"


@pytest.mark.slurm
def test_time_limit(asked: Cluster, timed_out: str) -> None:
    found = queue.cause(wait_for_end([timed_out], seconds=90)[timed_out], words_of(asked, timed_out))
    assert (found.kind, found.sentence) == ("time limit", f"job {timed_out} reached its time limit of 1 minute")
