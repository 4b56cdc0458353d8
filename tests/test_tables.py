"""Does the table show what was measured, mark the best, and name what is missing?"""

import re
from pathlib import Path

import pandas as pd
import pytest
from cells import LABELS, cell, change, column_of, fid, full_cell, part_of
from fake_runs import FLOOR_RECORD, SUITE, write_fake_runs

from bench.runs import Run
from bench.tables import comparison, comparisons, to_latex, to_markdown, to_text
from bench.tables.numbers import Style, si_style, significant_style, write_number, write_seeds
from bench.tidy import tidy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return write_fake_runs(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def frame(runs: list[Run]) -> pd.DataFrame:
    return tidy(runs, FLOOR_RECORD)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Three methods with five seeds each, scored on their way too."""
    return tidy(write_fake_runs(tmp_path_factory.mktemp("seeded"), SUITE["methods"][:3], range(5), (0.3, 0.6, 0.9)), FLOOR_RECORD)


# What it shows


def test_rows_are_in_the_suites_order_with_the_floor_last(frame: pd.DataFrame) -> None:
    table = comparison(frame, SUITE)
    assert [part.caption for part in table.parts] == ["(1) Cost", "(2) Quality"]
    for part in table.parts:
        assert [row.label for row in part.rows] == LABELS
        assert part.floor is not None and part.floor.label == "Real data"
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("| ")]
    assert lines[-1].startswith("| Real data | 1.31 | 1.92 | 0.41 | 0.962 | 0.958 | 98.4 | 0.412 | 500 |")


def test_numbers_have_units_and_sensible_decimals(frame: pd.DataFrame) -> None:
    for metric, value in (
        ("stored_parameters", 2_512_345),
        ("train_flops", 1.2345e14),
        ("kid", 0.00512),
        ("class_accuracy", 0.9567),
    ):
        frame = change(frame, LABELS[0], metric, "value", value)
    table = comparison(frame, SUITE)
    assert cell(table, LABELS[0], "stored_parameters")[0] == "2.51"
    assert cell(table, LABELS[0], "train_flops")[0] == "123.5"
    assert cell(table, LABELS[0], "kid")[0] == "5.12"
    assert cell(table, LABELS[0], "class_accuracy")[0] == "95.7"
    assert cell(table, LABELS[0], "images_seen")[0] == "256"
    assert cell(table, LABELS[0], "updates_per_parameter_set")[0] == "8,000"
    assert cell(table, LABELS[1], "updates_per_parameter_set")[0] == "2,000"
    headings = {heading for part in table.parts for heading in part.headings}
    assert {"Stored parameters (M)", "Training (TFLOPs)", "Images (k)", "KID (×10⁻³) ↓", "Precision ↑"} <= headings


def test_updates_of_uneven_experts_are_a_range(frame: pd.DataFrame) -> None:
    frame = change(frame, LABELS[1], "updates_per_parameter_set_max", "value", 2003)
    assert cell(comparison(frame, SUITE), LABELS[1], "updates_per_parameter_set")[0] == "2,000–2,003"


def test_notes_say_what_a_reader_must_know(frame: pd.DataFrame) -> None:
    table = comparison(frame, {**SUITE, "converged": False})
    notes = "\n".join(table.notes)
    for part in (
        "Not converged",
        "256,000 images",
        "Protocol 0123456789",
        "sampler ancestral",
        "steps 50",
        "50 network evaluations",
        "n = 500",
        "cpu (1 thread)",
        "no two runs seen to train at the same time",
        "c0dec0dec0 (commit b02412e5d3, clean)",
        "10⁻³",
        "Seeds per row: 1",
    ):
        assert part in notes
    assert table.title.endswith("(not converged)")
    assert "Not converged" not in "\n".join(comparison(frame, SUITE).notes)


def test_notes_tell_runs_side_by_side_dirty_and_of_mixed_code(frame: pd.DataFrame) -> None:
    frame = frame.copy()
    frame["started"] = frame["started"].where(frame["started"] == "", "2030-01-01T00:00:00Z")
    frame.loc[frame["label"] == LABELS[2], "dirty"] = True
    frame.loc[frame["label"] == LABELS[3], "code_hash"] = "other"
    notes = "\n".join(comparison(frame, SUITE).notes)
    assert "some runs ran side by side" in notes
    assert "uncommitted" in notes
    assert "different code" in notes
    others = [label for label in LABELS if label not in LABELS[2:4]]
    assert f"c0dec0dec0 (commit b02412e5d3, clean) of {', '.join(others)};" in notes
    assert f"c0dec0dec0 (commit b02412e5d3, with uncommitted changes) of {LABELS[2]};" in notes
    assert f"other (commit b02412e5d3, clean) of {LABELS[3]}. The runs" in notes


def test_runs_of_one_row_that_other_code_made_are_named(seeded: pd.DataFrame) -> None:
    run = seeded.loc[(seeded["label"] == LABELS[1]) & (seeded["seed"] == 3), "run"].iloc[0]
    frame = seeded.assign(code_hash=seeded["code_hash"].where(seeded["run"] != run, "other"))
    assert f"other (commit b02412e5d3, clean) of {LABELS[1]} ({run})." in "\n".join(comparison(frame, SUITE).notes)


def test_an_absent_method_is_named(frame: pd.DataFrame) -> None:
    notes = comparison(frame[frame["label"] != LABELS[2]], SUITE).notes
    assert f"In the suite, but not run: {LABELS[2]}." in notes


# Marks


def test_best_is_bold_and_second_underlined_in_the_right_direction(frame: pd.DataFrame) -> None:
    frame = fid(frame, [9, 8, 7, 6, 5, 4])
    for i, label in enumerate(LABELS):
        frame = change(frame, label, "precision", "value", 0.9 - 0.1 * i)
    table = comparison(frame, SUITE)
    assert [mark for _, mark in column_of(table, "fid_train")] == ["", "", "", "", "second", "best"]
    assert [mark for _, mark in column_of(table, "precision")] == ["best", "second", "", "", "", ""]
    assert {mark for metric in ("n", "nearest_neighbour", "train_flops") for _, mark in column_of(table, metric)} == {""}
    floor = part_of(table, "Quality").floor
    assert floor is not None and {c.mark for c in floor.cells} == {""}
    assert "**4.000**" in to_markdown(table) and "<ins>5.000</ins>" in to_markdown(table)
    assert r"\textbf{4.000}" in to_latex(table) and r"\underline{5.000}" in to_latex(table)
    assert "4.000*" in to_text(table) and "5.000+" in to_text(table)


def test_ties_share_the_mark(frame: pd.DataFrame) -> None:
    table = comparison(fid(frame, [4.0001, 4.0002, 5, 5, 6, 7]), SUITE)
    assert [mark for _, mark in column_of(table, "fid_train")] == ["best", "best", "second", "second", "", ""]


def test_a_single_method_is_not_ranked(frame: pd.DataFrame) -> None:
    table = comparison(frame[frame["label"].isin([LABELS[0], "Real data"])], SUITE)
    assert column_of(table, "fid_train")[0][1] == ""


def test_methods_within_the_interval_of_the_best_share_its_mark(seeded: pd.DataFrame) -> None:
    values = {LABELS[0]: [10, 11, 12, 13, 14], LABELS[1]: [13.9] * 5, LABELS[2]: [14.1] * 5}  # interval of the first: 12 ± 1.96
    for label, of_seed in values.items():
        for seed, value in enumerate(of_seed):
            here = (seeded["label"] == label) & (seeded["seed"] == seed) & (seeded["metric"] == "fid_train")
            seeded = seeded.assign(value=seeded["value"].where(~here | seeded["at_images"].notna(), value))
    table = comparison(seeded, SUITE)
    assert cell(table, LABELS[0], "fid_train") == ("12.00 ± 1.96", "best")
    assert cell(table, LABELS[1], "fid_train") == ("13.90 ± 0.00", "best")
    assert cell(table, LABELS[2], "fid_train") == ("14.10 ± 0.00", "second")
    assert any("lies within the 95% interval of that mean, shares the mark" in note for note in table.notes)


# Columns and groups


def test_a_suite_can_ask_for_more_columns(frame: pd.DataFrame, runs: list[Run]) -> None:
    table = comparison(frame, {**SUITE, "columns": ["device_seconds", "heldout_loss"]})
    assert cell(table, LABELS[0], "device_seconds")[0] == f"{runs[0].summary['device_seconds']:.0f}"
    assert part_of(table, "Quality").metrics[-3:] == ("heldout_loss", "nearest_neighbour", "n")
    assert "device_seconds" not in part_of(comparison(frame, SUITE), "Cost").metrics
    with pytest.raises(ValueError, match=r"columns speed: choose from .*peak_memory_bytes"):
        comparison(frame, {**SUITE, "columns": ["speed"]})


def test_each_group_has_a_table_of_its_own_and_its_own_budget(frame: pd.DataFrame) -> None:
    groups = {"": LABELS[:1], "short": LABELS[1:3], "long": LABELS[3:5], "never": ["Nobody"]}
    entries = [{"method": "x", "label": label, "group": group} for group, labels in groups.items() for label in labels]
    of_group = {"short": {"title": "A short budget", "baseline": LABELS[2], "notes": "Only a trial."}}
    suite = {**SUITE, "methods": entries, "groups": of_group, "baseline": LABELS[0]}
    for label in LABELS[1:3]:
        frame = change(frame, label, "images_seen", "value", 1000)
    tables = comparisons(frame, suite)
    assert [table.title for table in tables] == [SUITE["title"], f"{SUITE['title']}: A short budget", f"{SUITE['title']}: long"]
    assert [[row.label for row in table.parts[0].rows] for table in tables] == [LABELS[:1], LABELS[1:3], LABELS[3:5]]
    assert [part.number for table in tables for part in table.parts] == [1, 2, 3, 4, 5, 6]
    assert "Only a trial." in tables[1].notes and "Only a trial." not in tables[0].notes
    stranger = next(run for run in frame["run"] if run.startswith("remix"))
    assert tables[-1].notes[-2:] == (
        "In the suite, but not run at all: never.",
        f"Not in the suite, and in no table: {stranger}.",
    )
    assert comparisons(frame[frame["label"].isin([LABELS[0], "Real data"])], SUITE) == (
        comparison(frame[frame["label"].isin([LABELS[0], "Real data"])], SUITE),
    )


# Differences to the baseline


def test_differences_are_paired_by_seed(seeded: pd.DataFrame) -> None:
    shift = {0: 1.0, 1: 1.1, 2: 0.9, 3: 1.0, 4: 1.0}
    final = seeded["at_images"].isna() & (seeded["metric"] == "fid_train")
    for seed, by in shift.items():
        value = float(seeded[final & (seeded["label"] == LABELS[0]) & (seeded["seed"] == seed)]["value"].iloc[0])
        here = final & (seeded["label"] == LABELS[1]) & (seeded["seed"] == seed)
        seeded = seeded.assign(value=seeded["value"].where(~here, value + by))
    table = comparison(seeded, SUITE)
    title = f"Difference to {LABELS[0]}"
    assert cell(table, LABELS[1], "fid_train", title) == ("+1.00 ± 0.09", "clear")  # t(4) 2.776 * 0.0707 / sqrt(5)
    assert [row.label for row in part_of(table, title).rows] == LABELS[1:3]
    assert cell(table, LABELS[1], "seeds", title)[0] == "5"
    assert cell(table, LABELS[1], "fid_train")[0] != cell(table, LABELS[1], "fid_train", title)[0]
    assert any(note.startswith("Differences: method minus baseline, seed by seed") for note in table.notes)
    other = comparison(seeded, {**SUITE, "baseline": LABELS[1]})
    assert cell(other, LABELS[0], "fid_train", f"Difference to {LABELS[1]}") == ("-1.00 ± 0.09", "clear")


def test_only_seeds_in_common_are_paired(seeded: pd.DataFrame) -> None:
    kept = seeded[(seeded["label"] != LABELS[1]) | seeded["seed"].isin([3, 4])]
    table = comparison(kept, SUITE)
    assert cell(table, LABELS[1], "seeds", "Difference")[0] == "2"
    text, mark = cell(table, LABELS[1], "fid_train", "Difference")
    assert re.fullmatch(r"[+-]\d+\.\d+ / [+-]\d+\.\d+", text) and mark == ""
    assert cell(table, LABELS[2], "seeds", "Difference")[0] == "5"
    sources = full_cell(table, LABELS[1], "fid_train", "Difference").sources
    assert sorted(kept.loc[list(sources), "seed"]) == [3, 3, 4, 4]


def test_one_seed_or_no_baseline_makes_no_differences(frame: pd.DataFrame, seeded: pd.DataFrame) -> None:
    titles = [part.title for part in comparison(frame, SUITE).parts]
    assert titles == ["Cost", "Quality"]
    without = comparison(seeded[seeded["label"] != LABELS[0]], SUITE)
    assert not any(part.title.startswith("Difference") for part in without.parts)


# Missing cells


def test_missing_cells_print_a_dash_and_are_named(frame: pd.DataFrame) -> None:
    gone = (frame["label"] == LABELS[0]) & frame["metric"].isin(["kid", "sample_images_per_second"])
    frame = change(frame[~gone], LABELS[3], "recall", "value", float("nan"))
    table = comparison(frame, SUITE)
    for label, metric in ((LABELS[0], "kid"), (LABELS[0], "sample_images_per_second"), (LABELS[3], "recall")):
        assert cell(table, label, metric) == ("–", "")
    assert f"Missing (–): {LABELS[0]}: Sample images/s, KID; {LABELS[3]}: Recall." in table.notes
    assert not any("Missing" in note for note in comparison(tidy_of(frame, LABELS[1]), SUITE).notes)


def tidy_of(frame: pd.DataFrame, label: str) -> pd.DataFrame:
    return frame[frame["label"] == label]


# Seeds


def test_two_seeds_are_listed_and_three_have_an_interval(tmp_path: Path) -> None:
    written = write_fake_runs(tmp_path, SUITE["methods"][:2], seeds=(0, 1, 2))
    two = comparison(tidy([run for run in written if run.config["seed"] < 2]), SUITE)
    first = [f"{run.evaluations[0]['metrics']['precision']:.3f}" for run in written[:3]]
    assert cell(two, LABELS[0], "precision")[0] == f"{first[0]} / {first[1]}"
    assert any("all points are listed" in note for note in two.notes)
    three = comparison(tidy(written), SUITE)
    assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3}", cell(three, LABELS[0], "precision")[0])
    assert cell(three, LABELS[0], "images_seen")[0] == "256"
    assert cell(three, LABELS[0], "seeds")[0] == "3"
    assert any("95% interval" in note and "all points" not in note for note in three.notes)
    fewer = tidy(written)
    fewer = fewer[~((fewer["run"] == written[0].run_id) & (fewer["metric"] == "kid"))]
    assert any(f"{LABELS[0]}: KID (2 of 3 seeds)" in note for note in comparison(fewer, SUITE).notes)


def test_numbers() -> None:
    assert write_seeds([1.0, 2.0, 3.0], Style(decimals=1)) == "2.0 ± 2.5"
    assert write_seeds([1.0, 2.0, 3.0], Style(decimals=1), signed=True) == "+2.0 ± 2.5"
    assert write_seeds([0.5, -0.01], Style(decimals=1), signed=True) == "+0.5 / 0.0"
    assert si_style([2.5e6, 1.2e6, 0.7e6], "B") == Style(1e6, 2, "MB")
    assert si_style([]) == Style(1.0, 0, "")
    assert si_style([640, 12]) == Style(1.0, 0, "")
    assert significant_style([0.0012], 3).decimals == 4  # never more
    assert significant_style([1234.5], 3).decimals == 0
    assert write_number(-0.0001, Style(decimals=2)) == "0.00"
    assert write_number(1234567, Style()) == "1,234,567"
