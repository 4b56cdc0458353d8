"""How do the papers' tables look beside ours?

A suite with a header `published` (bench/suites/PAPER.TABLE.yaml) stands for a table of a paper. facts.py reads the published
figures, ours.py finds what our runs say of the same rows, costs.py what our networks cost, table.py sets them side by side and
formats.py writes that. Published and own figures are never ranked or averaged together. No torch here, but to recompute costs.
"""

from bench.published.facts import read_facts
from bench.published.formats import to_csv, to_latex, to_markdown, to_rich, write_published
from bench.published.table import PublishedTable, published_names, published_table

__all__ = [
    "PublishedTable",
    "published_names",
    "published_table",
    "read_facts",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_rich",
    "write_published",
]
