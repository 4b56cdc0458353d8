"""How do the runs compare? From the tidy frame of `bench.tidy` to fair tables, in Markdown, LaTeX, CSV, HTML or on a terminal.

fairness.py says which runs may stand side by side and groups.py which make up a row; comparison.py what a table shows, from
parts.py, paired.py and views.py; columns.py, numbers.py and notes.py how that is worded; formats.py and html.py how it is
written; outputs.py which files that makes and whether they still follow; explain.py where a cell comes from. No torch here.
"""

from bench.tables.comparison import comparison, comparisons
from bench.tables.explain import explain, origin
from bench.tables.fairness import ALLOWABLE, TableRefusal, shared_protocol
from bench.tables.formats import to_csv, to_latex, to_markdown, to_rich, to_text
from bench.tables.html import part_to_html, to_html
from bench.tables.outputs import check, table_files, write_tables
from bench.tables.table import Cell, Part, Row, Table

__all__ = [
    "ALLOWABLE",
    "Cell",
    "Part",
    "Row",
    "Table",
    "TableRefusal",
    "check",
    "comparison",
    "comparisons",
    "explain",
    "origin",
    "part_to_html",
    "shared_protocol",
    "table_files",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "to_rich",
    "to_text",
    "write_tables",
]
