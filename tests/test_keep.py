"""Can all be made again from what is committed of the runs, and is whatever was changed of it named?"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import assert_refused, contents, tsbench
from fake_runs import FLOOR_RECORD, REAL_IMAGES, REAL_NAMES, SUITE, write_fake_runs

from bench import plots, provenance, show, tables, tidy
from bench.keep import NUM_SAMPLES, RealImages, changes, keep, read_real_images
from bench.runs import Run, find_runs, read_run

pytestmark = pytest.mark.xdist_group("plots")  # what its tests look at is made once, not by every worker
FEW = ("fid_vs_images", "throughput", "samples", "training_loss", "heldout_loss")
REAL = RealImages(REAL_IMAGES, REAL_NAMES)
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


def commit(runs: list[Run], folder: Path) -> None:
    """As `tsbench collect --keep-runs` and `tables` leave it."""
    folder.mkdir()
    (folder / "floor.json").write_text(json.dumps(FLOOR_RECORD))
    keep(runs, folder, REAL)
    results = tidy.gather(runs, FLOOR_RECORD)
    tables.write_tables(tables.comparisons(results.frame, SUITE), results, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, with_figures: Path) -> Path:
    """`runs`: as training leaves them; `committed`: what is kept of them, with results, tables and figures."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(with_figures / "runs", root / "runs")
    for run in find_runs(root):
        (run.path / "checkpoints").mkdir()
        (run.path / "checkpoints" / "step-1.safetensors").write_bytes(bytes(1000))
        (run.path / "log.txt").write_text("a long story")
        provenance = {**run.provenance, "command": ["/here/tsbench"], "diff": "secret", "code_files": {"bench/a.py": "12"}}
        (run.path / "provenance.json").write_text(json.dumps(provenance))
    commit(find_runs(root), root / "committed")
    shutil.copytree(with_figures / "figures", root / "committed" / "figures")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The committed folder alone, on another machine."""
    return Path(shutil.copytree(made / "committed", tmp_path / "committed"))


@pytest.fixture(scope="module")
def made_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    runs, figures = write_fake_runs(root / "made", SUITE["methods"][:2], range(3)), root / "committed" / "figures"
    commit(runs, root / "committed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FIGURES", {name: plots.FIGURES[name] for name in FEW})
        plots.make_figures(runs, SUITE, figures, floor=FLOOR_RECORD, real_images=REAL_IMAGES, class_names=REAL_NAMES)
    return root / "committed"


@pytest.fixture
def small(made_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed folder of two methods with three seeds, while few kinds of figures are made."""
    monkeypatch.setattr(plots, "FIGURES", {name: plots.FIGURES[name] for name in FEW})
    return Path(shutil.copytree(made_small, tmp_path / "small"))


# What is kept


def test_figures_and_results_of_what_is_kept_are_those_of_the_runs(made: Path) -> None:
    full, kept = find_runs(made), find_runs(made / "committed")
    assert [run.run_id for run in full] == [run.run_id for run in kept] and len(full) == 12
    own, again = tidy.gather(full, FLOOR_RECORD), tidy.gather(kept, FLOOR_RECORD)
    assert tidy.result_files(own) == tidy.result_files(again)
    real = read_real_images(made / "committed")
    assert real is not None and real.images is not None and real.class_names == REAL_NAMES and len(real.images) == NUM_SAMPLES
    options = {"floor": FLOOR_RECORD, "class_names": REAL_NAMES, "report": QUIET}
    of_kept = plots.figures_of(kept, SUITE, real_images=real.images, **options)  # type: ignore[arg-type]
    assert set(of_kept.files) > {
        "samples.png",
        "trajectories.pdf",
        "mixing_over_training.csv",
        "fid_vs_flops.csv",
    }
    there = contents(made / "committed" / "figures")
    assert {name: content for name, content in there.items() if name != "captions.json"} == of_kept.files


