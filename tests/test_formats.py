"""Is a table written well: as Markdown, LaTeX, CSV, HTML and for a terminal?"""

import io
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from cells import LABELS, cell, change, full_cell
from fake_runs import FLOOR_RECORD, SUITE, write_fake_runs
from rich.console import Console

from bench.tables import comparison, to_csv, to_html, to_latex, to_markdown, to_rich, to_text
from bench.tables.formats import escape_latex
from bench.tidy import tidy


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return tidy(write_fake_runs(tmp_path_factory.mktemp("demo")), FLOOR_RECORD)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Three methods with five seeds each, scored on their way too."""
    return tidy(write_fake_runs(tmp_path_factory.mktemp("seeded"), SUITE["methods"][:3], range(5), (0.3, 0.6, 0.9)), FLOOR_RECORD)


def test_latex_escapes() -> None:
    assert escape_latex(r"a_b & 5% {x} $y #z ~^\ 10⁻³ ±") == (
        r"a\_b \& 5\% \{x\} \$y \#z \textasciitilde{}\textasciicircum{}\textbackslash{} 10$^{-3}$ $\pm$"
    )


def test_latex_has_a_true_minus_and_ranges_stay_ranges(seeded: pd.DataFrame) -> None:
    frame = change(seeded, LABELS[1], "updates_per_parameter_set_max", "value", 2003)
    text = to_latex(comparison(change(frame, LABELS[1], "kid", "value", -0.00312), SUITE))
    assert "2,000--2,003" in text and "$-$3.12 $\\pm$ 0.00" in text


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


def test_latex_compiles(frame: pd.DataFrame, seeded: pd.DataFrame, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    body = to_latex(comparison(awkward(frame), SUITE)) + to_latex(comparison(seeded, SUITE))
    packages = r"\usepackage{booktabs,graphicx}"
    (tmp_path / "t.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "Float too large" not in done.stdout


def test_csv_has_a_row_per_method_as_printed(seeded: pd.DataFrame) -> None:
    table = comparison(seeded, SUITE)
    shown = pd.read_csv(io.StringIO(to_csv([table])), dtype="str", keep_default_na=False).set_index("Method")
    assert list(shown.index) == [*LABELS[:3], "Real data"]
    assert shown.loc[LABELS[1], "FID (train) ↓"] == cell(table, LABELS[1], "fid_train")[0]
    assert shown.loc[LABELS[1], f"Difference to {LABELS[0]} with the same seed: Pairs"] == "5"
    assert shown.loc[LABELS[0], f"Difference to {LABELS[0]} with the same seed: Pairs"] == ""
    assert shown.loc[LABELS[2], "At equal images (256 k): Share of budget (%)"] == "100"


def test_html_is_well_formed_and_every_cell_can_be_sorted_and_followed(seeded: pd.DataFrame) -> None:
    table = comparison(awkward(seeded), SUITE)
    text = to_html(table, seeded)
    assert text.isascii()
    root = ElementTree.fromstring(text)
    assert [each.findtext("caption") for each in root.iter("table")] == [part.caption for part in table.parts]
    for part, shown in zip(table.parts, root.iter("table"), strict=True):
        assert shown.get("id") == f"table-{part.number}"
        assert [head.get("data-metric") for head in shown.findall("thead/tr/th")[1:]] == list(part.metrics)
        assert {len(row) for row in shown.iter("tr")} == {len(part.metrics) + 1}
        assert ["".join(row[0].itertext()) for row in shown.findall("tbody/tr")] == [row.label for row in part.rows]
    quality = root.findall("table")[1]
    (cells,) = [row.findall("td") for row in quality.findall("tbody/tr") if row[0].text == LABELS[1]]
    shown, own = cells[0], full_cell(table, LABELS[1], "fid_train")
    assert "".join(shown.itertext()) == own.text and float(shown.get("data-sort", "")) == own.value
    assert shown.get("data-runs", "").split() == list(dict.fromkeys(seeded[seeded["label"] == LABELS[1]]["run"]))
    assert [row[0].text for row in quality.findall("tfoot/tr")] == ["Real data"]
    best = [mark for row in quality.findall("tbody/tr") for mark in row[1] if mark.tag == "strong"]
    assert len(best) >= 1
    assert [item.text for item in root.findall("ul/li")] == list(table.notes)


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
    for part in table.parts:
        for row in part.rows:
            for each in row.cells:
                assert each.text in text
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    console.print(to_rich(table))
    assert "…" not in console.export_text()
