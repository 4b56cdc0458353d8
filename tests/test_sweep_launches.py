"""Is each run of a sweep on a real cluster submitted and trained once, whatever happens to those who launch it?"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import tsbench
from slurm_cluster import stand_in, wait_until
from sweeping import MIDDLE, PATIENCE_SECONDS, QUICK, REMIX, TinySuite, assert_nothing_half_written, assert_same_bytes, sessions
from training import exit_codes_of, start_command

from bench import lease
from bench.files import read_json
from bench.runs import read_run

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
BEGUN = 800  # images: well inside of what MIDDLE trains
HALF_AS_FAST = """

_usual = lr_factor


def lr_factor(*place):
    return 0.5 * _usual(*place)
"""
LOOK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from bench.sweeps import make_sweep
print(json.dumps([asdict(status) for status in make_sweep(sys.argv[1], [], Path(sys.argv[2]))[1].statuses()[0].values()]))
"""


def assert_each_trained_once(suite: TinySuite) -> None:
    suite.wait_for("done")
    wait_until(suite.queue_is_empty, "all jobs are over")
    assert [len(sessions(folder)) for folder in suite.run_folders()] == [1] * len(suite.run_folders())
    suite.assert_as_undisturbed()


def jobs_submitted(suite: TinySuite) -> list[str]:
    """Those that are in the queue, and those that have run: the accounting also has what was refused."""
    queued = suite.cluster.run("squeue", "--array", "--noheader", "--format=%i").split()
    return sorted({*queued, *(each.job for each in suite.attempts() if each.started < each.ended)})


def test_a_waiting_element_is_cancelled(tiny_suite: TinySuite) -> None:
    """The accounting never hears of it; the sweep that waits comes to its end, and the next one runs it."""
    tiny_suite.write(REMIX, grid={"seed": [0, 1]}, **MIDDLE)
    tiny_suite.write_profile(array_parallelism=1)
    waiting = tiny_suite.start("--wait")
    statuses = tiny_suite.wait_for("running", "queued")
    (waits,) = list(statuses.values())[1].jobs
    tiny_suite.cluster.run("scancel", waits)
    assert exit_codes_of([waiting], PATIENCE_SECONDS) == [1]
    cancelled = tiny_suite.wait_for("done", "planned")[tiny_suite.run_folders()[1].name]
    assert cancelled.detail in (f"job {waits} was cancelled", f"job {waits} is not known to the cluster any more")
    tiny_suite.sweep()
    assert_each_trained_once(tiny_suite)


def test_a_refused_submission_leaves_nothing(tiny_suite: TinySuite) -> None:
    tiny_suite.write(REMIX, **MIDDLE)
    tiny_suite.write_profile(gpus_per_node=9)
    said = tiny_suite.sweep(code=2)
    assert said.startswith(
        "tsbench: the cluster refuses the job (Requested node configuration is not available): lower `gpus_per"
    )
    assert said.count("\n") == 1
    assert tiny_suite.states() == ["planned"] and not jobs_submitted(tiny_suite)
    assert not list(tiny_suite.folder.rglob("job.json"))
    assert_nothing_half_written(tiny_suite.folder / "results")


