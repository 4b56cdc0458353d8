"""How is a published table written: as Markdown, LaTeX, CSV, or for a terminal? The same table gives the same bytes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from bench.files import make_folder, write_text_atomically
from bench.published.table import METRICS, MISSING, PublishedTable, Section
from bench.tables.formats import escape_latex, escape_markdown

ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}
BLOCKS = ("cost", "quality")
TERMINAL = 78  # columns of a narrow one
NO_BREAK = "\N{NO-BREAK SPACE}"
SETTINGS = ("Setting", "Paper", "Ours")
CSV_COLUMNS = ("table", "section", "row", "metric", "published", "confidence", "source", "ours", "ours_from", "num_seeds")


class Grid(NamedTuple):
    headings: list[str]
    rows: list[list[str]]
    is_ours: list[bool]  # by column


def grid(section: Section, blocks: Sequence[str] = BLOCKS) -> Grid:
    """The section as text: the row's name, then each metric as published and, where there can be one, ours beside it."""
    kept = [i for i, metric in enumerate(section.metrics) if METRICS[metric].block in blocks]
    headings, is_ours = [""], [False]
    rows = [[row.label] for row in section.rows]
    for i in kept:
        column = METRICS[section.metrics[i]]
        headings.append(column.title + ARROWS[column.better])
        is_ours.append(False)
        if column.has_ours:
            headings.append("ours, computed" if column.computed else "ours")
            is_ours.append(True)
        for cells, row in zip(rows, section.rows, strict=True):
            cells += [row.cells[i].shown, row.cells[i].ours or MISSING] if column.has_ours else [row.cells[i].shown]
    return Grid(headings, rows, is_ours)


def write_published(table: PublishedTable, folder: Path) -> list[Path]:
    """`NAME.md`, `NAME.tex` and `NAME.csv` in `folder`."""
    make_folder(folder)
    texts = {"md": to_markdown(table), "tex": to_latex(table), "csv": to_csv(table)}
    for suffix, text in texts.items():
        write_text_atomically(folder / f"{table.name}.{suffix}", text)
    return [folder / f"{table.name}.{suffix}" for suffix in texts]


def to_markdown(table: PublishedTable) -> str:
    """A table for each section, the settings side by side, the notes and the deviations."""

    def lines(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool) -> list[str]:
        rule = [":---", *["---:" if numbers else ":---"] * (len(headings) - 1)]
        return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *([escape_markdown(c) for c in row] for row in rows))]

    parts = [f"**{escape_markdown(table.title)}** ({escape_markdown(table.paper)})", ""]
    for section in table.sections:
        shown = grid(section)
        parts += [f"**{escape_markdown(section.title)}**", ""]
        parts += [f"{escape_markdown(section.setting)}", ""] if section.setting else []
        parts += [*lines([heading or "Row" for heading in shown.headings], shown.rows, numbers=True), ""]
    parts += ["**Settings**", "", *lines(SETTINGS, table.settings, numbers=False), ""]
    parts += ["**Notes**", "", *(f"- {escape_markdown(note)}" for note in table.notes), ""]
    parts += ["**Deviations of ours**", "", *(f"- {escape_markdown(text)}" for text in table.deviations)]
    return "\n".join(parts) + "\n"


def to_latex(table: PublishedTable) -> str:
    """A `table*` with a booktabs tabular for each section and one for the settings; needs booktabs and graphicx."""
    parts = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_latex(table.title)} ({_latex(table.paper)})}}",
        r"\scriptsize\setlength{\tabcolsep}{3pt}",
    ]
    for section in table.sections:
        shown = grid(section)
        headings = [
            rf"\textit{{{_latex(h)}}}" if ours else _latex(h) for h, ours in zip(shown.headings, shown.is_ours, strict=True)
        ]
        parts += [rf"\textbf{{{_latex(section.title)}}}\par"]
        parts += _tabular("l" + "r" * (len(headings) - 1), headings, shown.rows)
    parts += [r"\textbf{Settings}\par", *_tabular("lp{6cm}p{4cm}", SETTINGS, table.settings), r"\raggedright"]
    parts += [_latex(note) + r"\par" for note in table.notes]
    parts += [r"Deviations of ours:\par", *(_latex(text) + r"\par" for text in table.deviations), r"\end{table*}"]
    return "\n".join(parts) + "\n"


