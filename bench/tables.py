"""What does the comparison show: which numbers, which of them are best, and may they stand side by side at all?

`comparison` turns the tidy frame of `bench.runs` into a Table; `bench.table_formats` writes it. A comparison that would not be fair
is refused with TableRefusal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.fairness import TableRefusal as TableRefusal
from bench.fairness import check_comparable, shared_protocol
from bench.numbers import Style, half_width, rank, si_style, significant_style, write_number, write_seeds
from bench.runs import FLOOR, distinct_labels
from bench.table_notes import describe

MISSING = "–"


class Column(NamedTuple):
    """A metric as a column. `block`: cost or quality; `better`: lower, higher or, where more is not better, empty."""

    metric: str
    title: str
    block: str
    better: str = ""
    kind: str = "significant"  # integer, si, significant, or a divisor and decimals: "0.001:2"
    unit: str = ""


COLUMNS = (
    Column("stored_parameters", "Stored parameters", "cost", kind="si"),
    Column("active_parameters", "Active parameters", "cost", kind="si"),
    Column("forward_macs_per_image", "Forward / image", "cost", kind="si", unit=" MACs"),
    Column("train_flops", "Training", "cost", kind="si", unit="FLOPs"),
    Column("images_seen", "Images", "cost", kind="si"),
    Column("updates_per_parameter_set", "Updates / parameter set", "cost", kind="integer"),
    Column("train_images_per_second", "Train images/s †", "cost"),
    Column("sample_images_per_second", "Sample images/s †", "cost"),
    Column("initial_flops", "Spent on initial weights", "cost", kind="si", unit="FLOPs"),
    Column("peak_memory_bytes", "Peak memory", "cost", kind="si", unit="B"),
    Column("fid_train", "FID (train)", "quality", "lower"),
    Column("fid_heldout", "FID (held-out)", "quality", "lower"),
    Column("kid", "KID", "quality", "lower", "0.001:2", "×10⁻³"),
    Column("precision", "Precision", "quality", "higher", "1:3"),
    Column("recall", "Recall", "quality", "higher", "1:3"),
    Column("class_accuracy", "Class accuracy", "quality", "higher", "0.01:1", "%"),
    Column("nearest_neighbour", "Nearest neighbour", "quality"),
    Column("n", "n", "quality", kind="integer"),
)
ONLY_IF_ANY = ("initial_flops", "peak_memory_bytes")  # columns that are left out where they say nothing


class Cell(NamedTuple):
    text: str
    mark: str = ""  # best, second


class Row(NamedTuple):
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A finished table: everything is text. `headings` and all cells are in the order of `columns`; the floor is never ranked."""

    title: str
    columns: tuple[Column, ...]
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    floor: Row | None
    notes: tuple[str, ...]

    def block(self, name: str) -> "Table":
        """The columns of one block only."""
        kept = [i for i, column in enumerate(self.columns) if column.block == name]

        def part(row: Row) -> Row:
            return Row(row.label, tuple(row.cells[i] for i in kept))

        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            headings=tuple(self.headings[i] for i in kept),
            rows=tuple(map(part, self.rows)),
            floor=part(self.floor) if self.floor else None,
        )


class Group(NamedTuple):
    """The runs of one row: all seeds of one method with one set of options. metric -> one value per seed that has it."""

    label: str
    values: dict[str, list[float]]


def comparison(frame: pd.DataFrame, suite: Mapping[str, Any], protocol_hash: str = "") -> Table:
    """One row per method and set of options, in the suite's order, with the floor last.

    `frame` as from `bench.runs.tidy`; `protocol_hash` chooses between scorings where the runs share several. Raises TableRefusal, in one
    sentence that names the runs, if they are incomplete or differ in protocol, number of samples or budget.
    """
    protocol_hash = protocol_hash or shared_protocol(frame)
    frame = frame[frame["protocol_hash"].isin(["", protocol_hash])]
    check_comparable(frame)
    groups = group_runs(frame[frame["run"] != FLOOR], suite)
    floor = Group("Real data", _values(frame[frame["run"] == FLOOR])) if (frame["run"] == FLOOR).any() else None
    columns = tuple(column for column in COLUMNS if _is_shown(column, groups))
    headings, cells, floor_cells = [], [], []
    for column in columns:
        heading, column_cells, floor_cell = _fill(column, groups, floor)
        headings.append(heading)
        cells.append(column_cells)
        floor_cells.append(floor_cell)
    rows = tuple(Row(group.label, tuple(column[i] for column in cells)) for i, group in enumerate(groups))
    not_converged = suite.get("converged") is False
    title = str(suite.get("title") or suite.get("name") or "Comparison") + (" (not converged)" if not_converged else "")
    floor_row = Row(floor.label, tuple(floor_cells)) if floor else None
    missing = _missing(columns, rows, groups)
    return Table(title, columns, tuple(headings), rows, floor_row, tuple(describe(frame, suite, missing)))


