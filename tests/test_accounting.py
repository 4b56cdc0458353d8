"""Is it told right how a job ended, and why, from what Slurm prints?"""

import os

import pytest

from slurm import accounting
from slurm.accounting import EndedJob
from slurm.cause import KINDS, cause, last_words

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


def ended(job: str = "5", **fields: object) -> EndedJob:
    values = dict(name="wrap", state="FAILED", cancelled_by=None, exit_code=1, signal=0, nodes="n2", started=1.0, ended=2.0)
    values |= dict(elapsed_seconds=1.0, limit_minutes=None, requested_bytes=100 * 2**20)
    return EndedJob(job, **{**values, **fields})


def step(**fields: object) -> accounting.Step:
    return accounting.Step(**{"name": "0", "state": "FAILED", "exit_code": 0, "signal": 0, "max_bytes": None, **fields})


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
    in_pieces = accounting.last_ended([requeued, ended("30", ended=None)])  # its exit code comes later
    assert (in_pieces.state, in_pieces.followed_by) == ("REQUEUED", "FAILED")


def test_remembered_jobs_as_printed() -> None:
    printed = "4|FAILED|35072|n2|1795235133|1795235143|1-00:01:00|wrap|\n6|FAILED|9|n2|1795235133|N/A|UNLIMITED|wrap|\n"
    by_shell, by_signal = accounting.parse_remembered(printed)
    assert (by_shell.exit_code, by_shell.signal, by_shell.limit_minutes, by_shell.elapsed_seconds) == (137, 0, 1441, 10.0)
    assert (by_signal.exit_code, by_signal.signal, by_signal.limit_minutes, by_signal.elapsed_seconds) == (0, 9, None, None)
    assert cause(by_shell, "").kind == cause(by_signal, "").kind == "killed"


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
    found = cause(job, stderr)
    assert found.kind == kind and kind in KINDS
    assert words in found.sentence and "\n" not in found.sentence


def test_last_words() -> None:
    assert last_words("") == ""
    assert last_words(TRACEBACK) == "KeyError: 3"
    assert last_words(TRACEBACK.partition("\nDuring")[0]) == "bench.journal.Damaged: no such weights"
    assert last_words("one\ntwo\nslurmstepd-n1: error: *** JOB 3 ON n1 CANCELLED ***\n\n") == "two"
