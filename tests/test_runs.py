"""Are run folders read as they were written, is damage named, and is the tidy frame the same after CSV?"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_runs import FLOOR_RECORD, PROTOCOL, SUITE, write, write_fake_run, write_fake_runs

from bench.files import write_json_atomically, write_text_atomically
from bench.runs import (
    HEARTBEAT_FRESH_SECONDS,
    Run,
    distinct_labels,
    find_runs,
    read_diagnostics,
    read_floor,
    read_metrics,
    read_results,
    read_run,
    read_samples,
    run_state,
    tidy,
    write_results,
)

SPLIT = SUITE["methods"][1]
MIXED = SUITE["methods"][5]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_fake_run(tmp_path, MIXED)


def test_a_run_is_read_as_it_was_written(run: Run) -> None:
    assert run.label == MIXED["label"]
    assert json.loads(run.options) == MIXED["options"]
    assert run.state == "done"
    assert run.summary["num_intervals"] == 8
    assert run.evaluations[0]["metrics"]["fid_train"] > 0
    assert run.provenance["code_hash"] == "c0dec0dec0"
    assert set(run.metrics["kind"]) == {"train", "heldout"}
    assert len(run.metrics) == len((run.path / "metrics.jsonl").read_text().splitlines())


def test_runs_are_found_in_a_suite_folder_and_in_a_folder_of_runs(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:2])
    (tmp_path / "runs" / "not-a-run").mkdir()
    expected = sorted(run.run_id for run in written)
    assert [run.run_id for run in find_runs(tmp_path)] == expected
    assert [run.run_id for run in find_runs(tmp_path / "runs")] == expected
    with pytest.raises(ValueError, match="no folder"):
        find_runs(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not a run folder"):
        read_run(tmp_path / "runs" / "not-a-run")


def test_state_is_told_from_the_folder(tmp_path: Path) -> None:
    assert run_state(tmp_path) == "planned"
    assert run_state(tmp_path / "not-there") == "planned"
    write(tmp_path / "progress.json", {"step": 3, "images_seen": 96, "time": 1000.0})
    assert run_state(tmp_path, now=1000.0 + HEARTBEAT_FRESH_SECONDS - 1) == "running"
    assert run_state(tmp_path, now=1000.0 + HEARTBEAT_FRESH_SECONDS) == "planned"
    for state in ("failed", "diverged"):
        write(tmp_path / "failure.json", {"state": state, "cause": "the loss is not finite"})
        assert run_state(tmp_path, now=1001.0) == state
    assert Run(tmp_path).failure == "the loss is not finite"
    (tmp_path / "done").touch()
    assert run_state(tmp_path, now=1001.0) == "done"


def test_diagnostics_carry_axes_and_history(run: Run) -> None:
    found = read_diagnostics(run.path)
    assert set(found) == {"intervals", "mixing_coefficients"}
    mixing = found["mixing_coefficients"]
    assert mixing.axes == ("expert", "basis")
    assert mixing.history is not None and mixing.images_seen is not None
    assert mixing.history.shape == (len(mixing.images_seen), *mixing.values.shape)
    np.testing.assert_array_equal(mixing.history[-1], mixing.values)
    assert found["intervals"].history is None
    assert found["intervals"].values.shape == (8, 2)


@pytest.mark.parametrize(
    ("name", "attribute"), [("summary.json", "summary"), ("eval.json", "evaluations"), ("provenance.json", "provenance")]
)
@pytest.mark.parametrize("content", ['{"stored_parameters": 1', '"text"', "\x00"])
def test_a_damaged_record_is_named(run: Run, name: str, attribute: str, content: str) -> None:
    (run.path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*delete it and"):
        getattr(read_run(run.path), attribute)


def test_damaged_arrays_are_named(run: Run) -> None:
    for name, read in (("diagnostics.npz", read_diagnostics), ("samples.npz", read_samples)):
        whole = (run.path / name).read_bytes()
        for damaged in (b"", b"text", whole[: len(whole) // 2]):
            (run.path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name}.*delete it"):
                read(run.path)
    np.savez(run.path / "samples.npz", arr_0=np.zeros((2, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="uint8"):
        read_samples(run.path)
    np.savez(run.path / "diagnostics.npz", routing=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="axis names"):
        read_diagnostics(run.path)


def test_a_damaged_line_is_named_but_one_being_written_is_left_out(run: Run) -> None:
    file = run.path / "metrics.jsonl"
    text = file.read_text()
    count = len(read_metrics(run.path))
    file.write_text(text + '{"kind": "train", "st')
    with pytest.raises(ValueError, match=rf"metrics.jsonl is damaged in line {count + 1}"):
        read_metrics(run.path)
    (run.path / "done").unlink()
    assert len(read_metrics(run.path)) == count
    lines = text.splitlines()
    file.write_text("\n".join([lines[0], "nonsense", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(run.path)


def test_a_config_that_is_no_config_is_named(run: Run) -> None:
    (run.path / "config.yaml").write_text("method: dense\n")
    with pytest.raises(ValueError, match=r"config.yaml has no seed, budget, diffusion"):
        _ = read_run(run.path).config


def test_tidy_has_a_row_per_run_and_metric(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SPLIT, seed=7)
    frame = tidy([run], FLOOR_RECORD)
    own = frame[frame["run"] == run.run_id].set_index("metric")
    assert own.index.is_unique
    assert own.loc["updates_per_parameter_set_min", "value"] == own.loc["updates_per_parameter_set_max", "value"] == 2000
    assert "peak_memory_bytes" not in own.index
    assert own.loc["fid_train", "value"] == run.evaluations[0]["metrics"]["fid_train"]
    assert own.loc["fid_train", "n"] == 500
    assert own.loc["fid_train", "protocol_hash"] == "0123456789"
    protocol = json.loads(own.loc["fid_train", "protocol"])
    assert protocol == {key: value for key, value in PROTOCOL.items() if key != "reference_path"}
    assert own.loc["train_flops", "protocol_hash"] == "" and pd.isna(own.loc["train_flops", "n"])
    assert (own["seed"] == 7).all() and (own["budget_amount"] == 256_000).all()
    floor = frame[frame["run"] == "floor"].set_index("metric")["value"]
    assert floor.to_dict() == FLOOR_RECORD["metrics"]


def test_a_run_that_is_not_finished_keeps_a_row(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SPLIT)
    for name in ("done", "summary.json", "eval.json"):
        (run.path / name).unlink()
    write(run.path / "progress.json", {"images_seen": 640, "time": 0.0})
    frame = tidy([read_run(run.path)])
    assert list(frame["metric"]) == ["images_seen"]
    assert list(frame["value"]) == [640]
    assert list(frame["state"]) == ["planned"]


def test_scoring_twice_under_one_protocol_counts_once_and_text_is_no_number(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, SPLIT)
    first = run.evaluations[0]
    second = {**first, "metrics": {**first["metrics"], "fid_train": 3.5}}
    write(run.path / "eval.json", [first, second])
    frame = tidy([read_run(run.path)])
    assert list(frame[frame["metric"] == "fid_train"]["value"]) == [3.5]
    write(run.path / "eval.json", [{**first, "metrics": {"fid_train": "3.5"}}])
    with pytest.raises(ValueError, match=r"eval.json gives fid_train as '3.5'"):
        tidy([read_run(run.path)])
    write(run.path / "eval.json", [{"n": 3}])
    with pytest.raises(ValueError, match="without protocol"):
        tidy([read_run(run.path)])


def test_csv_gives_the_same_frame_back_and_the_same_bytes(tmp_path: Path) -> None:
    runs = write_fake_runs(tmp_path, SUITE["methods"][:3], seeds=(0, 1))
    write(runs[0].path / "provenance.json", {"commit": None, "dirty": None, "code_hash": 'a "quoted", hash', "device": "cpu"})
    frame = tidy(find_runs(tmp_path), read_floor(tmp_path / "floor.json"))
    frame.loc[0, "value"] = math.nan
    frame.loc[1, "value"] = 0.1 + 0.2
    write_results(frame, tmp_path / "results.csv")
    again = read_results(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    write_results(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "results.csv").read_bytes()


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("", "a,b\n1,2\n", "run,value\nx,notanumber\n"):
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(ValueError, match=r"results.csv.*make it again"):
            read_results(tmp_path / "results.csv")


def test_labels_are_told_apart_by_the_options_that_differ() -> None:
    keys = [("A", '{"k": 4, "e": 8}'), ("A", '{"k": 2, "e": 8}'), ("B", "{}")]
    assert list(distinct_labels(keys).values()) == ["A (k=2)", "A (k=4)", "B"]


def test_the_config_hash_ignores_seed_and_label_only(tmp_path: Path) -> None:
    one, other = write_fake_run(tmp_path, SPLIT), write_fake_run(tmp_path, {**SPLIT, "label": "renamed"}, seed=1)
    wider = write_fake_run(tmp_path, {**SPLIT, "options": {"experts": 8}})
    assert one.config_hash == other.config_hash != wider.config_hash


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_json_atomically(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(file, "\ud800")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        write_text_atomically(folder, "text")  # cannot take the place of a folder: fails when it is renamed
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "record.json"]


def test_reading_results_needs_no_torch() -> None:
    code = "import sys, bench.runs, bench.tables, bench.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
