"""Is a table refused that would not be fair, in one sentence; and does it say so where it is made all the same?"""

from collections.abc import Collection
from pathlib import Path

import pandas as pd
import pytest
from cells import LABELS, cell, change
from fake_runs import FLOOR_RECORD, SUITE, write, write_fake_runs

from bench.runs import Run, find_runs, read_run
from bench.tables import TableRefusal, comparison, shared_protocol
from bench.tidy import tidy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return write_fake_runs(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def frame(runs: list[Run]) -> pd.DataFrame:
    return tidy(runs, FLOOR_RECORD)


def refusal(frame: pd.DataFrame, allow: Collection[str] = ()) -> str:
    with pytest.raises(TableRefusal) as caught:
        comparison(frame, SUITE, allow=allow)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_different_protocols_are_refused_and_the_field_named(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:2])
    record = written[1].evaluations[0]
    protocol = {**record["protocol"], "steps": "250", "reference": {"train": "aa", "heldout": "cc"}}
    write(written[1].path / "eval.json", [{**record, "protocol_hash": "9876543210", "protocol": protocol}])
    frame = tidy([read_run(run.path) for run in written])
    message = refusal(frame)
    assert "reference.heldout (bb and cc); steps (50 and 250)" in message
    assert all(run.run_id in message for run in written)
    other = {**record, "protocol_hash": "9876543210", "protocol": protocol}
    write(written[1].path / "eval.json", [record, other])
    shared = comparison(tidy([read_run(run.path) for run in written]), SUITE)  # one is shared by both runs
    assert len(shared.parts[0].rows) == 2
    write(written[0].path / "eval.json", [record, other])
    both = tidy([read_run(run.path) for run in written])
    assert "choose one" in refusal(both)
    assert "steps 250" in "\n".join(comparison(both, SUITE, protocol_hash="98765").notes)
    with pytest.raises(TableRefusal, match="no run was scored by the protocol abc: choose from 0123456789, 9876543210"):
        comparison(both, SUITE, protocol_hash="abc")


def test_a_floor_of_another_protocol_is_refused(runs: list[Run]) -> None:
    protocol = {**FLOOR_RECORD["protocol"], "extractor": "inception"}
    message = refusal(tidy(runs, {**FLOOR_RECORD, "protocol_hash": "9876543210", "protocol": protocol}))
    assert "floor" in message and "extractor (digits and inception)" in message


def test_unequal_budgets_are_refused(frame: pd.DataFrame, runs: list[Run]) -> None:
    assert comparison(change(frame, LABELS[1], "images_seen", "value", 256_000 * 1.0099), SUITE)
    message = refusal(change(frame, LABELS[1], "images_seen", "value", 256_000 * 1.02))
    assert runs[1].run_id in message and "images_seen" in message and "261120" in message
    flops = frame.assign(budget_unit=frame["budget_unit"].where(frame["run"] == "floor", "train_flops"))
    assert "train_flops" in refusal(flops)
    mixed = frame.copy()
    mixed.loc[mixed["label"] == LABELS[4], "budget_unit"] = "device_seconds"
    message = refusal(mixed)
    assert f"{runs[4].run_id} in device_seconds" in message


def test_incomplete_and_unscored_runs_are_refused(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:3])
    (written[0].path / "done").unlink()
    (written[1].path / "done").unlink()
    write(written[1].path / "failure.json", {"state": "diverged", "cause": "x"})
    message = refusal(tidy(find_runs(tmp_path)))
    assert f"{written[0].run_id} (planned)" in message and f"{written[1].run_id} (diverged)" in message
    assert written[2].run_id not in message
    (written[0].path / "done").touch()
    (written[0].path / "eval.json").unlink()
    assert written[0].run_id in refusal(tidy([read_run(written[0].path), written[2]]))
    assert "no run" in refusal(tidy([]))


