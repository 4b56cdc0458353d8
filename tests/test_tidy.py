"""Does the tidy frame hold what was measured, and is it the same after CSV?"""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from fake_runs import FLOOR_RECORD, NUM_IMAGES, PROTOCOL, SUITE, write, write_fake_run, write_fake_runs

from bench import tidy as tidy_module
from bench.runs import find_runs, read_floor, read_run
from bench.tidy import Results, at_the_end, distinct_labels, gather, read_results, tidy

SPLIT = SUITE["methods"][1]
MIXED = SUITE["methods"][5]


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
    assert tidy_module.write(Results(frame, {}), tmp_path) == [tmp_path / "results.csv", tmp_path / "protocols.json"]
    again = tidy_module.read(tmp_path)
    pd.testing.assert_frame_equal(again.frame, frame, check_exact=True)
    assert again.records == {}
    before = (tmp_path / "results.csv").read_bytes()
    tidy_module.write(again, tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == before


def test_protocols_are_spelt_out_once_and_hashes_stand_for_one_each(tmp_path: Path) -> None:
    frame = tidy(write_fake_runs(tmp_path / "made", SUITE["methods"][:2]), FLOOR_RECORD)
    tidy_module.write(Results(frame, {}), tmp_path)
    assert "ancestral" not in (tmp_path / "results.csv").read_text()
    protocols = json.loads((tmp_path / "protocols.json").read_text())
    assert list(protocols) == ["0123456789"] and protocols["0123456789"]["sampler"] == "ancestral"
    (tmp_path / "protocols.json").unlink()
    with pytest.raises(ValueError, match=r"protocols.json does not tell of 0123456789: make it again"):
        read_results(tmp_path / "results.csv")
    frame.loc[frame["metric"] == "fid_train", "protocol"] = '{"sampler": "euler"}'
    with pytest.raises(ValueError, match="hash 0123456789 stands for two different protocols"):
        tidy_module.write(Results(frame, {}), tmp_path)


def test_scores_on_the_way_have_a_place_and_the_end_has_none(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, MIXED, curve=(0.25, 0.5))
    frame = tidy([run])
    curve = frame[frame["at_images"].notna()]
    assert set(curve["at_images"]) == {NUM_IMAGES * 0.25, NUM_IMAGES * 0.5}
    half = curve[(curve["at_images"] == NUM_IMAGES * 0.5) & (curve["metric"] == "fid_train")]
    assert list(half["at_train_flops"]) == [run.summary["train_flops"] * 0.5]
    assert list(half["at_device_seconds"]) == [run.summary["device_seconds"] * 0.5]
    assert list(half["value"]) == [run.evaluations[0]["metrics"]["fid_train"] * 2]
    assert "heldout_loss" in set(curve["metric"])
    pd.testing.assert_frame_equal(at_the_end(frame).reset_index(drop=True), tidy([write_fake_run(tmp_path / "other", MIXED)]))
    write(run.path / "curve.json", [{**run.curve[0], "images_seen": "many"}])
    with pytest.raises(ValueError, match=r"curve.json gives images_seen as 'many'"):
        tidy([read_run(run.path)])


def test_records_keep_what_explains_a_run_and_nothing_of_one_machine(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, MIXED)
    slurm = {"job_id": "13", "array_job_id": "12", "array_task_id": "1", "nodes": "n4"}
    session = {"started": "2030-01-01T00:00:00Z", "command": ["/here/tsbench"]}
    more = {"slurm": slurm, "node": "n4", "code_files": {"a": "b"}, "diff": "secret", "sessions": [session]}
    write(run.path / "provenance.json", {**run.provenance, **more})
    results = gather([read_run(run.path)])
    assert set(results.frame["job"]) == {"12_1"} and set(results.frame["node"]) == {"n4"}
    tidy_module.write(results, tmp_path)
    text = (tmp_path / "runs.json").read_text()
    assert "/here/tsbench" not in text and "secret" not in text and "code_files" not in text
    record = tidy_module.read(tmp_path).records[run.run_id]
    assert record["config"] == run.config
    assert record["provenance"]["slurm"] == slurm
    assert record["provenance"]["sessions"] == [{"started": "2030-01-01T00:00:00Z"}]
    write(run.path / "provenance.json", {**run.provenance, "slurm": {**slurm, "array_job_id": None}})
    assert set(tidy([read_run(run.path)])["job"]) == {"13"}
    write(run.path / "provenance.json", {**run.provenance, "slurm": dict.fromkeys(slurm)})
    assert set(tidy([read_run(run.path)])["job"]) == {""}


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("", "a,b\n1,2\n", "run,value\nx,notanumber\n"):
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(ValueError, match=r"results.csv.*make it again"):
            read_results(tmp_path / "results.csv")


def test_labels_are_told_apart_by_the_options_that_differ() -> None:
    keys = [("A", '{"k": 4, "e": 8}'), ("A", '{"k": 2, "e": 8}'), ("B", "{}")]
    assert list(distinct_labels(keys).values()) == ["A (k=2)", "A (k=4)", "B"]
