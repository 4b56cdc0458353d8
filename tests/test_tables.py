"""Does the table show what was measured, mark the best, name what is missing, and refuse what would not be fair?"""

import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_runs import FLOOR_RECORD, SUITE, write, write_fake_runs
from rich.console import Console

from bench.runs import Run, find_runs, read_run, tidy
from bench.tables import Table, TableRefusal, comparison, to_latex, to_markdown, to_rich, to_text, write_tables
from bench.tables.formats import escape_latex
from bench.tables.numbers import Style, half_width, rank, si_style, significant_style, write_number, write_seeds

LABELS = [entry["label"] for entry in SUITE["methods"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return write_fake_runs(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def frame(runs: list[Run]) -> pd.DataFrame:
    return tidy(runs, FLOOR_RECORD)


def change(frame: pd.DataFrame, label: str, metric: str, column: str, value: Any) -> pd.DataFrame:
    changed = frame.copy()
    changed.loc[(changed["label"] == label) & (changed["metric"] == metric), column] = value
    return changed


def cell(table: Table, label: str, metric: str) -> tuple[str, str]:
    row = next(row for row in [*table.rows, *([table.floor] if table.floor else [])] if row.label == label)
    return tuple(row.cells[[column.metric for column in table.columns].index(metric)])


def column_of(table: Table, metric: str) -> list[tuple[str, str]]:
    return [cell(table, row.label, metric) for row in table.rows]


def fid(frame: pd.DataFrame, values: list[float]) -> pd.DataFrame:
    for label, value in zip(LABELS, values, strict=True):
        frame = change(frame, label, "fid_train", "value", value)
    return frame


# What it shows


def test_rows_are_in_the_suites_order_with_the_floor_last(frame: pd.DataFrame) -> None:
    table = comparison(frame, SUITE)
    assert [row.label for row in table.rows] == LABELS
    assert table.floor is not None and table.floor.label == "Real data"
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
    assert {"Stored parameters (M)", "Training (TFLOPs)", "Images (k)", "KID (×10⁻³) ↓", "Precision ↑"} <= set(table.headings)


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
    assert table.floor is not None and {c.mark for c in table.floor.cells} == {""}
    assert "**4.000**" in to_markdown(table) and "<ins>5.000</ins>" in to_markdown(table)
    assert r"\textbf{4.000}" in to_latex(table) and r"\underline{5.000}" in to_latex(table)
    assert "4.000*" in to_text(table) and "5.000+" in to_text(table)


def test_ties_share_the_mark(frame: pd.DataFrame) -> None:
    table = comparison(fid(frame, [4.0001, 4.0002, 5, 5, 6, 7]), SUITE)
    assert [mark for _, mark in column_of(table, "fid_train")] == ["best", "best", "second", "second", "", ""]


def test_a_single_method_is_not_ranked(frame: pd.DataFrame) -> None:
    table = comparison(frame[frame["label"].isin([LABELS[0], "Real data"])], SUITE)
    assert column_of(table, "fid_train")[0][1] == ""


def test_rank_shares_marks_within_the_interval_of_the_holder() -> None:
    texts = ["1", "2", "3", "9"]
    assert rank([1, 2, 3, 9], [0, 0, 0, 0], texts, lower_is_better=True) == ["best", "second", "", ""]
    assert rank([1, 2, 3, 9], [1.5, 0, 0, 0], texts, lower_is_better=True) == ["best", "best", "second", ""]
    assert rank([1, 2, 3, 9], [0, 0, 0, 7], texts, lower_is_better=False) == ["second", "best", "best", "best"]


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


def test_the_interval_is_students() -> None:
    assert half_width([1.0, 2.0]) == 0
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)  # t table: 0.975, 2 degrees of freedom
    assert write_seeds([1.0, 2.0, 3.0], Style(decimals=1)) == "2.0 ± 2.5"


def test_numbers() -> None:
    assert si_style([2.5e6, 1.2e6, 0.7e6], "B") == Style(1e6, 2, "MB")
    assert si_style([]) == Style(1.0, 0, "")
    assert si_style([640, 12]) == Style(1.0, 0, "")
    assert significant_style([0.0012], 3).decimals == 4  # never more
    assert significant_style([1234.5], 3).decimals == 0
    assert write_number(-0.0001, Style(decimals=2)) == "0.00"
    assert write_number(1234567, Style()) == "1,234,567"


# Refusals


def refusal(frame: pd.DataFrame) -> str:
    with pytest.raises(TableRefusal) as caught:
        comparison(frame, SUITE)
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
    assert len(comparison(tidy([read_run(run.path) for run in written]), SUITE).rows) == 2  # one is shared by both runs
    write(written[0].path / "eval.json", [record, other])
    both = tidy([read_run(run.path) for run in written])
    assert "choose one" in refusal(both)
    assert "steps 250" in "\n".join(comparison(both, SUITE, protocol_hash="9876543210").notes)


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


# How it is written


def test_the_same_runs_give_the_same_bytes(runs: list[Run], tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    orders = [runs, list(reversed(runs))]
    for folder, order in zip(folders, orders, strict=True):
        frame = tidy(order, FLOOR_RECORD)
        assert [path.name for path in write_tables(comparison(frame, SUITE), frame, folder)] == [
            "results.csv",
            "table.md",
            "table.tex",
        ]
    for name in ("table.md", "table.tex"):  # results.csv keeps the order of the runs it is given
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    again = tidy([read_run(run.path) for run in runs], FLOOR_RECORD)
    write_tables(comparison(again, SUITE), again, folders[1])
    for name in ("results.csv", "table.md", "table.tex"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_latex_escapes() -> None:
    assert escape_latex(r"a_b & 5% {x} $y #z ~^\ 10⁻³ ±") == (
        r"a\_b \& 5\% \{x\} \$y \#z \textasciitilde{}\textasciicircum{}\textbackslash{} 10$^{-3}$ $\pm$"
    )


def awkward(frame: pd.DataFrame) -> pd.DataFrame:
    """A label with characters that mean something to LaTeX and Markdown."""
    return frame.replace({"label": {LABELS[0]: r"A_1 & 50% |x| #2 \o"}})


def test_latex_is_balanced_and_every_row_has_all_columns(frame: pd.DataFrame) -> None:
    text = to_latex(comparison(awkward(frame), SUITE))
    assert r"A\_1 \& 50\% \textbar{}x\textbar{} \#2 \textbackslash{}o" in text
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert re.findall(r"\\begin\{([^}]*)\}", text) == ["table*", "tabular", "tabular"]
    assert all(ord(character) < 128 for character in text)
    for spec, body in re.findall(r"\\begin\{tabular\}\{(.*?)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r" \\")]
        assert len(rows) >= 7
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(spec)}


def test_latex_compiles(frame: pd.DataFrame, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    body = to_latex(comparison(awkward(frame), SUITE))
    (tmp_path / "t.tex").write_text(rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_rows_have_all_columns(frame: pd.DataFrame) -> None:
    text = to_markdown(comparison(awkward(frame), SUITE))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_fits_a_terminal(frame: pd.DataFrame, width: int) -> None:
    table = comparison(frame, SUITE)
    text = to_text(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in table.rows:
        for each in row.cells:
            assert each.text in text
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    console.print(to_rich(table))
    assert "…" not in console.export_text()
