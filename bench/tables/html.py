"""How is a finished table written as HTML, to stand in a page by itself or in a report?"""

from html import escape

import pandas as pd

from bench.tables.table import Cell, Part, Row, Table

MARKS = {"best": "<strong>{}</strong>", "clear": "<strong>{}</strong>", "second": "<u>{}</u>", "": "{}"}


def to_html(table: Table, frame: pd.DataFrame) -> str:
    """A `section` with a `table` for each part and the notes; ASCII only. `frame`: the tidy frame that it was made of.

    Cells carry `data-sort`, the number behind the text (empty if there is none), and `data-runs`, the runs behind it; a heading
    carries its `data-metric`. The floor stands in a `tfoot`, where sorting leaves it.
    """
    lines = ['<section class="comparison">', f"<h2>{escape(table.title)}</h2>"]
    for part in table.parts:
        lines += _part(part, frame)
    lines += ['<ul class="notes">', *(f"<li>{escape(note)}</li>" for note in table.notes), "</ul>", "</section>"]
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace").decode() + "\n"


def part_to_html(part: Part, frame: pd.DataFrame) -> str:
    """One of its `table`s; ASCII only."""
    return "\n".join(_part(part, frame)).encode("ascii", "xmlcharrefreplace").decode()


def _part(part: Part, frame: pd.DataFrame) -> list[str]:
    heads = [
        f'<th scope="col" data-metric="{escape(metric)}">{escape(heading)}</th>'
        for metric, heading in zip(part.metrics, part.headings, strict=True)
    ]
    lines = [f'<table id="table-{part.number}">', f"<caption>{escape(part.caption)}</caption>"]
    lines += [f'<thead><tr><th scope="col">Method</th>{"".join(heads)}</tr></thead>']
    lines += ["<tbody>", *(_row(row, frame) for row in part.rows), "</tbody>"]
    if part.floor and part.floor in part.all_rows:
        lines += ["<tfoot>", _row(part.floor, frame), "</tfoot>"]
    return [*lines, "</table>"]


def _row(row: Row, frame: pd.DataFrame) -> str:
    return f'<tr><th scope="row">{escape(row.label)}</th>{"".join(_cell(cell, frame) for cell in row.cells)}</tr>'


def _cell(cell: Cell, frame: pd.DataFrame) -> str:
    number = "" if cell.value is None else repr(cell.value)
    runs = " ".join(dict.fromkeys(frame.loc[list(cell.sources), "run"]))
    text = MARKS[cell.mark].format(escape(cell.text))
    return f'<td data-sort="{number}" data-runs="{escape(runs)}"' + (f' class="{cell.mark}"' * bool(cell.mark)) + f">{text}</td>"
