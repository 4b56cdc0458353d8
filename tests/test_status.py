"""What does a person without a cluster meet at `tsbench status`, `logs` and `cancel`?"""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from command import assert_refused, tsbench
from sweeps_here import FILE, TWO, folders, hold_elsewhere, make_stale, row_of, sweep, write_suite

from bench import sweeps
from bench.files import write_json_atomically
from bench.runs import Run
from slurm.claims import Claim

pytestmark = pytest.mark.usefixtures("no_slurm")


def test_status_tells_how_far_runs_are_and_what_to_type(swept: Path) -> None:
    runs, suite = swept / "results" / "runs", swept / "suite.yaml"
    fresh = tsbench("status", suite, "--runs", swept / "nothing")
    assert fresh.code == 0 and not fresh.err and fresh.out.startswith("2 planned\n")
    assert fresh.out.endswith(f"tsbench sweep {suite} --runs {swept / 'nothing'} --cluster slurm\n")
    done = tsbench("status", suite, "--runs", runs)
    assert done.code == 0 and done.out.startswith("2 done\n") and "tsbench sweep" not in done.out
    stale, failed = folders(runs)
    make_stale(stale)
    (failed / "done").unlink()
    write_json_atomically(failed / "failure.json", {"state": "failed", "cause": "no [luck]"})
    status = tsbench("status", suite, "--runs", runs, "--watch")
    assert status.code == 0 and status.out.startswith("1 stale, 1 failed\n")
    assert f"\n{stale.name}: made by other code: {FILE} changed\n" in status.out
    assert f"\n{failed.name}: no [luck]\n" in status.out
    assert f"tsbench logs {failed.name}\n" in status.out
    assert "--only failed\n" in status.out and "--only stale\n" in status.out and "Start what is left" not in status.out


