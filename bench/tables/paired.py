"""How far is each method from the baseline, with the same seeds?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.statistics import excludes_zero, paired_differences
from bench.tables.columns import PAIRS, Column, heading
from bench.tables.groups import Group, suite_labels
from bench.tables.numbers import Style, write_seeds
from bench.tables.parts import sources_of, style_in
from bench.tables.table import MISSING, Cell, Part, Row

MIN_PAIRS = 2  # with one seed in common, the difference can be read from the table


def baseline_of(groups: Sequence[Group], suite: Mapping[str, Any]) -> Group | None:
    """The row that the others are compared with: the suite's `baseline` or, where it is not among them, its first entry."""
    names = [str(suite.get("baseline") or ""), *suite_labels(suite)[:1]]
    return next((group for name in names for group in groups if group.label == name), None)


def paired_part(columns: Sequence[Column], groups: Sequence[Group], suite: Mapping[str, Any]) -> Part | None:
    """Method minus baseline, seed by seed; None where there is no baseline, or no row has MIN_PAIRS seeds in common with it."""
    baseline = baseline_of(groups, suite)
    compared = [column for column in columns if column.better]
    if baseline is None or not compared:
        return None
    others = [group for group in groups if group is not baseline]
    num_pairs = [len(set(group.runs["seed"]) & set(baseline.runs["seed"])) for group in others]
    if max(num_pairs, default=0) < MIN_PAIRS:
        return None
    styles = [style_in(column, groups) for column in compared]
    rows = []
    for group, count in zip(others, num_pairs, strict=True):
        cells = [_cell(group, baseline, column.metric, style) for column, style in zip(compared, styles, strict=True)]
        rows.append(Row(group.label, (*cells, Cell(str(count), "", float(count), sources_of(group.runs))), group.run_ids))
    return Part(
        f"Difference to {baseline.label} with the same seed",
        (*(column.metric for column in compared), PAIRS.metric),
        (*(heading(c.title, c, style) for c, style in zip(compared, styles, strict=True)), PAIRS.title),
        (*(heading(c.short, c, style) for c, style in zip(compared, styles, strict=True)), PAIRS.short),
        tuple(rows),
    )


def _cell(group: Group, baseline: Group, metric: str, style: Style) -> Cell:
    by_seed = paired_differences(group.by_seed(metric), baseline.by_seed(metric))
    if not by_seed:
        return Cell(MISSING)
    differences = list(by_seed.values())
    used = [rows[rows["seed"].isin(list(by_seed))] for rows in (group.of(metric), baseline.of(metric))]
    return Cell(
        write_seeds(differences, style, signed=True),
        "clear" if excludes_zero(differences) else "",
        float(np.mean(differences)),
        tuple(i for rows in used for i in sources_of(rows)),
    )