def group_runs(runs: pd.DataFrame, suite: Mapping[str, Any]) -> list[Group]:
    """The runs by row of the table, in the suite's order and then by name."""
    labels = distinct_labels(zip(runs["label"], runs["options"], strict=True))
    shown = runs.assign(shown=[labels[key] for key in zip(runs["label"], runs["options"], strict=True)])
    order = [entry.get("label") or entry["method"] for entry in suite.get("methods", [])]

    def place(key: tuple[str, str, str]) -> tuple[int, str]:
        return (order.index(key[0]) if key[0] in order else len(order), key[2])

    groups = []
    keys = sorted(set(zip(shown["label"], shown["options"], shown["shown"], strict=True)), key=place)
    for _, _, label in keys:
        rows = shown[shown["shown"] == label]
        kinds = rows.drop_duplicates("config_hash")
        if len(kinds) > 1:
            raise TableRefusal(
                f"runs {', '.join(kinds['run'])} have the label {label} in common but not their settings: "
                "give them labels of their own, or leave all but one out"
            )
        groups.append(Group(label, _values(rows)))
    return groups


def _values(rows: pd.DataFrame) -> dict[str, list[float]]:
    known = rows[rows["value"].notna()].sort_values(["seed", "run"], kind="stable")
    values = {str(metric): list(part["value"]) for metric, part in known.groupby("metric", sort=False)}
    counts = known[known["metric"] == "fid_train"]["n"].dropna()
    return {**values, "n": [float(n) for n in counts]}


def _is_shown(column: Column, groups: Sequence[Group]) -> bool:
    return column.metric not in ONLY_IF_ANY or any(any(group.values.get(column.metric, [])) for group in groups)


def _fill(column: Column, groups: Sequence[Group], floor: Group | None) -> tuple[str, list[Cell], Cell]:
    """Heading, the methods' cells and the floor's."""
    everyone = [*groups, floor] if floor else list(groups)
    style = _style(column, [value for group in everyone for value in _range(group, column.metric)])
    texts = [_text(group, column, style) for group in everyone]
    marks = [""] * len(everyone)
    ranked = [i for i, group in enumerate(groups) if group.values.get(column.metric)] if column.better else []
    lists = [groups[i].values[column.metric] for i in ranked]
    means = [float(np.mean(values)) for values in lists]
    places = rank(means, [half_width(values) for values in lists], [texts[i] for i in ranked], column.better == "lower")
    for i, mark in zip(ranked, places, strict=True):
        marks[i] = mark
    cells = [Cell(text, mark) for text, mark in zip(texts, marks, strict=True)]
    unit = (style.unit or column.unit).strip()
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[column.better]
    return column.title + (f" ({unit})" if unit else "") + arrow, cells[: len(groups)], cells[-1] if floor else Cell(MISSING)


def _style(column: Column, values: Sequence[float]) -> Style:
    if column.kind == "si":
        return si_style(values, column.unit)
    if column.kind == "significant":
        return significant_style(values)
    if column.kind == "integer":
        return Style()
    divisor, decimals = column.kind.split(":")
    return Style(float(divisor), int(decimals))


def _range(group: Group, metric: str) -> list[float]:
    """The values of a metric, or of its smallest and largest where it is a list."""
    return group.values.get(metric) or group.values.get(f"{metric}_min", []) + group.values.get(f"{metric}_max", [])


def _text(group: Group, column: Column, style: Style) -> str:
    values = _range(group, column.metric)
    if not values:
        return MISSING
    texts = {write_number(value, style) for value in values}
    if len(texts) == 1 and (len(values) == 1 or column.block == "cost" or column.metric == "n"):
        return texts.pop()
    if column.metric not in group.values:
        return f"{write_number(min(values), style)}–{write_number(max(values), style)}"
    return write_seeds(values, style)


def _missing(columns: Sequence[Column], rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    """What a dash, or a mean over fewer seeds than the others have, stands for: "label: column, column"."""
    found = []
    for row, group in zip(rows, groups, strict=True):
        num_seeds = len(group.values["images_seen"])
        fewer = {
            column.title.removesuffix(" †"): len(_range(group, column.metric))
            for column in columns
            if len(_range(group, column.metric)) < num_seeds
        }
        if fewer:
            names = [title if not count else f"{title} ({count} of {num_seeds} seeds)" for title, count in fewer.items()]
            found.append(f"{row.label}: {', '.join(names)}")
    return found