def test_different_sample_counts_are_refused(frame: pd.DataFrame, runs: list[Run]) -> None:
    message = refusal(change(frame, LABELS[2], "fid_train", "n", 400))
    assert f"{runs[2].run_id} (400 samples)" in message and "(500 samples)" in message


def test_runs_that_are_no_seeds_of_each_other_are_refused(frame: pd.DataFrame, runs: list[Run]) -> None:
    message = refusal(frame.replace({"label": {LABELS[0]: LABELS[2]}}))
    assert runs[0].run_id in message and runs[2].run_id in message and "settings" in message


# What is shown all the same


def test_each_refusal_names_what_would_show_it_all_the_same(frame: pd.DataFrame) -> None:
    unequal = change(frame, LABELS[1], "images_seen", "value", 300_000)
    assert refusal(unequal).endswith("or show them all the same with --allow budgets")
    table = comparison(unequal, SUITE, allow={"budgets"})
    assert table.title.startswith(f"{SUITE['title']} [shown although the budgets are not equal, as images_seen is 256000 for")
    assert cell(table, LABELS[1], "images_seen")[0] == "300"
    counted = change(unequal, LABELS[2], "fid_train", "n", 400)
    assert "(400 samples)" in refusal(counted, allow={"budgets"})
    both = comparison(counted, SUITE, allow={"budgets", "n"})
    assert both.title.count("[shown although") == 2 and "(400 samples)" in both.title


def test_what_cannot_be_allowed_is_named(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="everything cannot be allowed: choose from protocols, incomplete, n, budgets"):
        comparison(frame, SUITE, allow={"everything"})
    assert "shown although" not in comparison(frame, SUITE, allow={"budgets"}).title


def test_incomplete_runs_are_shown_with_what_they_have(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:3])
    for name in ("done", "eval.json", "summary.json"):
        (written[0].path / name).unlink()
    write(written[0].path / "progress.json", {"images_seen": 1000, "time": 0.0})
    frame = tidy(find_runs(tmp_path))
    table = comparison(frame, SUITE, allow={"incomplete"})
    assert f"[shown although runs {written[0].run_id} (planned) are not done]" in table.title
    assert cell(table, LABELS[0], "fid_train") == ("–", "")
    assert cell(table, LABELS[0], "images_seen")[0] == "1"
    assert any(note.startswith("Missing (–)") and LABELS[0] in note for note in table.notes)
    assert cell(table, LABELS[1], "fid_train")[0] != "–"


def test_mixed_protocols_are_shown_each_with_its_own(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:4])
    record = written[1].evaluations[0]
    other = {**record, "protocol_hash": "9876543210", "protocol": {**record["protocol"], "steps": "250"}}
    other["metrics"] = {**other["metrics"], "fid_train": 77.0}
    for run in (written[1], written[3]):
        write(run.path / "eval.json", [other])
    write(written[2].path / "eval.json", [written[2].evaluations[0], {**other, "metrics": {"fid_train": 99.0}}])
    frame = tidy([read_run(run.path) for run in written])
    assert refusal(frame).endswith("or show them all the same with --allow protocols")
    with pytest.raises(TableRefusal, match=r"score all with one protocol$"):  # plots have no --allow
        shared_protocol(frame)
    table = comparison(frame, SUITE, allow=["protocols"])
    assert "[shown although runs" in table.title and "steps (50 and 250)" in table.title
    assert cell(table, LABELS[1], "fid_train")[0] == "77.00"
    assert cell(table, LABELS[2], "fid_train")[0] == "99.00"  # of its two, the one that more runs have
    assert sum(note.startswith("Protocol ") for note in table.notes) == 2


def test_different_units_of_budget_can_be_shown(frame: pd.DataFrame) -> None:
    mixed = frame.copy()
    mixed.loc[mixed["label"] == LABELS[4], "budget_unit"] = "device_seconds"
    table = comparison(mixed, SUITE, allow=["budgets"])
    assert "counted differently" in table.title
    assert "256,000 device-seconds of training or 256,000 images, summed over experts." in table.notes[0]
