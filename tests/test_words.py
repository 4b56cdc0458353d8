"""Is it told what failed code wrote last, and nothing that an earlier attempt of its job wrote?"""

import subprocess
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench.files import write_json_atomically
from bench.sweep_views import print_status
from slurm.accounting import EndedJob
from slurm.cause import SAY_START, START, since_last_start
from slurm.claims import Claim, Work
from slurm.profile import Profile
from slurm.states import Known, Status, status_of
from slurm.submit import batch_script
from slurm.sweep import Item, Sweep

BUDGET = {"unit": "images", "amount": 1000}
KILLED = "srun: error: n1: task 0: Killed\n"
TOO_MUCH = "slurmstepd-n1: error: StepId=5.0 exceeded memory limit (328335360 > 104857600), being killed\n"
TRACEBACK = """\
Traceback (most recent call last):
  File "x.py", line 8, in <module>
    main()
  File "x.py", line 5, in main
    load(0)
    ~~~~^^^
KeyError: 'lost'
srun: error: n1: task 0: Exited with exit code 1
"""
END = ('  File "x.py", line 5, in main', "    load(0)", "KeyError: 'lost'")


def start(number: int) -> str:
    return f"tsbench: start {number} of this job\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that was given to job 5."""
    (tmp_path / "config.yaml").write_text("{method: dense, seed: 0, budget: {}, diffusion: {}}\n")
    write_json_atomically(tmp_path / "job.json", asdict(Claim("tsbench-1", 0, "login1", 1, time.time(), "5", str(tmp_path))))
    return tmp_path


def status(folder: Path, *errors: str, exit_code: int = 1, signal: int = 0) -> Status:
    """After job 5 has failed, whose ranks have written these errors."""
    for rank, text in enumerate(errors):
        (folder / f"5_{rank}_log.err").write_text(text)
    ended = EndedJob("5", "tsbench-1", "FAILED", None, exit_code, signal, "n1", 100.0, 160.0, 60.0, 20, 10**9)
    return status_of([Work(folder, folder)], Known({}, {"5": ended}), lambda run: [], BUDGET)


def test_an_earlier_attempt_does_not_change_the_cause(folder: Path) -> None:
    """A task that was killed, and one that took too much memory; then a set-up that fails, which no new attempt mends."""
    first = start(1) + start(1) + TOO_MUCH + KILLED
    assert status(folder, first).kind == "killed"
    assert status(folder, first, signal=9).kind == "memory"
    told = status(folder, first + "half a line" + start(2) + "module: not found\n", exit_code=3)
    assert (told.kind, told.resumable) == ("code", False)
    assert told.detail == "job 5 failed with exit code 3: module: not found" and told.lines == ("module: not found",)
    assert status(folder, first + start(2), signal=9).kind == "killed"  # and not memory


def test_a_rank_that_did_not_start_again_has_said_nothing(folder: Path) -> None:
    first = [start(1) + start(1) + KILLED, start(1) + "[rank1]: " + TRACEBACK]
    told = status(folder, first[0] + start(2) + "module: not found\n", first[1], exit_code=3)
    assert told.detail.endswith("exit code 3: module: not found")
    assert since_last_start(["of jobs that", "were submitted before this was marked"])[1].startswith("were")
    assert since_last_start([]) == []


def test_batch_script_and_ranks_say_when_they_start(tmp_path: Path) -> None:
    text = batch_script(Profile(device="cpu", python="true"), "a", tmp_path, tmp_path, 1)
    assert text.index("set -e\n") < text.index(f"\n{SAY_START}\n") < text.index("\nsrun ")
    command = "bash -c " + text.partition("\nsrun ")[2].partition(" bash -c ")[2]
    for environment, number in (({}, "1"), ({"SLURM_RESTART_COUNT": "2"}, "3")):
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
        assert START.findall(done.stderr) == [number]


def test_the_last_lines_of_a_traceback_stand_below_the_table(folder: Path) -> None:
    """Where it was raised, and what; also of a failure that the run has noted itself."""
    told = status(folder, start(1) + start(1) + TRACEBACK)
    assert (told.kind, told.lines) == ("code", END)
    write_json_atomically(folder / "failure.json", {"state": "failed", "cause": "KeyError: 'lost'"})
    told = status(folder)
    assert told == Status("failed", "KeyError: 'lost'", kind="code", lines=END)
    shown, item = StringIO(), Item("dense-1", "Dense", folder, 0, BUDGET, 1)
    print_status(Console(file=shown, width=100), Sweep([item], lambda run: []), {"dense-1": told}, "suite")
    assert (
        "\ndense-1: KeyError: 'lost'\n      File \"x.py\", line 5, in main\n        load(0)\n    KeyError: 'lost'\n"
        in shown.getvalue()
    )


def test_a_failure_without_a_job_has_no_lines_of_one(folder: Path) -> None:
    """After the job, a process of this machine worked on the run, and failed otherwise."""
    write_json_atomically(folder / "failure.json", {"state": "failed", "cause": "no such weights"})
    assert status(folder, start(1) + TRACEBACK) == Status("failed", "no such weights", kind="code")
