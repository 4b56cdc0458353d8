"""What does the comparison show: which numbers, which of them are best, and may they stand side by side at all?

`comparison` turns the tidy frame of `bench.runs` into a Table, or refuses it with TableRefusal where it would not be fair;
`bench.tables.formats` writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.runs import FLOOR, distinct_labels
from bench.tables.fairness import TableRefusal, check_comparable, shared_protocol
from bench.tables.notes import describe
from bench.tables.numbers import Style, half_width, rank, si_style, significant_style, write_number, write_seeds

MISSING = "–"


class Column(NamedTuple):
    """A metric as a column. `block`: cost or quality; `better`: lower, higher or, where more is not better, empty.

    `kind`: integer; si (k, M, G ...); significant:DIGITS; or fixed:DIVISOR:DECIMALS. Columns of one `scale` are written alike.
    """

    metric: str
    title: str
    short: str  # for terminals
    block: str
    better: str = ""
    kind: str = "significant:3"
    unit: str = ""
    scale: str = ""


COLUMNS = (
    Column("stored_parameters", "Stored parameters", "Stored params", "cost", kind="si", scale="parameters"),
    Column("active_parameters", "Active parameters", "Active params", "cost", kind="si", scale="parameters"),
    Column("forward_macs_per_image", "Forward / image", "Forward", "cost", kind="si", unit="\N{NO-BREAK SPACE}MACs"),
    Column("train_flops", "Training", "Training", "cost", kind="si", unit="FLOPs"),
    Column("images_seen", "Images", "Images", "cost", kind="si"),
    Column("updates_per_parameter_set", "Updates / parameter set", "Updates / set", "cost", kind="integer"),
    Column("train_images_per_second", "Train images/s †", "Train img/s†", "cost"),
    Column("sample_images_per_second", "Sample images/s †", "Sample img/s†", "cost"),
    Column("lost_device_seconds", "Device-seconds lost to crashes †", "Lost s†", "cost"),
    Column("initial_flops", "Spent on initial weights", "Initial weights", "cost", kind="si", unit="FLOPs"),
    Column("fid_train", "FID (train)", "FID train", "quality", "lower", "significant:4", scale="fid"),
    Column("fid_heldout", "FID (held-out)", "FID held-out", "quality", "lower", "significant:4", scale="fid"),
    Column("kid", "KID", "KID", "quality", "lower", "fixed:0.001:2", "×10⁻³"),
    Column("precision", "Precision", "Preci- sion", "quality", "higher", "fixed:1:3"),
    Column("recall", "Recall", "Recall", "quality", "higher", "fixed:1:3"),
    Column("class_accuracy", "Class accuracy", "Class acc.", "quality", "higher", "fixed:0.01:1", "%"),
    Column("nearest_neighbour", "Nearest-neighbour distance", "Nearest neighb.", "quality"),
    Column("n", "n", "n", "quality", kind="integer"),
    Column("seeds", "Seeds", "Seeds", "quality", kind="integer"),
)
ONLY_IF_ABOVE = {"initial_flops": 0, "lost_device_seconds": 0, "seeds": 1}  # columns left out where they say nothing


class Cell(NamedTuple):
    text: str
    mark: str = ""  # best, second


class Row(NamedTuple):
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A finished table: everything is text. `headings` and all cells are in the order of `columns`."""

    title: str
    columns: tuple[Column, ...]
    headings: tuple[str, ...]
    short_headings: tuple[str, ...]
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
            short_headings=tuple(self.short_headings[i] for i in kept),
            rows=tuple(map(part, self.rows)),
            floor=part(self.floor) if self.floor else None,
        )


class Group(NamedTuple):
    """The runs of one row: all seeds of one method with one set of options. metric -> one value per seed that has it."""

    label: str
    values: dict[str, list[float]]


