"""What does the comparison show: which numbers, which of them are best, and may they stand side by side at all?

`comparison` turns the tidy frame of `bench.tidy` into a Table, or refuses it with TableRefusal where it would not be fair;
`comparisons` makes one for each group of the suite. `formats` and `html` write them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from bench.tables.columns import COLUMNS, ONLY_IF_ABOVE, OPTIONAL, Column
from bench.tables.fairness import admit, objections, one_protocol
from bench.tables.groups import Group, group_runs, suite_labels
from bench.tables.notes import describe
from bench.tables.paired import paired_part
from bench.tables.parts import make_part, missing_of
from bench.tables.table import Table, numbered
from bench.tables.views import budget_views
from bench.tidy import FLOOR, at_the_end

BLOCKS = {"cost": "Cost", "quality": "Quality"}


def comparisons(
    frame: pd.DataFrame, suite: Mapping[str, Any], protocol_hash: str = "", allow: Collection[str] = ()
) -> tuple[Table, ...]:
    """A table for each group of the suite that has runs, in the suite's order; arguments as of `comparison`.

    A run belongs to every group that has an entry of its label.
    """
    entries = suite.get("methods", [])
    names = list(dict.fromkeys(str(entry.get("group") or "") for entry in entries))
    if names in ([], [""]):
        return (comparison(frame, suite, protocol_hash, allow),)
    is_floor = frame["run"] == FLOOR
    tables, not_run = [], []
    for name in names:
        settings = suite.get("groups", {}).get(name, {})
        own = [entry for entry in entries if str(entry.get("group") or "") == name]
        title = f"{_title(suite)}: {settings.get('title') or name}" if name else _title(suite)
        of_group = {**suite, **settings, "methods": own, "title": title}
        rows = frame[frame["label"].isin(suite_labels(of_group)) & ~is_floor]
        if len(rows):
            tables.append(comparison(pd.concat([rows, frame[is_floor]]), of_group, protocol_hash, allow))
        else:
            not_run.append(name or "the entries without a group")
    if not tables:
        return (comparison(frame, suite, protocol_hash, allow),)
    strangers = sorted(set(frame[~is_floor & ~frame["label"].isin(suite_labels(suite))]["run"]))
    notes = [f"In the suite, but not run at all: {', '.join(not_run)}."] * bool(not_run)
    notes += [f"Not in the suite, and in no table: {', '.join(strangers)}."] * bool(strangers)
    tables[-1] = replace(tables[-1], notes=(*tables[-1].notes, *notes))
    return numbered(tables)


def comparison(frame: pd.DataFrame, suite: Mapping[str, Any], protocol_hash: str = "", allow: Collection[str] = ()) -> Table:
    """One row per method and set of options, in the suite's order, with the floor last.

    `frame` as from `bench.tidy`; `protocol_hash` chooses between scorings where the runs share several. Raises TableRefusal, in
    one sentence that names the runs, if they are incomplete or differ in protocol, n or budget; what `allow` names of that is
    shown all the same, and the title says so.
    """
    final, unfair = one_protocol(at_the_end(frame), protocol_hash, allow)
    unfair = unfair + admit(objections(final), allow)
    groups = group_runs(final[final["run"] != FLOOR], suite)
    of_floor = final[final["run"] == FLOOR]
    floor = Group("Real data", of_floor) if len(of_floor) else None
    unknown = sorted(set(suite.get("columns") or []) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"the suite asks for the columns {', '.join(unknown)}: choose from {', '.join(OPTIONAL)}")
    columns = [column for column in COLUMNS if _is_shown(column, groups, suite)]
    parts = [make_part(title, [c for c in columns if c.block == block], groups, floor) for block, title in BLOCKS.items()]
    if paired := paired_part(columns, groups, suite):
        parts.append(paired)
    by_same_protocol = pd.MultiIndex.from_frame(frame[["run", "protocol_hash"]]).isin(
        pd.MultiIndex.from_frame(final[["run", "protocol_hash"]])
    )
    views = budget_views(columns, groups, frame[frame["at_images"].notna() & by_same_protocol])
    missing = [*missing_of(columns, groups), *(text for view in views for text in view.missing)]
    converging = " (not converged)" * (suite.get("converged") is False)
    table = Table(
        _title(suite) + converging + "".join(f" [shown although {what}]" for what in unfair),
        (*parts, *(view.part for view in views)),
        tuple(describe(final, suite, groups, missing, paired is not None, bool(views))),
    )
    return numbered([table])[0]


def _title(suite: Mapping[str, Any]) -> str:
    return str(suite.get("title") or suite.get("name") or "Comparison")


def _is_shown(column: Column, groups: Sequence[Group], suite: Mapping[str, Any]) -> bool:
    if column.asked_for:
        return column.metric in (suite.get("columns") or [])
    threshold = ONLY_IF_ABOVE.get(column.metric)
    return threshold is None or any(value > threshold for group in groups for value in group.values(column.metric))