def to_csv(table: PublishedTable) -> str:
    """One line a figure, with where it is from; ours beside it."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section in table.sections:
        for row in section.rows:
            for cell in row.cells:
                if not cell.published and not cell.ours:
                    continue
                ours_from = ("computed" if METRICS[cell.metric].computed else "runs") if cell.ours else ""
                num_seeds = len(cell.values) if ours_from == "runs" else ""
                figure = (cell.metric, cell.published, cell.confidence, cell.source)
                writer.writerow((table.name, section.title, row.label, *figure, cell.ours, ours_from, num_seeds))
    return content.getvalue()


def to_rich(table: PublishedTable) -> Group:
    """For a terminal: costs and quality of a section below each other, ours in colour."""
    parts: list[Text | RichTable] = [Text(f"{table.title} ({table.paper})", style="bold")]
    for section in table.sections:
        parts.append(Text(f"\n{section.title}", style="bold"))
        for block in BLOCKS:
            shown = grid(section, [block])
            shown = shown._replace(
                headings=[heading.replace(" ↓", f"{NO_BREAK}↓").replace(" ↑", f"{NO_BREAK}↑") for heading in shown.headings]
            )
            if len(shown.headings) == 1:
                continue
            parts += [_rich_table(shown, columns) for columns in _side_by_side(shown)]
    settings = RichTable(*SETTINGS, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    settings.columns[0].no_wrap = True  # names are there to be typed
    for setting in table.settings:
        settings.add_row(*setting)
    parts += [settings, *(Text(note, style="dim") for note in table.notes)]
    return Group(*parts, Text("Deviations of ours", style="bold"), *(Text(f"- {text}") for text in table.deviations))


def _rich_table(shown: Grid, columns: Sequence[int]) -> RichTable:
    """Some columns of a section, beside the names of its rows."""
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    drawn.add_column(shown.headings[0], vertical="bottom", min_width=_width(shown, 0) - 2)
    for i in columns:
        style = "cyan" if shown.is_ours[i] else ""
        drawn.add_column(shown.headings[i], justify="right", vertical="bottom", style=style, width=_width(shown, i) - 2)
    for row in shown.rows:
        drawn.add_row(row[0], *(row[i] for i in columns))
    return drawn


def _side_by_side(shown: Grid) -> list[list[int]]:
    """The columns in as many tables as it takes for none to be cut in a narrow terminal; ours stay beside the published."""
    tables: list[list[int]] = [[]]
    widths = [_width(shown, i) for i in range(len(shown.headings))]
    left = TERMINAL - widths[0]
    for i in range(1, len(widths)):
        pair = widths[i] + (widths[i + 1] if shown.is_ours[i + 1 : i + 2] == [True] else 0)
        if pair > left and not shown.is_ours[i] and tables[-1]:
            tables.append([])
            left = TERMINAL - widths[0]
        tables[-1].append(i)
        left -= widths[i]
    return tables


def _width(shown: Grid, column: int) -> int:
    """With which no word and no number is cut."""
    words = [word for text in (shown.headings[column], *(row[column] for row in shown.rows)) for word in text.split(" ")]
    return max(map(len, words), default=0) + 2


def _tabular(columns: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [" & ".join(headings) + r" \\", r"\midrule", *(" & ".join(map(_latex, row)) + r" \\" for row in rows)]
    tabular = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]
    return [r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%", *tabular, r"}\par\medskip"]


def _latex(text: str) -> str:
    return escape_latex(text).replace("≈", r"$\approx$").replace("§", r"\S{}")