def comparison(frame: pd.DataFrame, suite: Mapping[str, Any], protocol_hash: str = "") -> Table:
    """One row per method and set of options, in the suite's order, with the floor last.

    `frame` as from `bench.runs.tidy`; `protocol_hash` chooses between scorings where the runs share several. Raises
    TableRefusal, in one sentence that names the runs, if they are incomplete or differ in protocol, n or budget.
    """
    protocol_hash = protocol_hash or shared_protocol(frame)
    frame = frame[frame["protocol_hash"].isin(["", protocol_hash])]
    check_comparable(frame)
    groups = group_runs(frame[frame["run"] != FLOOR], suite)
    floor = Group("Real data", _values(frame[frame["run"] == FLOOR])) if (frame["run"] == FLOOR).any() else None
    everyone = [*groups, floor] if floor else groups
    columns = tuple(column for column in COLUMNS if _is_shown(column, groups))
    styles = [_style(column, everyone) for column in columns]
    written = [_cells(column, style, groups, floor) for column, style in zip(columns, styles, strict=True)]
    rows = tuple(Row(group.label, tuple(cells[i] for cells in written)) for i, group in enumerate(groups))
    return Table(
        title=str(suite.get("title") or suite.get("name") or "Comparison")
        + " (not converged)" * (suite.get("converged") is False),
        columns=columns,
        headings=tuple(_heading(column.title, column, style) for column, style in zip(columns, styles, strict=True)),
        short_headings=tuple(_heading(column.short, column, style) for column, style in zip(columns, styles, strict=True)),
        rows=rows,
        floor=Row(floor.label, tuple(cells[-1] for cells in written)) if floor else None,
        notes=tuple(describe(frame, suite, _missing(columns, groups))),
    )


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
    counts = known[known["metric"].str.startswith("fid") & known["n"].notna()].drop_duplicates("run")["n"]
    num_seeds = rows["run"].nunique()
    return {**values, "n": [float(n) for n in counts], "seeds": [float(num_seeds)] * num_seeds}


def _is_shown(column: Column, groups: Sequence[Group]) -> bool:
    threshold = ONLY_IF_ABOVE.get(column.metric)
    return threshold is None or any(value > threshold for group in groups for value in group.values.get(column.metric, []))


def _style(column: Column, groups: Sequence[Group]) -> Style:
    alike = [other.metric for other in COLUMNS if other.scale and other.scale == column.scale] or [column.metric]
    values = [value for group in groups for metric in alike for value in _range(group, metric)]
    kind, *numbers = column.kind.split(":")
    if kind == "si":
        return si_style(values, column.unit)
    if kind == "significant":
        return significant_style(values, int(numbers[0]))
    return Style(float(numbers[0]), int(numbers[1])) if kind == "fixed" else Style()


def _heading(title: str, column: Column, style: Style) -> str:
    unit = (style.unit or column.unit).strip()
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[column.better]
    return title + (f" ({unit})" if unit else "") + arrow


def _cells(column: Column, style: Style, groups: Sequence[Group], floor: Group | None) -> list[Cell]:
    """The cells of the methods, ranked, and then of the floor, which never is."""
    texts = [_text(group, column, style) for group in groups]
    marks = [""] * len(groups)
    ranked = [i for i, group in enumerate(groups) if group.values.get(column.metric)] if column.better else []
    lists = [groups[i].values[column.metric] for i in ranked]
    means = [float(np.mean(values)) for values in lists]
    places = rank(means, [half_width(values) for values in lists], [texts[i] for i in ranked], column.better == "lower")
    for i, mark in zip(ranked, places, strict=True):
        marks[i] = mark
    last = [Cell(_text(floor, column, style) if column.metric != "seeds" else MISSING)] if floor else []
    return [*(Cell(text, mark) for text, mark in zip(texts, marks, strict=True)), *last]


def _range(group: Group, metric: str) -> list[float]:
    """The values of a metric, or of its smallest and largest where it is a list."""
    return group.values.get(metric) or group.values.get(f"{metric}_min", []) + group.values.get(f"{metric}_max", [])


def _text(group: Group, column: Column, style: Style) -> str:
    values = _range(group, column.metric)
    if not values:
        return MISSING
    texts = {write_number(value, style) for value in values}
    if len(texts) == 1 and (len(values) == 1 or column.block == "cost" or column.kind == "integer"):
        return texts.pop()
    if column.metric not in group.values:
        return f"{write_number(min(values), style)}–{write_number(max(values), style)}"
    return write_seeds(values, style)


def _missing(columns: Sequence[Column], groups: Sequence[Group]) -> list[str]:
    """What a dash, or a mean over fewer seeds than the row has, stands for: "label: column, column"."""
    found = []
    for group in groups:
        num_seeds = len(group.values["seeds"])
        fewer = []
        for column in columns:
            count = len(_range(group, column.metric))
            if count < num_seeds:
                title = column.title.removesuffix(" †")
                fewer.append(f"{title} ({count} of {num_seeds} seeds)" if count else title)
        if fewer:
            found.append(f"{group.label}: {', '.join(fewer)}")
    return found