def test_what_is_kept_is_small_and_tells_of_no_machine(made: Path) -> None:
    kept = contents(made / "committed")
    assert not [name for name in kept if "checkpoints" in name or name.endswith(("log.txt", "metrics.jsonl"))]
    text = b"".join(gzip.decompress(c) if name.endswith(".gz") else c for name, c in kept.items() if "npz" not in name)
    assert b"/here/tsbench" not in text and b"secret" not in text and text.count(b"bench/a.py") == 1  # code files are named once
    full, slim = (sum(len(c) for n, c in contents(path).items()) for path in (made / "runs", made / "committed" / "runs"))
    assert slim < 0.2 * full
    run = find_runs(made / "committed")[0]
    original = read_run(made / "runs" / run.run_id)
    assert run.metrics.equals(original.metrics) and run.curve == original.curve and run.state == "done"


def test_the_same_runs_are_kept_as_the_same_bytes_and_others_go(made: Path, folder: Path) -> None:
    runs, before = find_runs(made), contents(folder)
    keep(runs, folder, REAL)
    assert contents(folder) == before
    (folder / "runs" / "notes.txt").write_text("mine")
    keep(runs[3:], folder, REAL)
    there = {path.name for path in (folder / "runs").iterdir()}
    assert there == {"notes.txt", *(run.run_id for run in runs[3:])}


def test_runs_that_have_not_ended_or_lie_there_are_not_kept(made: Path, tmp_path: Path) -> None:
    runs = write_fake_runs(tmp_path, SUITE["methods"][:2])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"the runs are in \S+/runs themselves: name their suite"):
        keep(runs, tmp_path, REAL)
    (runs[1].path / "done").unlink()
    with pytest.raises(ValueError, match=rf"^runs {runs[1].run_id} have not ended: finish them"):
        keep(runs, tmp_path / "elsewhere", REAL)
    assert {**contents(tmp_path), f"runs/{runs[1].run_id}/done": b""} == before


# What is checked


def check(folder: Path, pictures: bool = False) -> list[str]:
    return show.check(folder, SUITE, pictures=pictures).faults


def test_what_was_committed_follows_and_pictures_do_too(small: Path) -> None:
    checked = show.check(small, SUITE)
    assert checked.faults == [] and checked.unchecked == ["not checked without --pictures: PNG and PDF files"]
    assert show.check(small, SUITE, pictures=True) == ([], [])


FILES_OF_A_RUN = ["config.yaml", "eval.json", "curve.json", "summary.json", "provenance.json", "diagnostics.npz", "done"]
FILES_OF_A_RUN += ["metrics.jsonl.gz", "samples.npz", "trajectory.npz"]


def test_a_changed_file_of_a_run_is_named(folder: Path) -> None:
    run = find_runs(folder)[0].path
    assert sorted(path.name for path in run.iterdir()) == sorted(FILES_OF_A_RUN)
    for name in FILES_OF_A_RUN:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-1] + bytes([(content[-1:] or b"0")[0] ^ 1]))
        assert changes(folder) == [f"{run / name} is not as it was kept"], name
        (run / name).unlink()
        assert changes(folder) == [f"{run / name} is missing"]
        (run / name).write_bytes(content)
    (run / "more.json").write_text("{}")
    assert show.check(folder, SUITE) == (
        [f"{run / 'more.json'} is not among what was kept"],
        ["not checked, as not all runs are as they were kept: whether results.csv and figures follow from the runs"],
    )


def test_a_missing_run_and_one_that_was_added_are_named(folder: Path) -> None:
    first, second = find_runs(folder)[:2]
    (folder / "runs" / "another").mkdir()
    shutil.copy(second.path / "config.yaml", folder / "runs" / "another")
    shutil.rmtree(first.path)
    assert check(folder) == [
        f"{first.path} is missing",
        f"{folder / 'runs' / 'another' / 'config.yaml'} is not among what was kept",
    ]


def test_a_change_that_was_kept_still_shows_in_what_follows(small: Path) -> None:
    """As by someone who changed a score, and then kept the runs again."""
    (run, *_) = find_runs(small)
    records = json.loads((run.path / "eval.json").read_text())
    records[0]["metrics"]["fid_train"] -= 1
    (run.path / "eval.json").write_text(json.dumps(records))
    (small / "kept.json").unlink()
    faults = check(small)
    results = small / "results.csv"
    assert next(fault for fault in faults if fault.startswith(str(results))).endswith(f"differs (run {run.run_id})")
    assert f"{small / 'figures' / 'throughput.csv'}" not in " ".join(faults)


