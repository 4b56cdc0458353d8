"""What must a reader know to judge the numbers of a table? The sentences below it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pandas as pd

from bench.statistics import MIN_SEEDS
from bench.tables.groups import Group, suite_labels
from bench.tidy import FLOOR

PROTOCOL_FIELDS = ("extractor", "sampler", "steps", "guidance_scale")
UNITS = {"images": "images, summed over experts", "train_flops": "training FLOPs", "device_seconds": "device-seconds of training"}
SHARED = ", or lies within the 95% interval of that mean,"
PAIRED = (
    "Differences: method minus baseline, seed by seed; from three pairs on, their mean ± the half-width of its 95% interval "
    "(Student's t). Bold where the interval excludes zero, each by itself: of twenty equal ones, one would be bold by chance."
)
VIEWS = (
    "At equal budgets: the largest that every run reaches. Each run stands with its last scored checkpoint within it (1% over "
    "counts as within), never extrapolated or interpolated; the share of the budget says where that lies. A checkpoint before a "
    "run's end was not trained for that budget, as its learning rate was still on its way. Initial weights are not counted."
)


def describe(
    frame: pd.DataFrame, suite: Mapping[str, Any], groups: Sequence[Group], missing: Sequence[str], paired: bool, views: bool
) -> list[str]:
    """The notes, one sentence or a few each; `frame` holds the rows of trained runs, and of the table only.

    `paired` and `views`: whether the table has differences to a baseline, and parts at equal budgets.
    """
    runs = frame[frame["run"] != FLOOR]
    one_row_each = runs.drop_duplicates("run")
    notes = []
    if suite.get("converged") is False:
        notes.append(
            "Not converged: the budget is a quick demonstration, and the order of the methods may change with more training."
        )
    notes += [_budget(one_row_each), *_protocols(frame), _marks(groups)]
    if paired:
        notes.append(PAIRED)
    if views:
        notes.append(VIEWS)
    if (frame["run"] == FLOOR).any():
        notes.append(
            "Real data: real images scored against real images, same extractor and n; what a perfect model would get. Not ranked."
            + (" They are not decoded: what the autoencoder itself loses is not in it." if _are_decoded(runs) else "")
        )
    if (runs["metric"] == "kid").any():
        notes.append("KID in units of 10⁻³: an unbiased estimate, so below 0 where two sets are as alike as two real ones.")
    if (runs["metric"] == "nearest_neighbour").any():
        notes.append("Nearest neighbour: mean distance to the nearest training image; less than for real data hints at copying.")
    notes += [_devices(runs), _code(groups)]
    if missing:
        notes.append(f"Missing (–): {'; '.join(missing)}.")
    absent = [label for label in suite_labels(suite) if label not in set(runs["label"])]
    if absent:
        notes.append(f"In the suite, but not run: {', '.join(absent)}.")
    return [*notes, *_own(suite)]


def _own(suite: Mapping[str, Any]) -> list[str]:
    """What the suite itself has to say."""
    notes = suite.get("notes") or []
    return [notes] if isinstance(notes, str) else [str(note) for note in notes]


def _budget(runs: pd.DataFrame) -> str:
    budgets = sorted({(str(unit), float(amount)) for unit, amount in _records(runs, "budget_unit", "budget_amount")})
    written = " or ".join(f"{amount:,.10g} {UNITS[unit]}" for unit, amount in budgets)
    return f"Budget: {written}" + (", for every run (equal within 1%)." if len(budgets) == 1 else ".")


def _protocols(frame: pd.DataFrame) -> list[str]:
    """A note for each protocol: there is one, unless several were allowed."""
    scored = frame[(frame["protocol_hash"] != "") & (frame["run"] != FLOOR)]
    return [_protocol(str(protocol_hash), rows) for protocol_hash, rows in scored.groupby("protocol_hash")]


def _are_decoded(runs: pd.DataFrame) -> bool:
    protocols = runs.loc[runs["protocol_hash"] != "", "protocol"].unique()
    return any(json.loads(protocol).get("decoder", "none") != "none" for protocol in protocols)


def _protocol(protocol_hash: str, scored: pd.DataFrame) -> str:
    protocol = json.loads(scored["protocol"].iloc[0])
    parts = [f"{key.replace('_', ' ')} {protocol[key]}" for key in PROTOCOL_FIELDS if protocol.get(key) not in (None, "")]
    evaluations = scored[scored["metric"] == "network_evaluations_per_sample"]["value"]
    if len(evaluations):
        low, high = int(evaluations.min()), int(evaluations.max())
        parts.append(f"{low if low == high else f'{low}–{high}'} network evaluations per sample")
    parts.append(f"n = {', '.join(str(n) for n in sorted(set(scored['n'].dropna())))}")
    return f"Protocol {protocol_hash}: {', '.join(parts)}. FID depends on n: compare it at equal n only."


def _marks(groups: Sequence[Group]) -> str:
    low, high = (f(group.num_seeds for group in groups) for f in (min, max))
    seeds = f"{low}" if low == high else f"{low} to {high}"
    text = f"Best mean in bold, second underlined; what is written alike{SHARED if high >= MIN_SEEDS else ''} shares the mark."
    text += f" Seeds per row: {seeds}"
    if high >= MIN_SEEDS:
        text += ", with the mean ± the half-width of its 95% interval (Student's t over seeds) where there are three or more"
    if low < MIN_SEEDS:
        text += "; with fewer than three all points are listed and differences may be chance"
    return text + "."


def _devices(runs: pd.DataFrame) -> str:
    texts = set()
    for device, world_size, threads in _records(runs, "device", "world_size", "threads"):
        name = device or "unknown device"
        text = f"{world_size} × {name}" if world_size and world_size > 1 else name
        texts.add(f"{text} ({threads} thread{'' if threads == 1 else 's'})" if threads else text)
    beside = {
        True: "some runs ran side by side",
        False: "no two runs seen to train at the same time",
        None: "unknown whether side by side",
    }
    return f"† Measured on {', '.join(sorted(texts))}, {beside[side_by_side(runs)]}; throughput varies from run to run."


def side_by_side(runs: pd.DataFrame) -> bool | None:
    """Whether any run started while another was training; None if that is not known."""
    device_seconds = dict(_records(runs[runs["metric"] == "device_seconds"], "run", "value"))
    times = []
    for run, start, world_size in _records(runs, "run", "started", "world_size"):
        if not start or run not in device_seconds:
            return None
        started = datetime.fromisoformat(start)
        started = started if started.tzinfo else started.replace(tzinfo=UTC)
        times.append((started, started + timedelta(seconds=device_seconds[run] / (world_size or 1))))
    return any(later[0] < earlier[1] for earlier, later in pairwise(sorted(times)))


def _code(groups: Sequence[Group]) -> str:
    """Which code made the runs; where there are several, of which rows, and of which runs if a row is of more than one."""
    runs = pd.concat([group.runs.assign(shown=group.label) for group in groups])
    rows_of: dict[tuple[Any, ...], list[str]] = {}
    for label, of_row in runs.groupby("shown", sort=False):
        versions = _records(of_row, "code_hash", "commit", "dirty")
        for version in versions:
            own = [run for run, *other in _records(of_row, "run", "code_hash", "commit", "dirty") if tuple(other) == version]
            rows_of.setdefault(version, []).append(str(label) if len(versions) == 1 else f"{label} ({', '.join(own)})")
    texts = []
    for version in sorted(rows_of, key=str):
        code_hash, commit, dirty = version
        state = {True: "with uncommitted changes", False: "clean", None: "unknown whether clean"}[dirty]
        text = f"{code_hash or 'unknown'} ({f'commit {commit[:10]}, {state}' if commit else 'no commit'})"
        texts.append(f"{text} of {', '.join(rows_of[version])}" if len(rows_of) > 1 else text)
    mixed = " The runs were made by different code." if runs["code_hash"].nunique() > 1 else ""
    return f"Code: {'; '.join(texts)}.{mixed}"


def _records(frame: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """The different rows of some columns as plain Python values, None where there is none."""
    rows = frame[list(columns)].drop_duplicates().astype(object)
    return [tuple(rows.where(rows.notna(), None).iloc[i]) for i in range(len(rows))]
