"""How is a finished table written: as Markdown, LaTeX, CSV, or for a terminal? The same table gives the same bytes."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from bench.tables.table import Cell, Part, Table

NUM_FIRST = 2  # parts beside the notes in LaTeX; further ones stand in a float of their own, so that each fits a page
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


def to_markdown(table: Table) -> str:
    """A table for each part, with the notes as a list."""
    marks = {"best": "**{}**", "clear": "**{}**", "second": "<ins>{}</ins>", "": "{}"}

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    parts = [f"**{escape_markdown(table.title)}**", ""]
    for part in table.parts:
        parts += [f"*{escape_markdown(part.caption)}*", ""]
        parts.append(line(["Method", *map(escape_markdown, part.headings)]))
        parts.append(line([":---", *["---:"] * len(part.headings)]))
        for row in part.all_rows:
            parts.append(
                line([escape_markdown(row.label), *(marks[cell.mark].format(escape_markdown(cell.text)) for cell in row.cells)])
            )
        parts.append("")
    parts += [f"- {escape_markdown(note)}" for note in table.notes]
    return "\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    """A `table*` with the first parts and the notes, and one with the others; needs the packages booktabs and graphicx."""
    first, others = table.parts[:NUM_FIRST], table.parts[NUM_FIRST:]
    notes = [r"\raggedright\footnotesize", *(escape_latex(note) + r"\par" for note in table.notes)]
    parts = [r"% needs \usepackage{booktabs,graphicx}", *_float(escape_latex(table.title), first, notes)]
    if others:
        parts += _float(f"{escape_latex(table.title)} (continued)", others, [])
    return "\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """One row per method, as printed; columns of parts after the first two are headed by the part's title too."""
    rows = []
    for table in tables:
        by_label: dict[str, dict[str, str]] = {}
        for i, part in enumerate(table.parts):
            headings = [f"{part.title}: {heading}" if i >= NUM_FIRST else heading for heading in part.headings]
            for row in part.all_rows:
                cells = zip(headings, (cell.text for cell in row.cells), strict=True)
                by_label.setdefault(row.label, {"Table": table.title, "Method": row.label}).update(cells)
        rows += list(by_label.values())
    return str(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def to_rich(table: Table) -> Group:
    """For a terminal of 80 columns or more: best bold green, second underlined."""
    styles = {"best": "bold green", "clear": "bold", "second": "underline", "": ""}
    return _terminal(table, lambda cell: Text(cell.text, style=styles[cell.mark], justify="right"))


def to_text(table: Table, width: int = 100) -> str:
    """Plain text, without styles: `*` stands for bold and `+` for underlined."""
    signs = {"best": "*", "clear": "*", "second": "+", "": " "}
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_terminal(table, lambda cell: Text(cell.text + signs[cell.mark], justify="right"), "* bold, + underlined"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def escape_latex(text: str) -> str:
    escaped = "".join(LATEX_CHARACTERS.get(character, character) for character in text)
    return re.sub(f"[{SUPERSCRIPTS}]+", lambda run: f"$^{{{run.group().translate(PLAIN)}}}$", escaped)


def _float(caption: str, parts: Sequence[Part], notes: Sequence[str]) -> list[str]:
    lines = [r"\begin{table*}", r"\centering", rf"\caption{{{caption}}}", r"\small"]
    for part in parts:
        lines += [rf"\textit{{{escape_latex(part.caption)}}}\par\smallskip"]
        lines += [r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%", *_tabular(part), r"}\par\medskip"]
    return [*lines, *notes, r"\end{table*}"]


def _tabular(part: Part) -> list[str]:
    marks = {"best": r"\textbf{{{}}}", "clear": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    lines = [rf"\begin{{tabular}}{{l{'r' * len(part.headings)}}}", r"\toprule"]
    lines += [" & ".join(["Method", *map(_stack_latex, part.headings)]) + r" \\", r"\midrule"]
    for row in part.all_rows:
        if row is part.floor:
            lines.append(r"\midrule")
        cells = [marks[cell.mark].format(_number_latex(cell.text)) for cell in row.cells]
        lines.append(" & ".join([escape_latex(row.label), *cells]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _terminal(table: Table, write: Callable[[Cell], Text], marks: str = "") -> Group:
    parts: list[Text | RichTable] = [Text(table.title, style="bold")]
    for part in table.parts:
        grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
        grid.add_column("Method", vertical="bottom", no_wrap=True)
        for heading in part.short_headings:
            grid.add_column(_narrow(heading, 8), justify="right", vertical="bottom")
        for row in part.all_rows:
            if row is part.floor:
                grid.add_section()
            grid.add_row(row.label, *map(write, row.cells))
        parts += [Text(part.caption, style="italic"), grid]
    if marks:
        parts.append(Text(marks))
    return Group(*parts, *(Text(note, style="dim") for note in table.notes))


def _narrow(heading: str, width: int) -> str:
    return "\n".join(textwrap.wrap(heading, width, break_long_words=False, break_on_hyphens=False))


def _stack_latex(heading: str) -> str:
    return rf"\shortstack[r]{{{escape_latex(_narrow(heading, 12)).replace(chr(10), chr(92) * 2)}}}"


def _number_latex(text: str) -> str:
    """With a true minus before a number, but not inside a range."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escape_latex(text))


def escape_markdown(text: str) -> str:
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    for character in "\\|*_<>`":
        text = text.replace(character, f"\\{character}")
    return text
