"""What is a finished table? Parts, each with headings and rows of text, that `formats` and `html` write and `explain` traces."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

MISSING = "–"


class Cell(NamedTuple):
    """`mark`: best, second, or clear (a difference whose interval excludes zero).

    `value`: the number to sort by; `sources`: index of the rows of the tidy frame that the cell was made of.
    """

    text: str
    mark: str = ""
    value: float | None = None
    sources: tuple[int, ...] = ()


class Row(NamedTuple):
    label: str
    cells: tuple[Cell, ...]
    runs: tuple[str, ...] = ()  # those that the row stands for, by seed


@dataclass(frozen=True)
class Part:
    """Columns that belong together. `metrics`, `headings` and all cells are in one order; `floor` is never ranked."""

    title: str
    metrics: tuple[str, ...]
    headings: tuple[str, ...]
    short_headings: tuple[str, ...]  # for terminals
    rows: tuple[Row, ...]
    floor: Row | None = None
    number: int = 0  # by which a cell is addressed

    @property
    def caption(self) -> str:
        return f"({self.number}) {self.title}"

    @property
    def all_rows(self) -> list[Row]:
        """The floor last, where it has anything to say."""
        floor = self.floor
        return [*self.rows, floor] if floor and any(cell.sources for cell in floor.cells) else list(self.rows)


@dataclass(frozen=True)
class Table:
    """What may stand side by side: several parts over the same runs, and the notes that a reader needs."""

    title: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def numbered(tables: Sequence[Table]) -> tuple[Table, ...]:
    """With their parts counted from 1 through all tables."""
    result, number = [], 1
    for table in tables:
        parts = tuple(replace(part, number=number + i) for i, part in enumerate(table.parts))
        result.append(replace(table, parts=parts))
        number += len(parts)
    return tuple(result)
