"""What does a person meet at the command line: help, every command from end to end, and the demo?"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY, Outcome, assert_refused, contents, train, tsbench
from helpers import PUBLISHED

from bench import cli, demo, job
from bench.files import read_json, write_json_atomically
from bench.suite import load_suite
from slurm.local import Job

COMMANDS = {
    "demo": ("--quick", "--fresh", "--out", "--workers", "key=value"),
    "train": ("CONFIG", "--runs", "train.lr=0.001", "evaluation.num_samples=500", "multi_expert: experts=4"),
    "sample": ("RUN", "--out", ".npz", ".png"),
    "evaluate": ("RUN", "key=value", "eval.json"),
    "collect": ("FOLDER", "results.csv"),
    "tables": ("FOLDER", "--suite", "--protocol"),
    "plots": ("FOLDER", "--suite", "--protocol"),
}


@pytest.mark.parametrize(("command", "mentioned"), COMMANDS.items())
def test_help_tells_a_newcomer_what_to_type(command: str, mentioned: tuple[str, ...]) -> None:
    outcome = tsbench(command, "--help")
    assert outcome.code == 0 and not outcome.err
    assert outcome.out.startswith(f"usage: tsbench {command} ")
    assert all(word in outcome.out for word in mentioned)


def test_without_a_command_help_is_shown() -> None:
    outcome = tsbench()
    assert all(command in outcome.out for command in COMMANDS)
    assert_refused(outcome, "no command was given", "--help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ("invalid choice: 'trian'", "demo", "train")),
        (["train", "--lr=3"], ("--lr=3 is not understood", "key=value")),
        (["collect", "here", "seed=1"], ("neither a suite nor a folder 'here'",)),
        (["sample", "run"], ("--out",)),
        (["demo", "--workers", "many"], ("--workers", "'many'")),
        (["demo", "--workers", "0"], ("--workers is 0", "at least 1")),
        (["tables"], ("are required: SUITE|FOLDER: see",)),
        (["tables", ".", "--out", "elsewhere"], ("--out is for a suite, but . is a folder", "leave it out")),
        (["plots", ".", "--runs", "elsewhere"], ("--runs is for a suite, but . is a folder", "leave it out")),
        (["tables", "demo", "--suite", "digits"], ("--suite is for a folder, but demo is a suite", "leave it out")),
        (["tables", "dit.table4", "--suite", "digits"], ("--suite is for tables of our own runs", "dit.table4")),
        (["train", os.devnull], (f"{os.devnull} holds no settings", "leave it out")),
        (["report", ".", "--out", "."], ("--out is ., which is a folder", "HTML")),
        (["pack", "--out", "elsewhere", "train.lr=1"], ("train.lr=1 would change nothing", "of data alone")),
        (["encode", "--out", "x", "--autoencoder", "y", "train.lr=1"], ("train.lr=1 would change nothing", "of data alone")),
        (["encode", "--out", "elsewhere"], ("--autoencoder",)),
        (["tables", "demo", "--allow", "all"], ("--allow names all", "protocols, incomplete")),
    ],
    ids=str,
)
def test_a_slip_in_the_command_is_named_in_one_line(arguments: list[str], words: tuple[str, ...]) -> None:
    assert_refused(tsbench(*arguments), *words)


def test_a_run_from_the_first_step_to_the_table(tmp_path: Path) -> None:
    """train, train again, sample, evaluate, collect, tables and plots; settings may stand before and after options."""
    outcome = tsbench("train", TINY[0], "--runs", tmp_path / "runs", *TINY[1:])
    assert outcome.code == 0 and "class_accuracy" in outcome.out, outcome.err
    (folder,) = (tmp_path / "runs").iterdir()
    before, done = contents(folder), (folder / "done").stat().st_mtime_ns
    for again in (["--runs", tmp_path / "runs", *TINY], [folder]):
        assert tsbench("train", *again) == outcome
    assert contents(folder) == before and (folder / "done").stat().st_mtime_ns == done

    for name in ("samples.npz", "samples.png"):
        drawn = tsbench("sample", folder, "--out", tmp_path / name, "evaluation.num_samples=7")
        assert drawn.code == 0 and drawn.out.startswith("7 images"), drawn.err
        assert (tmp_path / name).stat().st_size > 100
    assert contents(folder) == before  # sampling leaves the run as it was

    scored = tsbench("evaluate", folder, "evaluation.seed=3")
    assert scored.code == 0 and scored.out != outcome.out, scored.err
    records = json.loads((folder / "eval.json").read_text())
    assert [record["protocol"]["seed"] for record in records] == [0, 3]

    assert tsbench("collect", tmp_path).code == 0
    assert (tmp_path / "results.csv").read_text().count("fid_train") == 2
    assert_refused(tsbench("tables", tmp_path), "by its hash", *(record["protocol_hash"] for record in records), code=3)
    assert_refused(tsbench("plots", tmp_path), "by its hash", code=3)
    for command in ("collect", "tables", "plots", "report"):
        assert_refused(tsbench(command, tmp_path, "--protocol", "other"), "by the protocol other", records[0]["protocol_hash"])
    assert not (tmp_path / "figures").exists()
    for command, made in (("tables", ["table.md", "table.tex"]), ("plots", ["figures/training_loss.png", "figures/samples.pdf"])):
        shown = tsbench(command, tmp_path, "--protocol", records[1]["protocol_hash"])
        assert shown.code == 0, shown.err
        assert all(str(tmp_path / name) in shown.out and (tmp_path / name).exists() for name in made)
    assert records[1]["protocol_hash"] in (tmp_path / "table.md").read_text()


def test_runs_of_different_budgets_make_no_table(tmp_path: Path) -> None:
    train(tmp_path / "runs")
    train(tmp_path / "runs", "method=dtr", "budget.amount=128")
    before = contents(tmp_path)
    assert_refused(tsbench("tables", tmp_path), "budgets are not equal", "64", "128", code=3)
    assert contents(tmp_path) == before


def test_runs_scored_by_different_protocols_make_no_table(tmp_path: Path) -> None:
    train(tmp_path / "runs")
    train(tmp_path / "runs", "method=dtr", "evaluation.seed=1")
    before = contents(tmp_path)
    assert_refused(tsbench("tables", tmp_path), "protocols that differ in seed (0 and 1)", code=3)
    assert contents(tmp_path) == before


@pytest.fixture
def side_by_side_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo's jobs, one after the other and without new processes; the names of those that were started."""
    started: list[str] = []

    def run_all(jobs: list[Job], workers: int, watch: Callable[[list[Job]], None]) -> dict[str, str]:
        failures = {}
        for each in jobs:
            started.append(each.folder.name)
            assert each.threads == 1 and each.cost > 0
            outcome = tsbench("train", each.folder)
            if outcome.code:
                failures[each.folder.name] = outcome.err
        watch(jobs)
        return failures

    monkeypatch.setattr(demo, "run_side_by_side", run_all)
    return started


