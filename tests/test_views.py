"""Do runs stand, at equal images, FLOPs and device time, with the last checkpoint that the budget reaches?"""

from pathlib import Path

import pandas as pd
import pytest
from cells import LABELS, cell, full_cell, part_of
from fake_runs import FLOOR_RECORD, NUM_IMAGES, SUITE, write, write_fake_runs

from bench.runs import Run, read_run
from bench.tables import Table, comparison
from bench.tidy import tidy

CURVE = (0.25, 0.5, 0.75)
IMAGES, FLOPS, TIME = "At equal images", "At equal training compute", "At equal device time"


def set_cost(run: Run, train_flops: float, device_seconds: float) -> Run:
    """Of the whole training, and in proportion of its checkpoints."""
    write(run.path / "summary.json", {**run.summary, "train_flops": train_flops, "device_seconds": device_seconds})
    spent = {"train_flops": train_flops, "device_seconds": device_seconds}
    parts = [record["images_seen"] / NUM_IMAGES for record in run.curve]
    records = [
        {**record, **{unit: amount * part for unit, amount in spent.items()}}
        for part, record in zip(parts, run.curve, strict=True)
    ]
    write(run.path / "curve.json", records)
    return read_run(run.path)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Three methods; the second costs 1.9 times the FLOPs of the first, the third 5 times, and its half of the time."""
    written = write_fake_runs(tmp_path, SUITE["methods"][:3], curve=CURVE)
    costs = ((1e12, 100.0), (1.9e12, 150.0), (5e12, 50.0))
    return [set_cost(run, *cost) for run, cost in zip(written, costs, strict=True)]


def fid_of(run: Run, part: float = 1.0) -> str:
    return f"{run.evaluations[0]['metrics']['fid_train'] / part:.2f}"


def column(table: Table, metric: str, title: str) -> list[str]:
    return [row.cells[part_of(table, title).metrics.index(metric)].text for row in part_of(table, title).rows]


def test_each_run_stands_with_its_last_checkpoint_within_the_budget(runs: list[Run]) -> None:
    table = comparison(tidy(runs, FLOOR_RECORD), SUITE)
    assert [part.title for part in table.parts][2:] == [
        "At equal images (256 k)",
        "At equal training compute (1.00 TFLOPs)",
        "At equal device time (50.0 device-seconds)",
    ]
    assert column(table, "fid_train", IMAGES) == [fid_of(run) for run in runs]
    assert column(table, "share_of_budget", IMAGES) == ["100", "100", "100"]
    # 1.9 * 0.5 = 0.95 of the FLOPs are within the budget, 1.9 * 0.75 are not; 5 * 0.25 is beyond it too
    assert column(table, "fid_train", FLOPS) == [fid_of(runs[0]), fid_of(runs[1], 0.5), "–"]
    assert column(table, "share_of_budget", FLOPS) == ["100", "95", "–"]
    assert column(table, "fid_train", TIME) == [fid_of(runs[0], 0.5), fid_of(runs[1], 0.25), fid_of(runs[2])]
    assert column(table, "share_of_budget", TIME) == ["100", "75", "100"]
    missing = next(note for note in table.notes if note.startswith("Missing"))
    assert f"{LABELS[2]} at equal training compute (1.00 TFLOPs): Share of budget, FID (train)" in missing
    assert any(note.startswith("At equal budgets: the largest that every run reaches") for note in table.notes)


def test_marks_are_given_within_the_view(runs: list[Run]) -> None:
    table = comparison(tidy(runs), SUITE)
    marks = {label: cell(table, label, "fid_train", FLOPS)[1] for label in LABELS[:3]}
    assert sorted(marks.values()) == ["", "best", "second"] and marks[LABELS[2]] == ""
    assert part_of(table, FLOPS).floor is None


def test_a_cell_names_the_checkpoint_it_was_made_of(runs: list[Run]) -> None:
    frame = tidy(runs)
    table = comparison(frame, SUITE)
    (source,) = full_cell(table, LABELS[1], "fid_train", FLOPS).sources
    assert frame.loc[source, "at_images"] == NUM_IMAGES * 0.5 and frame.loc[source, "run"] == runs[1].run_id
    (source,) = full_cell(table, LABELS[0], "fid_train", FLOPS).sources
    assert pd.isna(frame.loc[source, "at_images"])


def test_one_percent_over_counts_as_within(runs: list[Run]) -> None:
    barely = tidy([set_cost(runs[0], 1e12, 100.0), set_cost(runs[1], 1.0099e12, 100.0)])
    assert column(comparison(barely, SUITE), "share_of_budget", FLOPS) == ["100", "101"]
    more = tidy([set_cost(runs[0], 1e12, 100.0), set_cost(runs[1], 1.02e12, 100.0)])
    assert column(comparison(more, SUITE), "share_of_budget", FLOPS) == ["100", "76"]  # 0.75 * 1.02, not the end


def test_seeds_differ_in_device_time_and_the_share_is_a_range(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:1], seeds=range(3), curve=CURVE)
    frame = tidy([set_cost(run, 1e12, seconds) for run, seconds in zip(written, (100.0, 130.0, 160.0), strict=True)])
    table = comparison(frame, SUITE)  # 100 of 100 s; 97.5 of 100 s; 80 of 100 s
    assert column(table, "share_of_budget", TIME) == ["80–100"]
    assert "±" in column(table, "fid_train", TIME)[0]


def test_runs_that_were_scored_at_their_end_only_have_no_views(tmp_path: Path) -> None:
    table = comparison(tidy(write_fake_runs(tmp_path)), SUITE)
    assert [part.title for part in table.parts] == ["Cost", "Quality"]


def test_scores_on_the_way_by_another_protocol_do_not_count(runs: list[Run]) -> None:
    for run in runs:
        write(run.path / "curve.json", [{**record, "protocol_hash": "9876543210"} for record in run.curve])
    table = comparison(tidy([read_run(run.path) for run in runs]), SUITE)
    assert [part.title for part in table.parts] == ["Cost", "Quality"]


def test_scores_on_the_way_do_not_change_the_comparison_at_the_end(runs: list[Run]) -> None:
    with_curve = comparison(tidy(runs), SUITE)
    for run in runs:
        (run.path / "curve.json").unlink()
    without = comparison(tidy([read_run(run.path) for run in runs]), SUITE)
    for part, other in zip(with_curve.parts, without.parts, strict=False):
        assert [[c[:3] for c in row.cells] for row in part.rows] == [[c[:3] for c in row.cells] for row in other.rows]


def test_a_run_that_has_only_begun_makes_no_budget_of_nothing(runs: list[Run]) -> None:
    for name in ("done", "summary.json"):
        (runs[1].path / name).unlink()
    table = comparison(tidy([read_run(run.path) for run in runs]), SUITE, allow=["incomplete"])
    assert not [part for part in table.parts if part.title.startswith("At equal")]