def test_changed_results_are_named_with_the_run(small: Path) -> None:
    frame = tidy.read_results(small / "results.csv")
    place = frame.index[frame["metric"] == "fid_train"][2]
    frame.loc[place, "value"] += 0.5
    (small / "results.csv").write_text(tidy.results_text(frame))
    faults = check(small)
    run = frame.loc[place, "run"]
    assert faults[0] == f"{small / 'results.csv'} does not follow from the runs: line {place + 2} differs (run {run})"
    assert {Path(fault.split()[0]).name for fault in faults[1:]} == {"table.md", "table.tex", "table.csv", "table.html"}


def test_changed_data_captions_and_pictures_of_figures_are_named(small: Path) -> None:
    figures = small / "figures"
    text = (figures / "training_loss.csv").read_text().splitlines()
    (figures / "training_loss.csv").write_text("\n".join([*text[:4], "one more", *text[4:]]) + "\n")
    assert check(small) == [f"{figures / 'training_loss.csv'} does not follow from the runs: line 5 differs"]
    (figures / "training_loss.csv").write_text("\n".join(text) + "\n")
    captions = (figures / "captions.json").read_text()
    (figures / "captions.json").write_text(captions.replace("95% interval", "99% interval", 1))
    (line,) = check(small)
    assert line.startswith(f"{figures / 'captions.json'} does not follow from the runs: line ")
    (figures / "captions.json").write_text(captions)
    (figures / "another.csv").write_text("a,b\n")
    assert check(small) == [f"{figures / 'another.csv'} is no figure of these runs"]
    (figures / "another.csv").unlink()
    content = (figures / "samples.png").read_bytes()
    (figures / "samples.png").write_bytes(content[:-20] + bytes(20))
    assert check(small) == []
    assert check(small, pictures=True) == [f"{figures / 'samples.png'} does not follow from the runs"]
    (figures / "samples.png").write_bytes(content)
    (figures / "heldout_loss.csv").unlink()
    assert check(small) == [f"{figures / 'heldout_loss.csv'} is missing"]


def test_what_cannot_be_checked_is_said(small: Path) -> None:
    shutil.rmtree(small / "figures")
    assert show.check(small, SUITE) == ([], [f"not checked, as there is no {small / 'figures'}: figures"])
    shutil.rmtree(small / "runs")
    (small / "kept.json").unlink()
    (line,) = show.check(small, SUITE).unchecked
    assert line.startswith(f"not checked, as no runs are kept in {small / 'runs'}: ")


def test_code_that_has_changed_since_leaves_everything_as_it_is(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are compared with each other, never with the checkout that makes the tables; and settings may come and go."""
    monkeypatch.setattr(provenance, "_read_code", lambda: pytest.fail("the checkout was looked at"))
    assert check(small) == [] and "made by different code" not in (small / "table.md").read_text()
    runs = find_runs(small)
    for run in runs:
        config = (run.path / "config.yaml").read_text()
        assert "  block_size: 50\n" in config
        (run.path / "config.yaml").write_text(config.replace("  block_size: 50\n", "  of_another_time: 1\n"))
    of_one = {**runs[0].provenance, "code_hash": "another"}
    (runs[0].path / "provenance.json").write_text(json.dumps(of_one))
    results = tidy.gather(find_runs(small), FLOOR_RECORD)
    (made,) = tables.comparisons(results.frame, SUITE)
    assert any("another" in note and "The runs were made by different code." in note for note in made.notes)


# At the command line


def test_a_suite_is_committed_and_checked_from_the_command_line(tmp_path: Path, small: Path) -> None:
    outcome = tsbench("tables", small, "--check")
    assert outcome.code == 0 and outcome.out.startswith(f"all that was checked in {small} follows"), outcome
    assert "not checked without --pictures" in outcome.out
    (small / "figures" / "samples.pdf").write_bytes(b"")
    outcome = tsbench("tables", small, "--check", "--pictures")
    assert outcome.code == 1 and outcome.out == f"{small / 'figures' / 'samples.pdf'} does not follow from the runs\n"
    drawn = tsbench("plots", small)
    assert drawn.code == 0 and tsbench("tables", small, "--check", "--pictures").code == 0
    assert_refused(tsbench("tables", small, "--pictures"), "--pictures is for --check")
    assert_refused(tsbench("collect", small, "--keep-runs"), "themselves: name their suite")
