"""What does a person without a cluster meet at `tsbench sweep`?"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import assert_refused, tsbench
from rich.console import Console
from sweeps_here import BASE, DIVERGES, FILE, OTHER_CODE, TWO, folders, made, make_stale, row_of, sweep, write_suite
from training import differing, saved

from bench.files import read_json, write_json_atomically
from bench.launch import Launch
from bench.planning import plan_runs
from bench.runs import Run
from bench.sweeps import make_sweep
from slurm.profile import load_profile

pytestmark = pytest.mark.usefixtures("no_slurm")

# The plan


def test_the_plan_of_the_demo_on_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each run costs, and the batch script, from a machine without Slurm; nothing is written."""
    monkeypatch.chdir(tmp_path)
    outcome = tsbench("sweep", "demo", "--cluster", "slurm", "--dry-run")
    assert outcome.code == 0 and not outcome.err
    assert not list(tmp_path.iterdir())
    table, _, script = outcome.out.partition("#!/bin/bash\n")
    assert table.startswith("6 runs; to start: 6, in ")
    (row,) = [line for line in table.splitlines() if line.startswith("dense-")]
    # 8000 steps of 32 images; TFLOPs are counted in test_flops; 0.05 TFLOP/s in the profile; 0.6M parameters.
    assert re.fullmatch(r"dense-\w+ +Dense DiT +planned +256,000 +11\.6 +0\.0645 +0\.03\d*", row)
    assert all(len(line) <= 80 for line in table.splitlines() if not line.startswith("*"))
    lines = script.splitlines()
    results = tmp_path / "results"
    for option in (
        *("array=0-5%4", "cpus-per-task=1", "mem=2560MB", "nodes=1", "ntasks-per-node=1", "partition=main", "time=20"),
        *("requeue", "signal=USR2@30", "open-mode=append", "job-name=tsbench-TOKEN"),
        f"output={results}/jobs/demo/%A_%a_0_log.out",
    ):
        assert f"#SBATCH --{option}" in lines
    set_up = lines[lines.index("# setup") + 1 : lines.index("# command")]
    assert set_up[0] == "set -e"
    assert f"export PYTHONPATH={results}/code/CODE-HASH${{PYTHONPATH:+:$PYTHONPATH}}" in set_up
    command = lines[-1]
    assert command.startswith("srun ") and command.endswith(f"-m submitit.core._submit {results}/jobs/demo")
    assert sys.executable in command and 'trap "" USR2' in command
    assert (
        subprocess.run(["/bin/bash", "-n"], input=outcome.out.partition("\n\n")[2].partition("\n\n")[2], text=True).returncode
        == 0
    )


def test_the_plan_follows_the_profile_and_the_settings(tmp_path: Path) -> None:
    """Four ranks share a batch; arrays are cut to what the cluster takes; a grid's points are runs of their own."""
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "{partition: debug, account: me, nodes: 2, tasks_per_node: 2, minutes: 90, signal_seconds: 60, device: cpu, "
        "max_array_elements: 3, array_parallelism: 2, teraflops: 0.01, setup: [module load x]}"
    )
    suite = write_suite(tmp_path, *TWO, grid={"seed": [0, 1]})
    outcome = sweep(suite, tmp_path / "runs", "--profile", profile, "--dry-run", "budget.amount=128", cluster="slurm")
    assert outcome.code == 0 and not outcome.err
    assert outcome.out.startswith("4 runs; to start: 4,") and outcome.out.count("  128  ") == 4
    assert "\nThe batch script of the first of 2 arrays (" in outcome.out
    for option in ("array=0-2%2", "nodes=2", "ntasks-per-node=2", "time=90", "signal=USR2@60", "partition=debug", "account=me"):
        assert f"#SBATCH --{option}\n" in outcome.out
    assert outcome.out.index("set -e\n") < outcome.out.index("module load x\n") < outcome.out.index("export PYTHONPATH")
    refused = sweep(suite, tmp_path / "runs", "--profile", profile, "--dry-run", "train.batch_size=2", cluster="slurm")
    assert_refused(refused, "batch_size 2 cannot be shared equally by 4 ranks", "a multiple of 4")


def test_the_jobs_of_a_suite_with_a_dot_in_its_name_write_into_a_folder_of_their_own(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, TWO[0]).rename(tmp_path / "paper.table1.yaml")
    outcome = sweep(suite, tmp_path / "runs", "--dry-run", cluster="slurm")
    assert "/jobs/paper.table1/%" in outcome.out


