"""What was compared, under which rules, and what came out best: the first screen of the report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from bench.report.material import Material
from bench.statistics import MIN_SEEDS
from bench.tables import Cell, Part, Table
from bench.tables.columns import SHARE
from bench.tidy import FLOOR

UNITS = {"images": "training images", "train_flops": "training FLOPs", "device_seconds": "device-seconds"}
MOST_NAMED = 4  # of what shares a mark


class Best(NamedTuple):
    score: str
    best: str
    second: str


class Verdict(NamedTuple):
    """Of one table. `differences`: a sentence on those to the baseline; empty if there are none to tell."""

    scores: list[Best]
    caution: str
    differences: str


def facts(material: Material, names: Mapping[str, str]) -> dict[str, str]:
    """What was compared, in a few words each; `names` of the methods, where they are known."""
    rows = material.results.frame
    runs = rows[rows["run"] != FLOOR].drop_duplicates("run")
    scored = rows[(rows["protocol_hash"] != "") & (rows["run"] != FLOOR)]
    begun = runs[runs["started"] != ""]
    states = runs["state"].value_counts()
    others = ", ".join(f"{count} {state}" for state, count in sorted(states.items()) if state != "done")
    found = {
        "Runs": f"{len(runs)}, of which {others}" if others else f"{len(runs)}, all finished",
        "Methods": ", ".join(names.get(method, method) for method in sorted(set(runs["method"]))),
        "Comparisons": str(len(material.tables)) if len(material.tables) > 1 else "",
        "Seeds": ", ".join(str(seed) for seed in sorted(set(runs["seed"]))),
        "Budget": _listed(f"{amount:,.10g} {UNITS[unit]}" for unit, amount in _pairs(runs, "budget_unit", "budget_amount")),
        "Protocol": _listed(sorted(set(scored["protocol_hash"]))) or "nothing is scored yet",
        "Samples scored": _listed(f"{n:,}" for n in sorted(set(scored["n"].dropna()))),
        "Code": _listed(_code(commit, dirty) for commit, dirty in _pairs(begun, "commit", "dirty")),
        "Device": _listed(sorted({str(device) for device in runs["device"] if device})),
    }
    return {name: text for name, text in found.items() if text}


def verdict(table: Table) -> Verdict:
    """Which rows have the mark of the best and of the second in each score, as the table has it."""
    ranked = [part for part in table.parts if SHARE.metric not in part.metrics and _marks(part) & {"best", "second"}]
    scores = [
        Best(heading, _marked(part, i, "best"), _marked(part, i, "second"))
        for part in ranked
        for i, heading in enumerate(part.headings)
        if any(row.cells[i].mark == "best" for row in part.rows)
    ]
    seeds = [len(row.runs) for part in ranked for row in part.rows]
    few = f"with {min(seeds)} seed{'s' * (min(seeds) > 1)} in a row" if seeds and min(seeds) < MIN_SEEDS else ""
    caution = f"Without intervals, {few}: which is best may be chance." if few else ""
    paired = next((part for part in table.parts if part.title.startswith("Difference to")), None)
    return Verdict(scores, caution, _differences(paired) if paired else "")


def _differences(paired: Part) -> str:
    clear = [
        f"{row.label} in {heading} ({cell.text})"
        for row in paired.rows
        for heading, cell in zip(paired.headings, row.cells, strict=True)
        if cell.mark == "clear"
    ]
    baseline = paired.title[0].lower() + paired.title[1:]
    told = "; ".join(clear) if clear else "none"
    return f"Of each {baseline}, those whose 95% interval excludes zero: {told}."


def _marked(part: Part, column: int, mark: str) -> str:
    rows: list[tuple[str, Cell]] = [(row.label, row.cells[column]) for row in part.rows if row.cells[column].mark == mark]
    named = "; ".join(f"{label}: {cell.text}" for label, cell in rows[:MOST_NAMED])
    return named + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else "")


def _marks(part: Part) -> set[str]:
    return {cell.mark for row in part.rows for cell in row.cells}


def _code(commit: Any, dirty: Any) -> str:
    if not commit:
        return "no commit"
    state = {True: "with uncommitted changes", False: "clean", None: "unknown whether clean"}[dirty]
    return f"{str(commit)[:10]} {state}"


def _pairs(runs: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    rows = runs[list(columns)].drop_duplicates().astype(object)
    return sorted((tuple(None if pd.isna(value) else value for value in row) for row in rows.to_numpy()), key=str)


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def groups_of(material: Material) -> Sequence[str]:
    """The name of the suite's group behind each table, in their order; "" where there are none."""
    entries = material.suite.get("methods", [])
    by_group: dict[str, set[str]] = {}
    for entry in entries:
        by_group.setdefault(str(entry.get("group") or ""), set()).add(str(entry.get("label") or entry["method"]))
    shown = set(material.results.frame["label"])
    names = [name for name, labels in by_group.items() if labels & shown] if set(by_group) - {""} else [""]
    return names or [""]
