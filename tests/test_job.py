"""Does a run leave all that it should, and go on where it can, whatever ended it?"""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import SAVE_OFTEN, TINY, assert_refused, contents, train, tsbench, unfinished

from bench import checkpoint, job
from bench.files import read_json, write_json_atomically
from bench.run_folder import clear, locked
from bench.runs import read_metrics, read_run, read_samples, run_state

LEFT = {
    *("config.yaml", "provenance.json", "metrics.jsonl", "progress.json", "summary.json", "diagnostics.npz"),
    *("samples.npz", "trajectory.npz", "eval.json", "done", "checkpoints"),
}


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / finished_run.name))


def test_a_finished_run_has_left_all_it_should(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == LEFT
    run = read_run(folder)
    assert run.state == "done" and not run.failure
    assert run.summary["images_seen"] == 64 and run.summary["num_steps"] == 2
    assert run.provenance["threads"] == 1 and run.provenance["world_size"] == 1
    (record,) = run.evaluations
    assert record["n"] == record["metrics"]["n"] == 60 and 0 <= record["metrics"]["class_accuracy"] <= 1
    samples = read_samples(folder)
    assert samples is not None and samples.shape == (60, 8, 8, 1)
    assert set(read_metrics(folder)["kind"]) == {"train", "heldout"}
    assert len(checkpoint.list_checkpoints(folder / "checkpoints")) == 2


@pytest.mark.parametrize(
    "missing", ["summary.json", "diagnostics.npz", "samples.npz", "trajectory.npz", "eval.json", "provenance.json"]
)
def test_what_is_deleted_of_a_finished_run_is_made_anew(missing: str, folder: Path) -> None:
    """As the messages about damaged files advise."""
    before = contents(folder)
    (folder / missing).unlink()
    outcome = tsbench("train", folder)
    assert outcome.code == 0, outcome.err
    after = contents(folder)
    assert after.keys() == before.keys() and after["metrics.jsonl"] == before["metrics.jsonl"]
    assert read_run(folder).evaluations[0]["metrics"] == json.loads(before["eval.json"])[0]["metrics"]
    assert (folder / "samples.npz").read_bytes() == before["samples.npz"]
    assert (folder / "trajectory.npz").read_bytes() == before["trajectory.npz"]


@pytest.mark.parametrize("known", ["code of before", "no code, as it is kept"])
def test_a_run_that_never_had_a_trajectory_is_done_without(known: str, folder: Path) -> None:
    (folder / "trajectory.npz").unlink()
    provenance = read_json(folder / "provenance.json", dict)
    of_before = {name: digest for name, digest in provenance.pop("code_files").items() if name != "bench/trajectory.py"}
    kept = {"code_files": of_before} if known == "code of before" else {}
    write_json_atomically(folder / "provenance.json", {**provenance, **kept})
    before = contents(folder)
    assert job.is_scored(job.read_config(folder), folder)
    assert tsbench("train", folder).code == 0 and contents(folder) == before


def test_a_run_that_was_killed_before_scoring_goes_on(folder: Path) -> None:
    before = contents(folder)
    outcome = tsbench("train", unfinished(folder))
    assert outcome.code == 0 and run_state(folder) == "done", outcome.err
    assert (folder / "samples.npz").read_bytes() == before["samples.npz"]
    assert (folder / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


@pytest.mark.filterwarnings("default")
def test_what_is_scored_is_the_end_though_its_checkpoint_was_damaged(folder: Path) -> None:
    """The one before it is sound: training goes on from there, and the scores are those of the end."""
    before = contents(folder)
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    last.write_bytes(last.read_bytes()[:-9])
    (folder / "eval.json").unlink()
    outcome = tsbench("train", folder)
    assert outcome.code == 0 and last.name in outcome.err, outcome.err
    assert (folder / "samples.npz").read_bytes() == before["samples.npz"]
    assert contents(folder / "checkpoints").keys() >= {last.name}


def test_other_scoring_of_a_finished_run_adds_a_record_and_trains_nothing(folder: Path) -> None:
    checkpoints = contents(folder / "checkpoints")
    assert tsbench("train", folder, "evaluation.seed=5").code == 0
    assert [record["protocol"]["seed"] for record in read_run(folder).evaluations] == [0, 5]
    assert contents(folder / "checkpoints") == checkpoints


# Others at work, and full disks


def test_a_run_that_another_process_holds_is_left_alone(folder: Path) -> None:
    unfinished(folder)
    with locked(folder):
        before = contents(folder)
        assert_refused(tsbench("train", folder), folder.name, "being worked on by another process")
        assert contents(folder) == before
        with pytest.raises(ValueError, match="being worked on"):
            clear(folder)
    assert tsbench("train", folder).code == 0
    with locked(folder):
        assert_refused(tsbench("evaluate", folder, "evaluation.seed=2"), "being worked on by another process")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "the file")


def full_disk_of_safetensors(tensors: object, path: Path, *_: object) -> None:
    path.write_bytes(b"half a check")
    raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failing", [full_disk, full_disk_of_safetensors])
def test_a_full_disk_at_a_checkpoint_loses_nothing_but_what_came_after(
    failing: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = ("budget.amount=128", *SAVE_OFTEN)
    whole = train(tmp_path / "whole", *longer)
    save_file, num_saved = checkpoint.save_file, 0

    def then_full(*arguments: object) -> None:
        nonlocal num_saved
        num_saved += 1
        (save_file if num_saved < 3 else failing)(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", then_full)
    assert_refused(tsbench("train", "--runs", tmp_path / "cut", *TINY, *longer), "No space left on device", "make room")
    (cut,) = (tmp_path / "cut").iterdir()
    assert [path.stem for path in checkpoint.list_checkpoints(cut / "checkpoints")] == ["step-000000001", "step-000000002"]
    assert {path.name for path in (cut / "checkpoints").iterdir()} == {"step-000000001.safetensors", "step-000000002.safetensors"}
    assert run_state(cut) == "failed" and "No space left" in read_run(cut).failure
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert tsbench("sample", cut, "--out", tmp_path / "drawn.npz").code == 0
    assert tsbench("train", cut).code == 0
    last = [checkpoint.list_checkpoints(run / "checkpoints")[-1] for run in (whole, cut)]
    one, other = (checkpoint.load(path).tensors for path in last)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("function", ["bench.files.write_bytes_atomically", "bench.adm.write_samples", "bench.journal.open"])
def test_a_full_disk_anywhere_is_one_sentence(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, full_disk, raising=False)
    outcome = tsbench("train", "--runs", tmp_path, *TINY)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "No space left on device" in outcome.err
    monkeypatch.undo()
    assert tsbench("train", "--runs", tmp_path, *TINY).code == 0


def test_a_loss_that_is_not_finite_is_a_run_that_failed(tmp_path: Path) -> None:
    assert_refused(tsbench("train", "--runs", tmp_path, *TINY, "train.lr=1e30"), "diverged: loss term 'mse'", "timesteps", code=1)
    (folder,) = tmp_path.iterdir()
    assert run_state(folder) == "diverged" and "loss term 'mse'" in read_run(folder).failure
    assert read_json(folder / "failure.json", dict)["state"] == "diverged"


# Small parts


def test_a_run_can_start_from_a_finished_one(folder: Path, tmp_path: Path) -> None:
    for name in ("multi_expert", "remix_dit"):
        started = train(tmp_path / name, f"method={name}", f"train.init_from={folder}")
        assert read_run(started).summary["initial_flops"] == read_run(folder).summary["train_flops"]
    split = next((tmp_path / "multi_expert").iterdir())
    refused = tsbench("train", "--runs", tmp_path / "no", *TINY, "method=dtr", f"train.init_from={split}")
    assert_refused(refused, "train.init_from", "no plain backbone")
    assert not (tmp_path / "no").exists()


def test_clearing_a_run_leaves_what_others_put_there(folder: Path) -> None:
    (folder / "mine.txt").write_text("mine")
    clear(folder)
    assert contents(folder) == {"mine.txt": b"mine"}
    (folder / "mine.txt").unlink()
    clear(folder)
    assert not folder.exists()


def test_checking_writes_nothing_and_tells_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small, large = (job.check(job.make_config({}, [*TINY, f"model.width={width}"])) for width in (16, 32))
    assert 0 < small.train_flops(32) < large.train_flops(32)
    assert not contents(tmp_path)
