"""How is a finished table written: as Markdown, LaTeX, or for a terminal? The same table gives the same bytes."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from bench.files import write_text_atomically
from bench.runs import write_results
from bench.tables.comparison import Cell, Row, Table

BLOCKS = ("cost", "quality")
LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
    "–": "--",
    "†": r"\dag{}",
}

SUPERSCRIPTS = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
PLAIN = str.maketrans(SUPERSCRIPTS, "-0123456789")


def write_tables(table: Table, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """`results.csv` (the tidy frame), `table.md` and `table.tex` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("results.csv", "table.md", "table.tex")]
    write_results(frame, paths[0])
    write_text_atomically(paths[1], to_markdown(table))
    write_text_atomically(paths[2], to_latex(table))
    return paths


def to_markdown(table: Table) -> str:
    """Two tables, cost and quality, with the notes as a list."""
    marks = {"best": "**{}**", "second": "<ins>{}</ins>", "": "{}"}

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    parts = [f"**{_escape_markdown(table.title)}**", ""]
    for name in BLOCKS:
        block = table.block(name)
        parts.append(line(["Method", *map(_escape_markdown, block.headings)]))
        parts.append(line([":---", *["---:"] * len(block.headings)]))
        for row in _all_rows(block):
            parts.append(
                line([_escape_markdown(row.label), *(marks[cell.mark].format(_escape_markdown(cell.text)) for cell in row.cells)])
            )
        parts.append("")
    parts += [f"- {_escape_markdown(note)}" for note in table.notes]
    return "\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    """A `table*` with two booktabs tabulars and the notes below them; needs the package booktabs."""
    marks = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    parts = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        r"\small",
    ]
    for name in BLOCKS:
        block = table.block(name)
        parts += [rf"\begin{{tabular}}{{l{'r' * len(block.headings)}}}", r"\toprule"]
        parts += [" & ".join(["Method", *map(_stack_latex, block.headings)]) + r" \\", r"\midrule"]
        for row in _all_rows(block):
            if row is block.floor:
                parts.append(r"\midrule")
            cells = [marks[cell.mark].format(escape_latex(cell.text)) for cell in row.cells]
            parts.append(" & ".join([escape_latex(row.label), *cells]) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}", r"\par\medskip"]
    parts += [r"\raggedright\footnotesize"]
    parts += [escape_latex(note) + r"\par" for note in table.notes]
    parts += [r"\end{table*}"]
    return "\n".join(parts) + "\n"


def to_rich(table: Table) -> Group:
    """For a terminal of 80 columns or more: two blocks, best bold green, second underlined."""
    styles = {"best": "bold green", "second": "underline", "": ""}
    return _terminal(table, lambda cell: Text(cell.text, style=styles[cell.mark], justify="right"))


def to_text(table: Table, width: int = 100) -> str:
    """Plain text, without styles: `*` marks the best and `+` the second."""
    signs = {"best": "*", "second": "+", "": " "}
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_terminal(table, lambda cell: Text(cell.text + signs[cell.mark], justify="right"), marks="* best, + second"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def escape_latex(text: str) -> str:
    escaped = "".join(LATEX_CHARACTERS.get(character, character) for character in text)
    return re.sub(f"[{SUPERSCRIPTS}]+", lambda run: f"$^{{{run.group().translate(PLAIN)}}}$", escaped)


def _terminal(table: Table, write: Callable[[Cell], Text], marks: str = "") -> Group:
    parts: list[Text | RichTable] = [Text(table.title, style="bold")]
    for name in BLOCKS:
        block = table.block(name)
        grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
        grid.add_column("Method", vertical="bottom", no_wrap=True)
        for heading in block.short_headings:
            grid.add_column(_narrow(heading, 8), justify="right", vertical="bottom")
        for row in _all_rows(block):
            if row is block.floor:
                grid.add_section()
            grid.add_row(row.label, *map(write, row.cells))
        parts.append(grid)
    if marks:
        parts.append(Text(marks))
    return Group(*parts, *(Text(note, style="dim") for note in table.notes))


def _all_rows(block: Table) -> list[Row]:
    """The methods' rows, then the floor, where it has anything to say in this block."""
    floor = block.floor
    return (
        [*block.rows, floor] if floor and any(any(c.isdigit() for c in cell.text) for cell in floor.cells) else list(block.rows)
    )


def _narrow(heading: str, width: int) -> str:
    return "\n".join(textwrap.wrap(heading, width, break_long_words=False, break_on_hyphens=False))


def _stack_latex(heading: str) -> str:
    return rf"\shortstack[r]{{{escape_latex(_narrow(heading, 12)).replace(chr(10), chr(92) * 2)}}}"


def _escape_markdown(text: str) -> str:
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    for character in "\\|*_<>`":
        text = text.replace(character, f"\\{character}")
    return text
