"""Do tables become the same files from the same results, and is a file named that no longer follows from them?"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from cells import LABELS
from fake_runs import FLOOR_RECORD, SUITE, write_fake_runs

from bench import tidy
from bench.runs import find_runs
from bench.tables import TableRefusal, check, comparisons, write_tables

FILES = ["results.csv", "protocols.json", "runs.json", "table.md", "table.tex", "table.csv", "table.html"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison as it is committed: without its runs."""
    results = tidy.gather(write_fake_runs(tmp_path / "made", SUITE["methods"][:2], range(3), (0.5,)), FLOOR_RECORD)
    paths = write_tables(comparisons(results.frame, SUITE), results, tmp_path / "committed")
    assert [path.name for path in paths] == FILES
    return tmp_path / "committed"


def test_what_was_just_written_follows(folder: Path) -> None:
    assert check(folder, SUITE) == []


def test_the_same_runs_give_the_same_bytes_in_any_order(folder: Path, tmp_path: Path) -> None:
    for name, backwards in (("again", False), ("backwards", True)):
        found = find_runs(tmp_path / "made")
        results = tidy.gather(found[::-1] if backwards else found, FLOOR_RECORD)
        write_tables(comparisons(results.frame, SUITE), results, tmp_path / name)
    for file in FILES:
        assert len({(tmp_path / name / file).read_bytes() for name in ("again", "backwards", "committed")}) == 1
    results = tidy.read(folder)
    write_tables(comparisons(results.frame, SUITE), results, tmp_path / "reread")
    for file in FILES:
        assert (tmp_path / "reread" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", FILES[3:])
def test_a_table_that_was_edited_or_is_gone_is_named(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    lines = text.split("\n")
    number = next(i for i, line in enumerate(lines) if LABELS[1] in line)
    lines[number] = lines[number].replace(LABELS[1], "Another")
    (folder / name).write_text("\n".join(lines))
    assert check(folder, SUITE) == [f"{folder / name} does not follow from results.csv: line {number + 1} differs"]
    (folder / name).unlink()
    assert check(folder, SUITE) == [f"{folder / name} is missing"]
    (folder / name).write_text(text + "one more")
    assert check(folder, SUITE) == [f"{folder / name} does not follow from results.csv: line {text.count(chr(10)) + 1} differs"]


def test_a_changed_result_shows_in_every_table(folder: Path) -> None:
    frame = tidy.read_results(folder / "results.csv")
    place = frame.index[(frame["metric"] == "fid_train") & frame["at_images"].isna()][0]
    frame.loc[place, "value"] += 0.1
    (folder / "results.csv").write_text(tidy.results_text(frame))
    assert [Path(line.split()[0]).name for line in check(folder, SUITE)] == FILES[3:]


def test_results_in_another_form_than_is_written_are_named(folder: Path) -> None:
    text = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(text.replace("\n", "\r\n"))
    (line,) = check(folder, SUITE)
    assert line.startswith(f"{folder / 'results.csv'} does not follow")


def test_records_of_other_runs_or_settings_are_named(folder: Path) -> None:
    records = json.loads((folder / "runs.json").read_text())
    first, second = sorted(records)[:2]
    changed = json.loads(json.dumps(records))
    changed[first]["config"]["train"]["lr"] = 1.0
    changed["stranger"] = changed.pop(second)
    (folder / "runs.json").write_text(tidy.records_text(changed))
    path = folder / "runs.json"
    assert check(folder, SUITE) == [
        f"{path} does not tell of run {second}",
        f"{path} tells of run stranger, of which there are no results",
        f"{path} gives run {first} other settings than it was made with",
    ]
    path.unlink()
    assert check(folder, SUITE) == [f"{path} is missing"]


def test_what_figures_show_is_compared_too(folder: Path) -> None:
    def figures(of: Path) -> Mapping[str, bytes]:
        assert of == folder
        return {"figures/loss.csv": b"a,b\n1,2\n"}

    assert check(folder, SUITE, figures=figures) == [f"{folder / 'figures' / 'loss.csv'} is missing"]
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.csv").write_text("a,b\n1,3\n")
    assert check(folder, SUITE, figures=figures) == [
        f"{folder / 'figures' / 'loss.csv'} does not follow from the runs: line 2 differs"
    ]
    (folder / "figures" / "loss.csv").write_text("a,b\n1,2\n")
    assert check(folder, SUITE, figures=figures) == []


def test_tables_that_cannot_be_made_are_refused(folder: Path) -> None:
    frame = tidy.read_results(folder / "results.csv")
    frame.loc[frame["label"] == LABELS[0], "state"] = "failed"
    (folder / "results.csv").write_text(tidy.results_text(frame))
    with pytest.raises(TableRefusal, match="are not done"):
        check(folder, SUITE)
    assert check(folder, SUITE, allow={"incomplete"})  # the title then says so, and differs
    with pytest.raises(ValueError, match=r"results.csv cannot be read"):
        check(folder / "nowhere", SUITE)