def test_of_two_arrays_the_second_is_refused(tiny_suite: TinySuite, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_suite.write(REMIX, grid={"seed": [0, 1, 2]}, **QUICK)
    tiny_suite.write_profile(max_array_elements=2)
    script = 'mkdir {folder}/once && exec {real} "$@"; exec {real} --gpus-per-node=9 "$@"'
    with monkeypatch.context() as patch:
        patch.setenv("PATH", stand_in(tiny_suite.folder, "sbatch", script)["PATH"])
        said = tiny_suite.sweep(code=2)
    assert said.startswith("tsbench: the cluster refuses the job") and said.count("\n") == 1
    claims = [read_json(folder / "job.json", dict) for folder in tiny_suite.run_folders()]
    jobs = [claim["job"] for claim in claims[:2]]
    assert jobs == jobs_submitted(tiny_suite) and not claims[2]
    names, array = ", ".join(folder.name for folder in tiny_suite.run_folders()[:2]), jobs[0].partition("_")[0]
    told = f"; submitted before that, and not undone: job {array} ({names}); the same sweep again submits only the rest\n"
    assert said.endswith(told)
    assert tiny_suite.states()[2] == "planned"
    tiny_suite.sweep()
    assert_each_trained_once(tiny_suite)
    assert [read_json(folder / "job.json", dict) for folder in tiny_suite.run_folders()[:2]] == claims[:2]


def test_two_launches_at_once_submit_each_run_once(tiny_suite: TinySuite) -> None:
    """Several rounds, each with runs of its own. The jobs are held, so that none is over before the other launch looks."""
    tiny_suite.write_profile(additional={"hold": True})
    for num_seeds in (1, 2, 4):
        tiny_suite.write(REMIX, grid={"seed": list(range(num_seeds))}, **QUICK)
        both = [tiny_suite.start() for _ in range(2)]
        assert exit_codes_of(both, PATIENCE_SECONDS) == [0, 0]
        claims = [read_json(folder / "job.json", dict)["job"] for folder in tiny_suite.run_folders()]
        assert jobs_submitted(tiny_suite) == sorted(claims) and len(set(claims)) == num_seeds
    here = tsbench("sweep", tiny_suite.suite, "--cluster", "local", "--runs", tiny_suite.runs)
    assert here.code == 1 and "4 of 4 runs: queued" in here.out
    tiny_suite.cluster.run("scontrol", "release", *claims)
    assert_each_trained_once(tiny_suite)


def test_beside_a_process_on_this_machine(tiny_suite: TinySuite) -> None:
    """A job that finds its run being worked on leaves it alone; when that process dies, the next sweep goes on."""
    tiny_suite.write(REMIX, grid={"seed": [0, 1]}, **MIDDLE)
    tiny_suite.write_profile(additional={"hold": True})
    tiny_suite.sweep()
    first, second = tiny_suite.run_folders()
    jobs = jobs_submitted(tiny_suite)
    here = [start_command("train", str(folder)) for folder in (first, second)]
    for folder, process in zip((first, second), here, strict=True):
        tiny_suite.wait_for_images(BEGUN, folder)
        os.kill(process.pid, signal.SIGSTOP)
    tiny_suite.cluster.run("scontrol", "release", *jobs)
    wait_until(tiny_suite.queue_is_empty, "the jobs are over", PATIENCE_SECONDS)
    assert tiny_suite.states() == ["running", "running"]
    tiny_suite.sweep()
    assert jobs_submitted(tiny_suite) == jobs
    assert [lease.read(folder).pid for folder in (first, second)] == [process.pid for process in here]
    os.kill(here[0].pid, signal.SIGCONT)
    here[1].kill()
    assert exit_codes_of(here, PATIENCE_SECONDS) == [0, -signal.SIGKILL]
    assert tiny_suite.states() == ["done", "planned"]
    tiny_suite.write_profile()
    tiny_suite.sweep()
    tiny_suite.wait_for("done")
    assert [len(sessions(folder)) for folder in (first, second)] == [1, 2]
    tiny_suite.assert_as_undisturbed()


def test_code_that_is_edited_while_a_job_waits(tiny_suite: TinySuite) -> None:
    """The job runs the code that it was submitted with; to the edited code its run is stale, and can start over."""
    tiny_suite.write(REMIX, **QUICK)
    tiny_suite.write_profile(additional={"hold": True})
    checkout = tiny_suite.folder / "checkout"
    for package in ("bench", "methods", "slurm"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    run_from(checkout, tiny_suite, *tiny_suite.command())
    edited = checkout / "bench" / "learning_rate.py"
    edited.write_text(edited.read_text() + HALF_AS_FAST)
    (job,) = tiny_suite.status().jobs
    tiny_suite.cluster.run("scontrol", "release", job)
    tiny_suite.wait_for("done")
    wait_until(tiny_suite.queue_is_empty, "the job is over")
    tiny_suite.assert_as_undisturbed()
    folder = tiny_suite.run_folder()
    (before,), old = sessions(folder), read_run(folder).provenance["code_hash"]
    assert before["snapshot"] == Path(read_json(folder / "job.json", dict)["snapshot"]).name

    tiny_suite.write_profile()
    (stale,) = look_from(checkout, tiny_suite)
    assert stale["state"] == "stale" and stale["changed"] == ["bench/learning_rate.py changed"]
    assert "bench/learning_rate.py" in stale["detail"]
    run_from(checkout, tiny_suite, *tiny_suite.command())
    assert tiny_suite.queue_is_empty()
    run_from(checkout, tiny_suite, *tiny_suite.command("--only", "stale"))
    wait_until((folder / "done").exists, "the run is over", PATIENCE_SECONDS)
    wait_until(tiny_suite.queue_is_empty, "its job, too")
    assert [status["state"] for status in look_from(checkout, tiny_suite)] == ["done"]
    (aside,) = (tiny_suite.runs / "set_aside").iterdir()
    assert_same_bytes(aside, *tiny_suite.undisturbed())
    (after,), new = sessions(folder), read_run(folder).provenance["code_hash"]
    assert new != old and after["snapshot"] != before["snapshot"]
    assert tiny_suite.status().changed == ("bench/learning_rate.py changed",)  # to the code that was not edited


def look_from(checkout: Path, suite: TinySuite) -> list[dict[str, Any]]:
    """What `tsbench status` of that code knows."""
    printed = run_from(checkout, suite, sys.executable, "-c", LOOK, suite.suite, str(suite.runs))
    statuses: list[dict[str, Any]] = json.loads(printed)
    return statuses


def run_from(checkout: Path, suite: TinySuite, *command: str) -> str:
    """What a command with that code prints."""
    environment = suite.cluster.environment | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=suite.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED_BEFORE = "kill -KILL $PPID"
KILLED_AFTER = '{real} "$@"; kill -KILL $PPID'


def test_a_launcher_is_killed_at_any_moment(tiny_suite: TinySuite) -> None:
    """The next launch does what is left, and takes care of jobs whose launcher did not come to note them."""
    tiny_suite.write(REMIX, grid={"seed": [0, 1, 2]}, **MIDDLE)
    tiny_suite.write_profile(max_array_elements=2)
    runs = tiny_suite.run_folders()
    for script, num_jobs in ((KILLED_BEFORE, 0), (KILLED_AFTER, 2)):
        launcher = tiny_suite.start(**stand_in(tiny_suite.folder, "sbatch", script))
        assert exit_codes_of([launcher], PATIENCE_SECONDS) == [-signal.SIGKILL]
        assert [read_json(folder / "job.json", dict).get("job") for folder in runs] == ["", "", None]
        assert len(jobs_submitted(tiny_suite)) == num_jobs
    for moment in (lambda: job_noted(runs[0]), (runs[2] / "job.json").exists, lambda: job_noted(runs[2])):
        launcher = tiny_suite.start()
        wait_until(lambda now=moment, lives=launcher.is_alive: now() or not lives(), "a moment", PATIENCE_SECONDS)
        launcher.kill()
        launcher.join()
    tiny_suite.sweep()
    assert_each_trained_once(tiny_suite)
    assert len(jobs_submitted(tiny_suite)) == 3


def job_noted(folder: Path) -> bool:
    return bool(read_json(folder / "job.json", dict).get("job"))