def test_status_watches_until_nothing_runs(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another machine holds is running, until it is done."""
    runs = swept / "results" / "runs"
    done, other = folders(runs)
    (other / "done").unlink()
    hold_elsewhere(other)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            shutil.rmtree(other / "lease")
            (other / "done").touch()

    monkeypatch.setattr(sweeps.time, "sleep", sleep)
    status = tsbench("status", swept / "suite.yaml", "--runs", runs, "--watch")
    assert status.code == 0 and len(looks) == 3
    lines = status.out.splitlines()
    assert lines[0].endswith(f"{done.name} Dense: done")
    assert f"{other.name} Masked: running" in lines[1]
    assert lines[2] == "2 done"  # a line is printed when something changes


def test_a_sweep_leaves_alone_what_another_machine_works_on(swept: Path) -> None:
    runs = swept / "results" / "runs"
    other = folders(runs)[1]
    (other / "done").unlink()
    hold_elsewhere(other)
    outcome = sweep(swept / "suite.yaml", runs)
    assert outcome.code == 1 and "1 of 2 runs: running\n" in outcome.out  # not done, and so no success
    assert tsbench("cancel", swept / "suite.yaml", "--runs", runs).out == CANCELLED_NOTHING


CANCELLED_NOTHING = "cancelled 0 jobs, ended 0 processes on this machine\n"


def test_jobs_of_a_cluster_that_is_not_here_are_not_judged(swept: Path) -> None:
    """As on a laptop, to which results were copied."""
    runs = swept / "results" / "runs"
    other = folders(runs)[1]
    (other / "done").unlink()
    write_json_atomically(other / "job.json", asdict(Claim("tsbench-1", 0, "login1", 1, 0.0, "12_3", str(swept), "")))
    status = tsbench("status", swept / "suite.yaml", "--runs", runs)
    assert status.code == 0 and f"{other.name}: was given to job 12_3 of a cluster that cannot be asked\n" in status.out
    assert status.err.startswith("warning: no cluster can be asked what became of jobs (sbatch, ") and status.err.count("\n") == 1
    cancelled = tsbench("cancel", swept / "suite.yaml", "--runs", runs)
    said = status.err.replace("warning: ", "tsbench: jobs could not be cancelled: ")
    assert (cancelled.code, cancelled.out, cancelled.err) == (1, CANCELLED_NOTHING, said)


def test_logs_are_found_by_the_beginning_of_a_runs_id(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept / "results" / "runs"
    dense, masked = folders(runs)
    assert_refused(tsbench("logs", dense.name, "--runs", runs), "printed anything", "tsbench status")
    (dense / "log.txt").write_text("".join(f"line {n}\n" for n in range(50)))
    for name in (dense.name, dense.name[:6], str(dense)):
        shown = tsbench("logs", name, "--runs", runs, "--lines", 2)
        assert shown.code == 0 and shown.out == f"==> {dense / 'log.txt'} <==\nline 48\nline 49\n"
    assert tsbench("logs", dense.name, "--runs", runs, "--lines", 0).out.count("line") == 50
    for name, words in (
        ("d", ("'d' names 2 runs", dense.name, masked.name)),
        ("nothing", ("'nothing' names no runs",)),
        (f"{dense.name}:two", ("expert 'two'", "give its number")),
    ):
        assert_refused(tsbench("logs", name, "--runs", runs), *words)
    assert_refused(tsbench("cancel", "nothing", "--runs", runs), "'nothing' names no runs", "give a suite, one run's id")


def test_logs_of_jobs_and_of_experts(tmp_path: Path) -> None:
    """Each job's output and errors; of a run whose experts have jobs of their own, those of all or of one."""
    suite, runs = write_suite(tmp_path, TWO[0]), tmp_path / "runs"
    folder = runs / "dense-0123456789"
    for expert, job in ((0, "12_0"), (1, "12_1")):
        place = folder / "experts" / str(expert)
        place.mkdir(parents=True)
        write_json_atomically(place / "job.json", asdict(Claim("tsbench-1", expert, "login1", 1, 0.0, job, str(tmp_path), "")))
        for end in ("out", "err"):
            (tmp_path / f"{job}_0_log.{end}").write_text(f"{end} of {job}\n")
    (folder / "config.yaml").write_text(suite.read_text())
    assert re.findall("(?:out|err) of .*", tsbench("logs", "dense", "--runs", runs).out) == [
        *("out of 12_0", "err of 12_0", "out of 12_1", "err of 12_1"),
    ]
    assert re.findall("(?:out|err) of .*", tsbench("logs", "dense:1", "--runs", runs).out) == ["out of 12_1", "err of 12_1"]
    assert_refused(tsbench("logs", "dense:2", "--runs", runs), "no job of dense:2 has printed anything")
    for command in ("logs", "cancel"):  # an empty variable of a shell script is no beginning of an id
        assert_refused(tsbench(command, "", "--runs", runs), "'' names no runs")


def test_cancel_ends_the_processes_of_this_machine_which_save(tmp_path: Path) -> None:
    """Then the same sweep goes on from there."""
    suite = write_suite(tmp_path, {**TWO[0], "budget": {"amount": 32_000_000}, "system": {"log_every": 1}})
    runs = tmp_path / "results" / "runs"
    command = [sys.executable, "-m", "bench", "sweep", str(suite), "--cluster", "local", "--runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while not any(Run(folder).images_seen for folder in folders(runs)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        (folder,) = folders(runs)
        status = tsbench("status", suite, "--runs", runs)
        assert status.out.startswith("1 running")
        assert re.search(r" running +\d+% +(\d+ h \d+|< 1|\d+) min", row_of(status, folder))
        assert "1 of 1 runs: running" in sweep(suite, runs).out
        assert tsbench("cancel", folder.name, "--runs", runs).out == "cancelled 0 jobs, ended 1 process on this machine\n"
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 1 and f"tsbench: run {folder.name} failed: " in err and "stopped after step" in err
    (step,) = (path.stem.removeprefix("step-") for path in list((folder / "checkpoints").glob("step-*.safetensors"))[-1:])
    assert 0 < int(step) < 1_000_000 and not (folder / "lease").exists()
    status = tsbench("status", suite, "--runs", runs)
    assert status.out.startswith("1 planned") and f"{folder.name}: goes on from " in status.out
