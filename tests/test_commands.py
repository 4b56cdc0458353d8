"""What if the cluster answers late, never, or with a refusal?"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slurm import commands, queue
from slurm.queue import LiveJob

# Printed by Slurm 22.05.8: a job whose name holds bars and a line's end, an array with an element that runs, held ones.
SQUEUE = """\
8|RUNNING|None|n1|1795235133|UNLIMITED|0|a|b
second line|
9|PENDING|job requeued in held state|||N/A|1|wrap|
1_0|COMPLETING|None|n[1-2]|1795235133|364-23:59:57|2|tsbench-1|
1_2|PENDING|JobArrayTaskLimit||N/A|1:30|0|tsbench-1|
"""
LONG_SECONDS = 300.0  # what takes seconds on an idle machine is over by then


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


def test_live_jobs_as_printed() -> None:
    jobs = queue.parse_live(SQUEUE)
    assert list(jobs) == ["8", "9", "1_0", "1_2"]
    assert jobs["8"] == LiveJob("8", "a|b", "RUNNING", "", "n1", 1795235133.0, None, 0)
    assert jobs["9"] == LiveJob("9", "wrap", "PENDING", "job requeued in held state", "", None, None, 1)
    assert jobs["1_0"].seconds_left == 364 * 86400 + 86397
    assert jobs["1_2"].seconds_left == 90


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("error: Batch job submission failed: Requested node configuration is not available", "`gpus_per_node`"),
        (
            "error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: ...",
            "`memory_gb`",
        ),
        ("error: Invalid generic resource (gres) specification", "`gres`"),
        ("error: Batch job submission failed: Invalid feature specification", "`constraint`"),
        ("error: Batch job submission failed: Invalid partition name specified", "correct `partition`; `sinfo"),
        (
            "error: Batch job submission failed: Invalid account or account/partition combination specified",
            "correct `account`",
        ),
        ("error: Batch job submission failed: Invalid qos specification", "`qos`"),
        ("error: Batch job submission failed: Invalid job array specification", "`max_array_elements`"),
        (
            "error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or "
            "time limits)",
            "account and qos allow",
        ),
        (
            "error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "lower `minutes`",
        ),
        ("error: Batch job submission failed: Unable to contact slurm controller (connect failure)", "controller is up"),
        ("sbatch: unrecognized option '--nosuch'\nTry \"sbatch --help\" for more information", "`additional`"),
        ("error: something new", "change the profile"),
        ("", "it does not say why"),
    ],
)
def test_refusals(stderr: str, advice: str) -> None:
    sentence = queue.submission_error(stderr)
    assert advice in sentence
    assert sentence.startswith("the cluster refuses the job (") and "sbatch:" not in sentence and "\n" not in sentence


def test_asks_again_after_a_failure(pretend: Callable[[str, str], Path], tmp_path: Path) -> None:
    calls = pretend(
        "squeue",
        f'[ -e {tmp_path}/up ] || {{ touch {tmp_path}/up; echo "error" >&2; exit 1; }}; echo "8|RUNNING|None|n1|1|1:00|0|a|"',
    )
    assert list(queue.live_jobs(patience_seconds=LONG_SECONDS)) == ["8"]
    assert list(queue.live_jobs(["b"])) == []
    assert len(calls.read_text().splitlines()) == 3


def test_gives_up_in_one_sentence(pretend: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slept = [0.0]  # all the time that passes
    monkeypatch.setattr(commands, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    calls = pretend("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(queue.ClusterUnreachable, match=r"does not answer squeue .*Unable to contact") as caught:
        queue.live_jobs(patience_seconds=1.25)
    assert "\n" not in str(caught.value)
    assert len(calls.read_text().splitlines()) == 3  # at once, after a pause, and when patience ends


def test_never_hangs(pretend: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("squeue", "sacct", "scontrol"):
        pretend(name, "exec sleep 3600")
    monkeypatch.setattr(commands.call, "__kwdefaults__", {"seconds": 0.3})
    monkeypatch.setattr(queue, "PING_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(queue.ClusterUnreachable, match=r"no answer within 0\.3 s"):
        queue.live_jobs(patience_seconds=0.5)
    with pytest.raises(queue.AccountingUnavailable, match=r"no answer within 0\.3 s"):
        queue.ended_jobs(["8"])
    assert queue.cluster_is_here() == (False, "no answer within 0.3 s")
    assert queue.max_array_size() is None
    assert not queue.requeue("8", tries=1)
    assert time.monotonic() - began < LONG_SECONDS


def test_what_a_command_said_before_it_took_too_long_is_told(pretend: Callable[[str, str], Path]) -> None:
    pretend("squeue", "echo retrying >&2; exec sleep 3600")
    for seconds in (0.3, 3.0, 30.0, LONG_SECONDS):
        done = commands.call("squeue", seconds=seconds)
        assert done.returncode == commands.TOO_LONG and done.stderr in ("retrying", f"no answer within {seconds:g} s")
        if done.stderr == "retrying":
            return
    pytest.fail("it had time to say so")


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.cluster_is_here() == (False, "sbatch, squeue, sacct, scontrol, scancel not on the PATH")
    assert queue.max_array_size() is None
    with pytest.raises(queue.ClusterUnreachable, match="not on the PATH"):
        queue.live_jobs()
    with pytest.raises(queue.AccountingUnavailable, match="not on the PATH"):
        queue.ended_jobs(["8"])


def test_how_large_an_array_may_be(pretend: Callable[[str, str], Path]) -> None:
    pretend("scontrol", "echo 'MaxArrayTasks = 7\nMaxArraySize            = 1001\nMaxBatchRequeue         = 5'")
    assert queue.max_array_size() == 1001
    pretend("scontrol", "exit 1")
    assert queue.max_array_size() is None


def test_a_controller_that_is_down_gets_time(pretend: Callable[[str, str], Path], tmp_path: Path) -> None:
    for name in queue.COMMANDS:
        pretend(name, "exit 1")
    up = tmp_path / "up"
    pretend("scontrol", f"[ -e {up} ] && echo 'Slurmctld(primary) at c1 is UP' && exit; touch {up}; echo '... is DOWN'; exit 1")
    assert queue.cluster_is_here(patience_seconds=0) == (False, "its controller does not answer")
    up.unlink()
    assert queue.cluster_is_here() == (True, "")


def test_a_users_own_filters_do_not_count(pretend: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_CLUSTERS", "big")
    pretend("squeue", 'echo "1|$SQUEUE_STATES|$SLURM_CLUSTERS|n1|1|1:00|0|a|"')
    assert (queue.live_jobs()["1"].state, queue.live_jobs()["1"].reason) == ("", "big")


def test_jobs_in_a_hidden_partition_live(pretend: Callable[[str, str], Path]) -> None:
    """Which squeue leaves out, unless it is asked for all."""
    printed = {
        "--array": "9|RUNNING|None|n1|1|1:00|0|a|",
        "--states=RUNNING": "9 9",
        "--states=all": "9|FAILED|256|n1|1|2|1:00|a|",
    }
    answers = "".join(f"*{option}*) echo '{line}';; " for option, line in reversed(printed.items()))
    pretend("squeue", f'case "$*" in *--all*) case "$*" in {answers} esac;; esac')
    assert list(queue.live_jobs()) == ["9"] and not queue.job_is_being_ended("9")
    assert queue.recently_ended(["9"])["9"].exit_code == 1


def test_cancelling_asks_the_queue_who_is_left(pretend: Callable[[str, str], Path]) -> None:
    calls = pretend("scancel", 'echo "scancel: error: Kill job error on job id 9: Invalid job id specified" >&2; exit 1')
    pretend("squeue", 'echo "9|COMPLETING|None|n1|1|1:00|0|a|"')
    queue.cancel(["9", "8", "12_3"])
    assert calls.read_text() == "12_3 8 9\n"
    pretend("squeue", 'echo "12_3|PENDING|None|n1|1|1:00|0|a|"')
    with pytest.raises(queue.ClusterUnreachable, match="cancelling 1 of the jobs fails"):
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
