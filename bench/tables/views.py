"""How do the runs compare at equal images, at equal training FLOPs, and at equal device time?

For each, the budget is the largest that every run reaches, and each run stands with the last of its scored checkpoints
that lies within it: nothing is extrapolated or interpolated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from bench.tables.columns import SHARE, Column
from bench.tables.fairness import BUDGET_METRICS, BUDGET_TOLERANCE
from bench.tables.groups import Group
from bench.tables.numbers import si_style, write_number
from bench.tables.parts import make_part, missing_of
from bench.tables.table import Part

TITLES = {
    "images": "At equal images ({})",
    "train_flops": "At equal training compute ({}FLOPs)",
    "device_seconds": "At equal device time ({} device-seconds)",
}


class View(NamedTuple):
    part: Part
    missing: list[str]


def budget_views(columns: Sequence[Column], groups: Sequence[Group], on_the_way: pd.DataFrame) -> list[View]:
    """One for each unit of a budget; none if no run was scored on its way. `on_the_way`: those rows, of the table's protocol."""
    if on_the_way.empty:
        return []
    shown = [SHARE, *(column for column in columns if column.better)]
    views = []
    for unit, metric in BUDGET_METRICS.items():
        ends = [value for group in groups for value in group.values(metric)]
        if len(ends) < sum(group.num_seeds for group in groups) or not min(ends):
            continue  # of a run that is not finished, nobody knows; one that has only begun has reached nothing
        budget = min(ends)
        reached = [_reached(group, on_the_way, unit, budget) for group in groups]
        style = si_style([budget])
        title = TITLES[unit].format(write_number(budget, style) + " " * bool(style.unit) + style.unit)
        views.append(View(make_part(title, shown, reached), missing_of(shown, reached, f" {title[0].lower()}{title[1:]}")))
    return views


def _reached(group: Group, on_the_way: pd.DataFrame, unit: str, budget: float) -> Group:
    """A row of the table with the scores, and the share of the budget, of its runs' last checkpoints within the budget."""
    kept = [group.rows[group.rows["protocol_hash"] == ""]]
    for run, own in group.rows.groupby("run"):
        end = own[own["metric"] == BUDGET_METRICS[unit]]
        checkpoints = [(float(end["value"].iloc[0]), own[own["protocol_hash"] != ""], end)]
        curve = on_the_way[on_the_way["run"] == run]
        checkpoints += [(float(str(at)), rows, rows[:1]) for at, rows in curve.groupby(f"at_{unit}")]
        within = [each for each in checkpoints if each[0] <= budget * (1 + BUDGET_TOLERANCE)]
        if within:
            amount, scores, place = max(within, key=lambda each: each[0])
            kept += [scores, place.assign(metric=SHARE.metric, value=amount / budget)]
    return Group(group.label, pd.concat(kept))
