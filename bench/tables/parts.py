"""How do some columns of a table become text: over all its rows, with the best marked and the floor beside them?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.statistics import half_width, rank
from bench.tables.columns import AS_RANGE, Column, alike, heading, style_of
from bench.tables.groups import Group
from bench.tables.numbers import Style, write_number, write_seeds
from bench.tables.table import MISSING, Cell, Part, Row


def make_part(title: str, columns: Sequence[Column], groups: Sequence[Group], floor: Group | None = None) -> Part:
    """A row per group, in their order. The floor is neither ranked nor counted in seeds."""
    everyone = [*groups, floor] if floor else list(groups)
    styles = [style_in(column, everyone) for column in columns]
    cells = [_ranked_cells(column, style, groups) for column, style in zip(columns, styles, strict=True)]
    of_floor = None
    if floor:
        is_told = [column.metric != "seeds" for column in columns]
        told = zip(columns, styles, is_told, strict=True)
        of_floor = Row(floor.label, tuple(_cell(floor, c, style) if told else Cell(MISSING) for c, style, told in told))
    return Part(
        title,
        tuple(column.metric for column in columns),
        tuple(heading(column.title, column, style) for column, style in zip(columns, styles, strict=True)),
        tuple(heading(column.short, column, style) for column, style in zip(columns, styles, strict=True)),
        tuple(Row(group.label, tuple(of_column[i] for of_column in cells), group.run_ids) for i, group in enumerate(groups)),
        of_floor,
    )


def style_in(column: Column, groups: Sequence[Group]) -> Style:
    """One style for the whole column, by the values in it and in those of its scale."""
    return style_of(column, [value for group in groups for metric in alike(column) for value in group.values(metric)])


def sources_of(rows: pd.DataFrame) -> tuple[int, ...]:
    return tuple(int(i) for i in rows.index)


def missing_of(columns: Sequence[Column], groups: Sequence[Group], where: str = "") -> list[str]:
    """What a dash, or a mean over fewer seeds than the row has, stands for: "label: column, column"."""
    found = []
    for group in groups:
        fewer = []
        for column in columns:
            count = group.of(column.metric)["run"].nunique()
            if count < group.num_seeds:
                title = column.title.removesuffix(" †")
                fewer.append(f"{title} ({count} of {group.num_seeds} seeds)" if count else title)
        if fewer:
            found.append(f"{group.label}{where}: {', '.join(fewer)}")
    return found


def _ranked_cells(column: Column, style: Style, groups: Sequence[Group]) -> list[Cell]:
    cells = [_cell(group, column, style) for group in groups]
    ranked = [i for i, group in enumerate(groups) if column.better and group.values(column.metric)]
    lists = [groups[i].values(column.metric) for i in ranked]
    means = [float(np.mean(values)) for values in lists]
    places = rank(means, [half_width(values) for values in lists], [cells[i].text for i in ranked], column.better == "lower")
    for i, mark in zip(ranked, places, strict=True):
        cells[i] = cells[i]._replace(mark=mark)
    return cells


def _cell(group: Group, column: Column, style: Style) -> Cell:
    values = group.values(column.metric)
    if not values:
        return Cell(MISSING)
    return Cell(_text(group, column, style), "", float(np.mean(values)), sources_of(group.of(column.metric)))


def _text(group: Group, column: Column, style: Style) -> str:
    values = group.values(column.metric)
    texts = {write_number(value, style) for value in values}
    if len(texts) == 1 and (len(values) == 1 or column.block == "cost" or column.kind == "integer"):
        return texts.pop()
    if column.metric in AS_RANGE or group.is_list(column.metric):
        return f"{write_number(min(values), style)}–{write_number(max(values), style)}"
    return write_seeds(values, style)
