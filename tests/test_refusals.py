"""Is what stands in a command's way named in one sentence, with everything left as it was?"""

import shutil
from pathlib import Path

import pytest
from command import SAVE_OFTEN, TINY, assert_refused, contents, train, tsbench, unfinished

from bench.runs import read_run, run_state


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / finished_run.name))


@pytest.mark.parametrize("command", [["sample", "--out", "drawn.npz"], ["evaluate"], ["train"]], ids=lambda command: command[0])
@pytest.mark.parametrize("setting", ["train.lr=0.5", "method=dtr", "seed=4", "budget.amount=640"])
def test_what_would_be_another_run_is_refused(command: list[str], setting: str, folder: Path) -> None:
    before = contents(folder)
    assert_refused(tsbench(command[0], folder, setting, *command[1:]), setting, "another run", "evaluation.*")
    assert contents(folder) == before


# Damage. What each command does with each file that is cut in half, and the words that name it.

DAMAGED_FOR_A_RUN = {
    "checkpoints": ("sample", "evaluate", "train"),
    "config.yaml": ("sample", "evaluate", "train"),
    "metrics.jsonl": ("train",),
    "progress.json": ("train",),
}
DAMAGED_FOR_A_FOLDER = {
    "config.yaml": ("collect", "tables", "plots"),
    "eval.json": ("collect", "tables", "plots"),
    "summary.json": ("collect", "tables", "plots"),
    "provenance.json": ("collect", "tables", "plots"),
    "metrics.jsonl": ("plots",),
    "samples.npz": ("plots",),
    "diagnostics.npz": ("plots",),
}


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("file", "command"), [(file, command) for file, all_of in DAMAGED_FOR_A_RUN.items() for command in all_of]
)
def test_damage_is_named_and_the_run_left_as_it_is(file: str, command: str, folder: Path, tmp_path: Path) -> None:
    if command == "train":
        unfinished(folder)
    for path in (folder / file).iterdir() if (folder / file).is_dir() else [folder / file]:
        cut_in_half(path)
    before = contents(folder)
    extra = ["--out", tmp_path / "drawn.npz"] if command == "sample" else []
    outcome = tsbench(command, folder, *extra)
    assert_refused(outcome, str(folder / file))
    after = contents(folder)
    assert not (tmp_path / "drawn.npz").exists()
    if after.pop("failure.json", None):  # a run that had begun says why it ended
        assert read_run(folder).failure in outcome.err and run_state(folder) == "failed"
    assert {name for name in before if before[name] != after[name]} <= {"provenance.json"} and after.keys() == before.keys()


@pytest.mark.parametrize(
    ("file", "command"), [(file, command) for file, all_of in DAMAGED_FOR_A_FOLDER.items() for command in all_of]
)
def test_damage_is_named_before_anything_is_shown(file: str, command: str, folder: Path, tmp_path: Path) -> None:
    cut_in_half(folder / file)
    before = contents(tmp_path)
    assert_refused(tsbench(command, tmp_path), str(folder / file))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff\xfe\x00", b'[{"protocol_hash": "x"}]'])
def test_a_damaged_record_of_scores_is_found_before_scoring_again(content: bytes, folder: Path) -> None:
    (folder / "eval.json").write_bytes(content)
    before = contents(folder)
    outcome = tsbench("evaluate", folder)
    if content == b"[]":
        assert outcome.code == 0 and len(read_run(folder).evaluations) == 1
    else:
        assert_refused(outcome, str(folder / "eval.json"))
        assert contents(folder) == before


@pytest.mark.parametrize("kept", [0, 5])
def test_a_configuration_with_missing_settings_is_refused_not_filled_with_defaults(kept: int, folder: Path) -> None:
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    without = [line for line in lines if "width:" not in line] if kept else []
    (folder / "config.yaml").write_text("".join(without))
    for command in (["sample", "--out", folder / "drawn.npz"], ["evaluate"], ["train"]):
        before = contents(folder)
        assert_refused(tsbench(command[0], folder, *command[1:]), "config.yaml", "lacks model.width" if kept else "has no method")
        assert contents(folder) == before


def test_a_checkpoint_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "other", "model.width=32", *SAVE_OFTEN)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    for command in (["sample", "--out", tmp_path / "drawn.npz"], ["evaluate"]):
        outcome = tsbench(command[0], folder, *command[1:])
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert "does not fit the network" in outcome.err and "misshaped" in outcome.err


# Places


@pytest.mark.parametrize("command", ["sample", "evaluate", "train", "collect", "tables", "plots"])
@pytest.mark.parametrize("place", ["nowhere", "file", "file/below", "empty"])
def test_a_place_without_runs_is_named(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("- x\n")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    extra = ["--out", tmp_path / "drawn.npz"] if command == "sample" else []
    assert_refused(tsbench(command, tmp_path / place, *extra), str(tmp_path / place))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "file"),
        ("train", "file/below"),
        ("train", "/proc/nowhere"),
        ("train", "/dev/null/below"),
        ("demo", "file/below"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / place  # an absolute place stays itself
    arguments = ["--runs", out] if command == "train" else ["--quick", "--out", out]
    assert_refused(tsbench(command, *arguments, *TINY), f"cannot write to {out}", "choose a folder that can be written")
    assert contents(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("drawn.txt", ("drawn.txt", ".npz or .png")),
        ("nowhere/drawn.npz", ("nowhere", "create it")),
        ("file/drawn.png", ("file", "create it")),
        ("folder.npz", ("folder.npz", "a file")),
        ("/proc/drawn.npz", ("/proc/drawn.npz",)),
        ("/proc/drawn.png", ("drawn.png",)),
    ],
)
def test_samples_that_cannot_be_written_are_refused(name: str, words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    before = contents(tmp_path)
    assert_refused(tsbench("sample", folder, "--out", tmp_path / name), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "made"), [("collect", "results.csv"), ("tables", "table.md"), ("tables", "results.csv"), ("plots", "figures")]
)
def test_an_output_that_is_a_folder_or_a_file_is_one_sentence(command: str, made: str, folder: Path, tmp_path: Path) -> None:
    if made == "figures":
        (tmp_path / made).write_text("a file")
    else:
        (tmp_path / made).mkdir()
    assert_refused(tsbench(command, tmp_path), made)
