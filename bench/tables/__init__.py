"""How do the runs compare? From the tidy frame of `bench.runs` to one fair table, in Markdown, LaTeX, CSV or on a terminal.

fairness.py says which runs may stand side by side, comparison.py what the table shows, numbers.py and notes.py how it is
worded, formats.py how it is written. No torch here.
"""

from bench.tables.comparison import Cell, Row, Table, comparison
from bench.tables.fairness import TableRefusal, shared_protocol
from bench.tables.formats import to_latex, to_markdown, to_rich, to_text, write_tables

__all__ = [
    "Cell",
    "Row",
    "Table",
    "TableRefusal",
    "comparison",
    "shared_protocol",
    "to_latex",
    "to_markdown",
    "to_rich",
    "to_text",
    "write_tables",
]
