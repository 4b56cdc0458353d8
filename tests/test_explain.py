"""Is it told where a cell comes from, and is a cell found by what is printed?"""

from pathlib import Path
from typing import Any

import pytest
from cells import LABELS, cell
from fake_runs import NUM_IMAGES, SUITE, write, write_fake_runs

from bench import tidy
from bench.files import read_json
from bench.runs import Run, read_run
from bench.tables import Table, comparisons, explain
from bench.tidy import FLOOR

SLURM = {"job_id": "13", "array_job_id": "12", "array_task_id": "3", "restart_count": "1", "nodes": "n4", "cluster": None}
LIBRARIES = {"torch": "2.15.0", "timm": "1.0.31"}


def in_slurm(run: Run) -> Run:
    more = {"slurm": SLURM, "node": "n4", "host": "n4", "libraries": LIBRARIES, "dirty": True, "cuda": "13.0", "driver": "590.1"}
    write(run.path / "provenance.json", {**run.provenance, **more})
    (record,) = run.evaluations
    write(run.path / "eval.json", [{**record, "code_hash": "5c0ec0de", "scored": "2030-01-02T00:00:00Z"}])
    return read_run(run.path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("demo")
    return [in_slurm(run) for run in write_fake_runs(folder, SUITE["methods"][:3], range(3), (0.5,))]


@pytest.fixture(scope="module")
def results(runs: list[Run]) -> tidy.Results:
    return tidy.gather(runs, read_json(runs[0].path.parent.parent / "floor.json", dict))


@pytest.fixture(scope="module")
def tables(results: tidy.Results) -> tuple[Table, ...]:
    return comparisons(results.frame, SUITE)


def test_a_cell_is_told_with_its_runs_settings_code_job_and_protocol(
    tables: tuple[Table, ...], results: tidy.Results, runs: list[Run]
) -> None:
    text = explain(tables, results, "2", LABELS[1], "FID (train)")
    shown, _ = cell(tables[0], LABELS[1], "fid_train")
    assert f"(2) Quality\n{LABELS[1]}, FID (train): {shown}" in text
    for run in runs[3:6]:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [run.run_id]]
        value = run.evaluations[0]["metrics"]["fid_train"]
        assert line.split()[1:] == [str(run.config["seed"]), "fid_train", f"{value:.10g}", "500"]
        assert f"run {run.run_id}\n  state: done\n  code: c0dec0dec0, commit b02412e5d3c4b5a69788796a5b4c3d2e1f000000" in text
    assert not any(run.run_id in text for run in [*runs[:3], *runs[6:]])
    for part in (
        f"settings {runs[3].config_hash}",
        f"  method = multi_expert, elsewhere dense ({LABELS[0]}); dtr ({LABELS[2]})",
        f"  options.experts = 4, elsewhere – ({LABELS[0]}, {LABELS[2]})",
        "with uncommitted changes",
        "  scored: 2030-01-02T00:00:00Z by code 5c0ec0de",
        "  job: 12_3, job_id 13, array_job_id 12, array_task_id 3, restart_count 1, nodes n4\n",
        "  node: n4",
        "  device: 1 × cpu, threads 1\n",
        "  driver: driver 590.1, cuda 13.0",
        "  versions: python 3.12.3, torch 2.15.0, timm 1.0.31",
        "protocol 0123456789\n",
        "  steps: 50",
    ):
        assert part in text, part
    assert "seed =" not in text and "label" not in text


def test_only_what_differs_is_listed(tables: tuple[Table, ...], results: tidy.Results) -> None:
    alone = comparisons(results.frame[results.frame["label"] == LABELS[0]], SUITE)
    assert "nothing: no other row, or the same settings" in explain(alone, results, "1", LABELS[0], "Images")
    assert "train.lr" not in explain(tables, results, "1", LABELS[0], "Images")


def test_a_cost_has_no_protocol_and_a_dash_no_runs(tables: tuple[Table, ...], results: tidy.Results) -> None:
    assert "protocol: none" in explain(tables, results, "cost", LABELS[0], "images")
    frame = results.frame[(results.frame["label"] != LABELS[0]) | (results.frame["metric"] != "kid")]
    text = explain(comparisons(frame, SUITE), tidy.Results(frame, results.records), "2", LABELS[0], "KID")
    assert text.endswith("no value: none of the row's runs has this number\n")


def test_a_difference_is_told_with_the_baselines_runs(tables: tuple[Table, ...], results: tidy.Results, runs: list[Run]) -> None:
    text = explain(tables, results, "difference", LABELS[2], "Recall")
    assert text.startswith("(3) Difference")
    assert all(text.count(f"\nrun {run.run_id}\n") == 1 for run in [*runs[:3], *runs[6:]])
    assert f"settings {runs[6].config_hash}" in text and f"  method = dtr, elsewhere multi_expert ({LABELS[1]})" in text


def test_a_checkpoint_is_told_with_its_place(tables: tuple[Table, ...], results: tidy.Results) -> None:
    text = explain(tables, results, "at equal device", LABELS[0], "FID (held")
    assert "at_images" in text and f"{NUM_IMAGES // 2}" in text


def test_the_floor_is_told_without_runs(tables: tuple[Table, ...], results: tidy.Results) -> None:
    text = explain(tables, results, "2", "Real data", "FID (train)")
    assert FLOOR in text and "settings" not in text and "protocol 0123456789" in text


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (("9", LABELS[0], "KID"), ("no table '9'", "(1) Cost", "(2) Quality")),
        (("", LABELS[0], "KID"), ("no table ''", "(1) Cost")),
        (("At equal", LABELS[0], "KID"), ("table 'At equal' could be any of", "At equal images", "device time")),
        (("2", "D", "KID"), ("row 'D' could be any of", LABELS[0], LABELS[2])),
        (("2", "Nobody", "KID"), ("no row 'Nobody'", *LABELS[:3], "Real data")),
        (("2", LABELS[0], "FID"), ("column 'FID' could be any of FID (train), FID (held-out): give more",)),
        (("2", LABELS[0], ""), ("no column ''", "KID")),
        (("2", LABELS[0], "Images"), ("no column 'Images'", "KID (×10⁻³)")),
    ],
)
def test_a_cell_that_is_not_there_is_named(
    address: tuple[str, str, str], words: tuple[str, ...], tables: tuple[Table, ...], results: tidy.Results
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        explain(tables, results, *address)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("column", ["n", "N", "precision", "PRECISION ↑", "Class acc"])
def test_signs_and_capitals_do_not_matter(column: str, tables: tuple[Table, ...], results: tidy.Results) -> None:
    assert explain(tables, results, "quality", LABELS[0].lower(), column)


def test_committed_results_suffice(results: tidy.Results, tables: tuple[Table, ...], tmp_path: Path) -> None:
    tidy.write(results, tmp_path)
    again = tidy.read(tmp_path)
    address: Any = ("2", LABELS[1], "FID (train)")
    assert explain(comparisons(again.frame, SUITE), again, *address) == explain(tables, results, *address)
    (tmp_path / "runs.json").unlink()
    bare = tidy.read(tmp_path)
    with pytest.raises(ValueError, match=r"runs.json does not tell of .*tsbench collect"):
        explain(comparisons(bare.frame, SUITE), bare, *address)