def run_demo(out: Path, *more: str) -> Outcome:
    return tsbench("demo", "--quick", "--out", out, "--workers", "2", *TINY, *more)


def test_the_demo_compares_all_methods_and_reuses_what_is_finished(
    tmp_path: Path, side_by_side_in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_demo(tmp_path)
    assert first.code == 0, first.err
    assert {name.rpartition("-")[0] for name in side_by_side_in_this_process} == set(PUBLISHED)
    table = (tmp_path / "table.md").read_text()
    for label in ("Dense DiT", "Multi-expert", "DTR", "Switch-DiT", "DiT-MoE", "Remix-DiT", "Real data"):
        assert label in first.out and label in table
    assert "not converged" in table.lower() and str(tmp_path / "figures") in first.out
    for name in ("training_loss", "heldout_loss", "loss_per_timestep", "mixing_coefficients", "fid_vs_flops", "samples"):
        assert all((tmp_path / "figures" / f"{name}.{ending}").stat().st_size > 1000 for ending in ("png", "pdf"))

    made = contents(tmp_path / "runs")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/done")}
    monkeypatch.setattr("bench.show.write_figures", lambda *_: [])  # drawn once is enough
    del side_by_side_in_this_process[:]
    again = run_demo(tmp_path)
    assert again.code == 0 and "6 of 6 runs are done" in again.out
    assert not side_by_side_in_this_process and contents(tmp_path / "runs") == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/done")} == stamps

    # A run of other settings beside them is left alone, and out of the table; one that was lost is made anew.
    other = train(tmp_path / "runs", "budget.amount=128")
    (next(tmp_path.glob("runs/dtr-*")) / "done").unlink()
    mended = run_demo(tmp_path)
    assert mended.code == 0 and "5 of 6 runs are done" in mended.out and other.exists(), mended.err
    assert [name.rpartition("-")[0] for name in side_by_side_in_this_process] == ["dtr"]

    # --fresh removes what the demo's runs wrote, and nothing else.
    kept = {other / "config.yaml", tmp_path / "notes.txt", next(iter(stamps)).parent / "mine.txt"}
    for path in kept - {other / "config.yaml"}:
        path.write_text("mine")
    fresh = run_demo(tmp_path, "--fresh")
    assert fresh.code == 0 and "runs are done" not in fresh.out, fresh.err
    assert len(side_by_side_in_this_process) == 7 and all(path.exists() for path in kept)
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in stamps.items())


