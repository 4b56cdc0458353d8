"""Are run folders read as they were written, and is damage named?"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_runs import NUM_IMAGES, SUITE, write, write_fake_run, write_fake_runs

from bench.files import write_json_atomically, write_text_atomically
from bench.runs import (
    HEARTBEAT_FRESH_SECONDS,
    Run,
    find_runs,
    read_diagnostics,
    read_metrics,
    read_run,
    read_samples,
    run_state,
)
from bench.tidy import gather

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
    ("name", "attribute"),
    [("summary.json", "summary"), ("eval.json", "evaluations"), ("curve.json", "curve"), ("provenance.json", "provenance")],
)
@pytest.mark.parametrize("content", ['{"stored_parameters": 1', '"text"', "\x00"])
def test_a_damaged_record_is_named(run: Run, name: str, attribute: str, content: str) -> None:
    (run.path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*delete it and"):
        getattr(read_run(run.path), attribute)


def test_scores_on_the_way_are_read_with_their_places(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, MIXED, curve=(0.25, 0.75))
    assert [record["images_seen"] for record in run.curve] == [NUM_IMAGES * 0.25, NUM_IMAGES * 0.75]
    assert write_fake_run(tmp_path / "other", MIXED).curve == []
    assert Run(run.path, "another").curve == []
    records = json.loads((run.path / "curve.json").read_text())
    write(run.path / "curve.json", [{key: value for key, value in records[0].items() if key != "train_flops"}])
    with pytest.raises(ValueError, match=r"curve.json holds a record without .*train_flops"):
        _ = read_run(run.path).curve


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


def test_the_config_hash_ignores_seed_and_label_only(tmp_path: Path) -> None:
    one, other = write_fake_run(tmp_path, SPLIT), write_fake_run(tmp_path, {**SPLIT, "label": "renamed"}, seed=1)
    wider = write_fake_run(tmp_path, {**SPLIT, "options": {"experts": 8}})
    assert one.config_hash == other.config_hash != wider.config_hash


def test_runs_that_start_from_seeds_of_the_same_settings_have_the_same_config_hash(tmp_path: Path) -> None:
    dense = {"method": "dense"}
    sources = [write_fake_run(tmp_path, dense, seed) for seed in (0, 1)]
    wider = write_fake_run(tmp_path, {**dense, "options": {"width": 2}})
    runs = [
        write_fake_run(tmp_path, {**SPLIT, "init_from": f"run:{source.run_id}"}, seed)
        for seed, source in enumerate([*sources, wider])
    ]
    one, other, of_wider = runs
    assert one.config_hash == other.config_hash != of_wider.config_hash
    results = gather([*sources, *runs])
    assert results.settings_hash(one.run_id) == one.config_hash
    (sources[1].path / "config.yaml").unlink()  # what is not known counts as something else
    assert read_run(one.path).config_hash == one.config_hash != read_run(other.path).config_hash


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
