"""What must a reader know to judge the numbers of a table? The sentences below it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pandas as pd

from bench.runs import FLOOR

PROTOCOL_FIELDS = ("extractor", "sampler", "steps", "guidance_scale")
UNITS = {"images": "images, summed over experts", "train_flops": "training FLOPs", "device_seconds": "device-seconds of training"}


def describe(frame: pd.DataFrame, suite: Mapping[str, Any], missing: Sequence[str]) -> list[str]:
    """The notes, one sentence or two each; `frame` holds the rows of the table only, of one protocol."""
    runs = frame[frame["run"] != FLOOR]
    one_row_each = runs.drop_duplicates("run")
    notes = []
    if suite.get("converged") is False:
        notes.append(
            "Not converged: the budget is a quick demonstration, and the order of the methods may change with more training."
        )
    notes += [_budget(one_row_each), _protocol(frame), _marks(one_row_each)]
    if (frame["run"] == FLOOR).any():
        notes.append(
            "Real data: real images scored against real images, same extractor and n; what a perfect model would get. Not ranked."
        )
    if (runs["metric"] == "kid").any():
        notes.append("KID in units of 10⁻³: an unbiased estimate, so below 0 where two sets are as alike as two real ones.")
    if (runs["metric"] == "nearest_neighbour").any():
        notes.append("Nearest neighbour: mean distance to the nearest training image; less than for real data hints at copying.")
    notes += [_devices(runs), _code(one_row_each)]
    if missing:
        notes.append(f"Missing (–): {'; '.join(missing)}.")
    labels = [str(entry.get("label") or entry["method"]) for entry in suite.get("methods", [])]
    absent = [label for label in labels if label not in set(runs["label"])]
    if absent:
        notes.append(f"In the suite, but not run: {', '.join(absent)}.")
    return notes


def _budget(runs: pd.DataFrame) -> str:
    unit, amounts = str(runs["budget_unit"].iloc[0]), sorted(set(runs["budget_amount"]))
    return f"Budget: {' or '.join(f'{amount:,.10g}' for amount in amounts)} {UNITS[unit]}, for every run (equal within 1%)."


def _protocol(frame: pd.DataFrame) -> str:
    scored = frame[(frame["protocol_hash"] != "") & (frame["run"] != FLOOR)]
    protocol = json.loads(scored["protocol"].iloc[0])
    parts = [f"{key.replace('_', ' ')} {protocol[key]}" for key in PROTOCOL_FIELDS if protocol.get(key) not in (None, "")]
    evaluations = scored[scored["metric"] == "network_evaluations_per_sample"]["value"]
    if len(evaluations):
        low, high = int(evaluations.min()), int(evaluations.max())
        parts.append(f"{low if low == high else f'{low}–{high}'} network evaluations per sample")
    parts.append(f"n = {', '.join(str(n) for n in sorted(set(scored['n'].dropna())))}")
    return f"Protocol {scored['protocol_hash'].iloc[0]}: {', '.join(parts)}. FID depends on n: compare it at equal n only."


def _marks(runs: pd.DataFrame) -> str:
    counts = runs.groupby(["label", "options"])["run"].nunique()
    low, high = int(counts.min()), int(counts.max())
    seeds = f"{low}" if low == high else f"{low} to {high}"
    text = f"Best in bold, second underlined; equal ones share the mark. Seeds per row: {seeds}"
    if high >= 3:
        text += ", with the mean ± its 95% interval (Student's t) where there are three or more"
    if low < 3:
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


def _code(runs: pd.DataFrame) -> str:
    versions = []
    for code_hash, commit, dirty in sorted(_records(runs, "code_hash", "commit", "dirty"), key=str):
        state = {True: "with uncommitted changes", False: "clean", None: "unknown whether clean"}[dirty]
        versions.append(f"{code_hash or 'unknown'} ({f'commit {commit[:10]}, {state}' if commit else 'no commit'})")
    mixed = " The runs were made by different code." if runs["code_hash"].nunique() > 1 else ""
    return f"Code: {'; '.join(versions)}.{mixed}"


def _records(frame: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """The different rows of some columns as plain Python values, None where there is none."""
    rows = frame[list(columns)].drop_duplicates().astype(object)
    return [tuple(rows.where(rows.notna(), None).iloc[i]) for i in range(len(rows))]