def test_the_demo_names_runs_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_side_by_side", lambda jobs, *_: {jobs[2].folder.name: "its process was ended by signal 9"})
    outcome = run_demo(tmp_path)
    assert_refused(outcome, "run dtr-", "failed: its process was ended by signal 9", code=1)
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.lr=fast", ("train.lr", "'fast'")),
        ("model.num_heads=3", ("16", "3 heads")),
        ("evaluation.num_samples=10", ("10", "kid_subset_size")),
    ],
)
def test_a_demo_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, setting: str, words: tuple[str, ...]
) -> None:
    assert_refused(run_demo(tmp_path / "out", setting), *words)
    assert not (tmp_path / "out").exists()


def test_fresh_spares_a_run_that_is_being_worked_on(tmp_path: Path, side_by_side_in_this_process: list[str]) -> None:
    plan = demo.make_plan(load_suite("demo-quick"), tmp_path, TINY)
    for config, folder in zip(plan.configs, plan.folders, strict=True):
        job.prepare_folder(config, folder)
    before = contents(tmp_path / "runs")
    with job.locked(plan.folders[3]):
        assert_refused(run_demo(tmp_path, "--fresh"), "being worked on")
    assert {name: content for name, content in contents(tmp_path / "runs").items() if not name.endswith("lock")} == before


def test_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    outcome = tsbench("train", "--runs", tmp_path / "runs", *TINY, "model.width=100000")
    assert_refused(outcome, "not enough memory", "choose a smaller model")
    assert not (tmp_path / "runs").exists()


def test_a_bug_is_not_dressed_up_as_a_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main(["train", "--runs", str(tmp_path), *TINY])


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_only_a_command_with_checkpoints_promises_to_go_on_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.throughput.command.method_rows", interrupted)
    monkeypatch.setattr("bench.demo.run_plan", interrupted)
    assert_refused(tsbench("throughput"), "tsbench: stopped\n", code=130)
    assert_refused(tsbench("demo", "--quick", "--out", tmp_path), "the same command goes on from the last checkpoint", code=130)


def test_a_polite_kill_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    settings = [*TINY, "budget.amount=640", "system.log_every=1", "system.checkpoint_every=1"]
    endless = [setting if not setting.startswith("budget") else "budget.amount=6400000" for setting in settings]
    process = start("train", "--runs", tmp_path, *endless)
    try:
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("*/checkpoints/step-*.safetensors")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"tsbench: stopped after step \d+; everything is saved; the same command goes on from there\n", err)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "failure.json").exists() and not list(folder.rglob("*.tmp"))
    steps = read_json(folder / "progress.json", dict)["step"]
    assert steps > 0 and not (folder / "done").exists()


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path: Path) -> None:
    process = start("train", "--help")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=600) == 0
    process.stderr.close()


def test_warnings_are_one_line_each(tmp_path: Path) -> None:
    """A damaged last checkpoint is passed over, and said so."""
    folder = train(tmp_path, "system.log_every=1", "system.checkpoint_every=1")
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    process = start("sample", folder, "--out", tmp_path / "drawn.npz")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.startswith("60 images")
    assert err.startswith(f"warning: checkpoint {newest} cannot be read") and err.count("\n") == 1


def test_an_unfinished_run_is_sampled_but_not_scored(tmp_path: Path) -> None:
    folder = train(tmp_path)
    for name in ("done", "eval.json", "samples.npz"):
        (folder / name).unlink()
    assert tsbench("sample", folder, "--out", tmp_path / "drawn.npz").code == 0
    assert_refused(tsbench("evaluate", folder), "not trained to its end", f"tsbench train {folder}")
    write_json_atomically(folder / "failure.json", {"state": "failed", "cause": "lightning"})
    assert tsbench("train", folder).code == 0
    assert (folder / "done").exists() and not (folder / "failure.json").exists()
