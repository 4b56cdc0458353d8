"""How do tests look into a table, and change what it is made of?"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from fake_runs import SUITE

from bench.tables import Cell, Part, Table

LABELS = [entry["label"] for entry in SUITE["methods"]]


def part_of(table: Table, title: str) -> Part:
    """The part whose title begins so."""
    (part,) = [part for part in table.parts if part.title.startswith(title)]
    return part


def full_cell(table: Table, label: str, metric: str, title: str = "") -> Cell:
    """Of the first part that has the metric, or of the one of that title."""
    part = part_of(table, title) if title else next(part for part in table.parts if metric in part.metrics)
    row = next(row for row in [*part.rows, *([part.floor] if part.floor else [])] if row.label == label)
    return row.cells[part.metrics.index(metric)]


def cell(table: Table, label: str, metric: str, title: str = "") -> tuple[str, str]:
    """Its text and mark."""
    return full_cell(table, label, metric, title)[:2]


def column_of(table: Table, metric: str) -> list[tuple[str, str]]:
    return [cell(table, row.label, metric) for row in table.parts[0].rows]


def change(frame: pd.DataFrame, label: str, metric: str, column: str, value: Any) -> pd.DataFrame:
    changed = frame.copy()
    changed.loc[(changed["label"] == label) & (changed["metric"] == metric), column] = value
    return changed


def fid(frame: pd.DataFrame, values: Sequence[float]) -> pd.DataFrame:
    for label, value in zip(LABELS, values, strict=True):
        frame = change(frame, label, "fid_train", "value", value)
    return frame