def test_one_run_alone_is_no_array(tmp_path: Path) -> None:
    outcome = sweep(write_suite(tmp_path, TWO[0]), tmp_path / "runs", "--dry-run", cluster="slurm")
    assert "#SBATCH" in outcome.out and "--array" not in outcome.out


def test_the_plan_of_what_is_done_has_nothing_to_submit(swept: Path) -> None:
    outcome = sweep(swept / "suite.yaml", swept / "results" / "runs", "--dry-run", cluster="slurm")
    assert outcome.code == 0 and outcome.out.startswith("2 runs; to start: 0, in 0 device-hours")
    assert "#SBATCH" not in outcome.out and outcome.out.count(" done ") == 2
    outcome = sweep(swept / "suite.yaml", swept / "results" / "runs", "--dry-run", "seed=3", cluster="local")
    assert outcome.out.startswith("2 runs; to start: 2,") and "#SBATCH" not in outcome.out


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--cluster", "local"], ("there is no suite 'nothing'", "demo-quick")),
        (["demo"], ("--cluster",)),
        (["demo", "--cluster", "cloud"], ("'cloud'", "slurm", "inline")),
        (["demo", "--cluster", "slurm", "--profile", "h200"], ("no cluster profile 'h200'", "a100", "local")),
        (["demo", "--cluster", "local", "--workers", "0"], ("--workers is 0", "at least 1")),
        (["demo", "--cluster", "inline", "--workers", "2"], ("--workers is for --cluster local, not inline", "leave it out")),
        (["demo", "--cluster", "local", "--wait"], ("--wait is for --cluster slurm", "leave it out")),
        (["demo", "--cluster", "local", "tran.lr=3"], ("there is no setting tran", "train")),
        (["SUITE", "--cluster", "inline", "--only", "newest"], ("'newest' names no run", "planned, failed, stale", "dense-")),
        (["SUITE", "--cluster", "inline", "--only", "d"], ("'d' names more than one run", "dense-", "dtr-")),
        (["SUITE", "--cluster", "inline", "budget.amount=70"], ("not a whole number of steps", "64")),
        (["SUITE", "--cluster", "slurm"], ("no Slurm cluster here", "sbatch", "slurm/local_cluster.sh", "--cluster local")),
    ],
    ids=str,
)
def test_what_is_not_possible_is_one_sentence_and_writes_nothing(
    arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    suite = write_suite(tmp_path, *TWO)
    given = [str(suite) if word == "SUITE" else word for word in arguments]
    assert_refused(tsbench("sweep", *given, "--runs", tmp_path / "runs"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]


@pytest.mark.parametrize(
    "command", [("sweep", "--cluster", "slurm", "--dry-run"), ("status",), ("cancel",), ("logs",), ("collect",)]
)
def test_a_folder_of_runs_that_is_a_file_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    assert_refused(tsbench(*command, "demo", "--runs", tmp_path / "runs"), f"--runs is {tmp_path / 'runs'}, which is a file")


def test_budgets_are_compared_in_every_group_of_a_run(tmp_path: Path) -> None:
    """One that is in two groups is one run, and refused in the first although it fits into the second."""
    longer = {**TWO[1], "budget": {"amount": 128}}
    suite = tmp_path / "suite.yaml"
    groups = {"one": {"methods": [TWO[0], longer]}, "two": {"methods": [TWO[0], {"method": "dit_moe"}]}}
    suite.write_text(yaml.safe_dump({"base": BASE, "groups": groups}))
    words = ("the budgets of group one are not equal within 1%", "(Dense) has 64 images", "(Masked) has 128 images")
    for more in ((), ("--dry-run",)):
        assert_refused(sweep(suite, tmp_path / "runs", *more), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]
    plan = sweep(suite, tmp_path / "runs", "--dry-run", "budget.amount=64")
    assert plan.out.startswith("3 runs; to start: 3,") and plan.out.count(" Dense ") == 1


@pytest.mark.parametrize("command", ["sweep", "status", "cancel", "logs"])
def test_help_tells_a_newcomer_what_to_type(command: str) -> None:
    outcome = tsbench(command, "--help")
    assert outcome.code == 0 and not outcome.err and outcome.out.startswith(f"usage: tsbench {command} ")


# Sweeps in this process


def test_the_same_sweep_again_runs_nothing(swept: Path) -> None:
    runs = swept / "results" / "runs"
    before = made(runs)
    for cluster in ("inline", "local"):
        outcome = sweep(swept / "suite.yaml", runs, cluster=cluster)
        assert outcome.code == 0 and outcome.out.startswith("2 of 2 runs: done\n")
    assert made(runs) == before


def test_an_edited_config_is_another_run_and_what_is_shared_is_not_run_again(swept: Path) -> None:
    runs = swept / "results" / "runs"
    first = folders(runs)
    before = made(runs)
    other = write_suite(swept, {**TWO[0], "label": "Other name"}, {**TWO[1], "train": {"lr": 0.01}}, name="other")
    outcome = sweep(other, runs)
    assert outcome.code == 0 and outcome.out.startswith("1 of 2 runs: done\n")
    (new,) = set(folders(runs)) - set(first)
    assert Run(new).config["train"]["lr"] == 0.01 and new.name.startswith("dtr-")
    assert {path: at for path, at in made(runs).items() if not path.startswith(str(new))} == before
    assert row_of(outcome, first[0]).startswith("Other name") and " done " in row_of(outcome, new)


def test_a_run_that_is_scored_otherwise_is_scored_again_and_not_trained(swept: Path) -> None:
    """Scoring is no part of a run's id: done is what is scored as this suite wants it."""
    runs = swept / "results" / "runs"
    trained = {folder: saved(folder)[0] for folder in folders(runs)}
    other = ("evaluation.seed=5", "--only", folders(runs)[0].name)
    plan = sweep(swept / "suite.yaml", runs, *other, "--dry-run")
    assert plan.out.startswith("2 runs; to start: 1, in 0 device-hours\n")  # of training
    assert row_of(plan, folders(runs)[0]).split()[:2] == ["Dense", "planned"]
    status = tsbench("status", swept / "suite.yaml", "--runs", runs, "evaluation.seed=5")
    assert status.out.startswith("2 planned") and "trained; to be scored under these settings" in status.out
    outcome = sweep(swept / "suite.yaml", runs, *other)
    assert outcome.code == 0 and outcome.out.startswith("1 of 2 runs: not asked for\n")
    assert [record["protocol"]["seed"] for record in Run(folders(runs)[0]).evaluations] == [0, 5]
    assert all(not differing(saved(folder)[0], tensors) for folder, tensors in trained.items())
    assert tsbench("status", swept / "suite.yaml", "--runs", runs).out.startswith("2 done")


def test_a_run_that_fails_stops_no_other(tmp_path: Path) -> None:
    """It is not tried again without being asked to, and its cause stays to be seen."""
    runs = tmp_path / "results" / "runs"
    suite = write_suite(tmp_path, DIVERGES, *TWO)
    outcome = sweep(suite, runs)
    bad, good, masked = sorted(folders(runs), key=lambda folder: (folder / "done").exists() + 2 * folder.name.startswith("dtr"))
    assert outcome.code == 1
    assert outcome.err.startswith(f"tsbench: run {bad.name} failed: loss term 'mse' is ") and outcome.err.count("\n") == 1
    assert row_of(outcome, bad).startswith("Too fast  diverged") and " done " in row_of(outcome, good)
    assert f"{bad.name}: loss term 'mse' is " in outcome.out and f"tsbench logs {bad.name}" in outcome.out
    before = made(runs)
    again = sweep(suite, runs)
    assert again.code == 1 and not again.err
    assert again.out.startswith("1 of 3 runs: diverged (see `tsbench status`)\n2 of 3 runs: done\n")
    assert made(runs) == before
    assert sweep(suite, runs, "--only", masked.name).code == 0  # it is done, and no more was asked for
    assert sweep(suite, runs, "--only", bad.name).err.startswith(f"tsbench: run {bad.name} failed: ")


def test_only_what_is_asked_for(swept: Path) -> None:
    """One run is stale, one has failed, one is planned: each is started by its word."""
    runs, suite = swept / "results" / "runs", write_suite(swept, *TWO, {**TWO[0], "label": "New", "seed": 7})
    stale, failed = folders(runs)
    make_stale(stale)
    (failed / "done").unlink()
    write_json_atomically(failed / "failure.json", {"state": "failed", "cause": "no luck"})
    plan = sweep(suite, runs, "--dry-run")
    assert "to start: 1," in plan.out
    for run, reason in ((stale, "stale (start it over with --only stale)"), (failed, "failed (see `tsbench status`)")):
        assert f"\n{run.name}: {reason}\n" in plan.out
    (planned,) = re.findall(r"^(\S+) +New ", plan.out, re.MULTILINE)
    by_word = {"planned": planned, "failed": failed.name, "stale": stale.name}
    for only in (["planned"], ["failed"], ["stale"], ["stale", "planned"], [*by_word]):
        plan = sweep(suite, runs, "--dry-run", "--only", *only)
        left = {run_id for word, run_id in by_word.items() if word not in only}
        assert f"to start: {len(only)}," in plan.out and {*re.findall(r"^(\S+): not asked for$", plan.out, re.MULTILINE)} == left
    outcome = sweep(suite, runs, "--only", "stale")
    assert outcome.code == 0 and outcome.out.startswith("2 of 3 runs: not asked for\n")
    assert row_of(outcome, stale).split()[:2] == ["Dense", "done"]
    (aside,) = (runs / "set_aside").iterdir()
    assert aside.name.startswith(stale.name) and read_json(aside / "provenance.json", dict)["code_files"][FILE] == OTHER_CODE
    assert read_json(stale / "provenance.json", dict)["code_files"][FILE] != OTHER_CODE
    outcome = sweep(suite, runs, "--only", failed.name, "evaluation.seed=9")  # words after --only may be settings
    assert outcome.code == 0 and not (failed / "failure.json").exists() and (failed / "done").exists()
    assert Run(failed).evaluations[-1]["protocol"]["seed"] == 9


def test_of_two_launches_that_start_over_one_sets_aside(swept: Path) -> None:
    """The second looked before the first began, and acts when that has made its runs anew."""
    runs, suite = swept / "results" / "runs", swept / "suite.yaml"
    make_stale(folders(runs)[0])
    in_groups, second = make_sweep(str(suite), [], runs)
    statuses, _ = second.statuses()
    launch = Launch("suite", "suite", plan_runs(in_groups), second, load_profile("local"), runs.parent, Console())
    assert sweep(suite, runs, "--only", "stale").code == 0
    before = {folder: (folder / "done").stat().st_mtime_ns for folder in folders(runs)}
    assert launch.in_this_process(second.choose(statuses, ["stale"]), statuses) == 0
    assert {folder: (folder / "done").stat().st_mtime_ns for folder in before} == before
    assert len(list((runs / "set_aside").iterdir())) == 1


# Side by side


def test_followers_start_from_what_came_before_and_failures_stop_no_other(tmp_path: Path) -> None:
    """Four processes on this machine: one run, one that starts from its weights, one that diverges, one that waits for that."""
    groups = {
        "first": {"methods": [{**TWO[0], "name": "source"}, {**DIVERGES, "name": "bad"}]},
        "second": {
            "methods": [
                {"method": "multi_expert", "label": "Follower", "start_from": "source", "options": {"experts": 2}},
                {"method": "multi_expert", "label": "Orphan", "start_from": "bad", "options": {"experts": 2}},
            ]
        },
    }
    suite, runs = tmp_path / "suite.yaml", tmp_path / "results" / "runs"
    suite.write_text(yaml.safe_dump({"base": BASE, "groups": groups}))
    outcome = sweep(suite, runs, "--workers", 2, cluster="local")
    assert outcome.code == 1, outcome
    by_label = {Run(folder).label: folder for folder in folders(runs)}
    assert {label for label, folder in by_label.items() if (folder / "done").exists()} == {"Dense", "Follower"}
    assert Run(by_label["Follower"]).config["train"]["init_from"] == f"run:{by_label['Dense'].name}"
    assert Run(by_label["Follower"]).summary["initial_flops"] == Run(by_label["Dense"]).summary["train_flops"]
    bad, orphan = by_label["Too fast"].name, by_label["Orphan"].name
    assert sorted(line.partition(" failed: ")[0] for line in outcome.err.splitlines()) == sorted(
        (f"tsbench: run {bad}", f"tsbench: run {orphan}")
    )
    assert f"tsbench: run {orphan} failed: it starts from {bad}, which is not done" in outcome.err
    assert row_of(outcome, by_label["Too fast"]).startswith("Too fast  diverged")
    assert row_of(outcome, by_label["Orphan"]).startswith("Orphan    planned")
    assert (by_label["Dense"] / "provenance.json").exists()
    assert Run(by_label["Dense"]).provenance["snapshot"]  # it ran the code as it was when the sweep began
    assert "2 of 4 runs: done" in sweep(suite, runs, cluster="local").out
