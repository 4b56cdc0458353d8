"""What must a reader know to judge the numbers of a table? The sentences below it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
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
        notes.append("KID is given in units of 10⁻³.")
    if (runs["metric"] == "nearest_neighbour").any():
        notes.append(
            "Nearest neighbour: mean distance to the nearest training image; below that of real data hints at copying. Not ranked."
        )
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
    return (
        f"Protocol {scored['protocol_hash'].iloc[0]}: {', '.join(parts)}. A FID depends on n and is comparable at equal n only."
    )


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
    one_row_each = runs.drop_duplicates("run")
    devices = {(row.device or "unknown device", row.world_size, row.threads) for row in one_row_each.itertuples()}
    parts = []
    for device, world_size, threads in sorted(devices, key=str):
        text = f"{world_size} × {device}" if pd.notna(world_size) and world_size > 1 else str(device)
        parts.append(f"{text} ({threads} thread{'s' * (threads != 1)})" if pd.notna(threads) else text)
    beside = {True: "some runs ran side by side", False: "no two runs at the same time", None: "unknown whether side by side"}
    return f"† Measured on {', '.join(parts)}, {beside[side_by_side(runs)]}; throughput varies from run to run."


def side_by_side(runs: pd.DataFrame) -> bool | None:
    """Whether any run started while another was training; None if that is not known."""
    seconds = runs[runs["metric"] == "device_seconds"].set_index("run")["value"]
    times = []
    for row in runs.drop_duplicates("run").itertuples():
        if not row.started or row.run not in seconds.index:
            return None
        started = datetime.fromisoformat(str(row.started))
        started = started if started.tzinfo else started.replace(tzinfo=UTC)
        num_devices = 1 if pd.isna(row.world_size) else int(row.world_size)
        times.append((started, started + timedelta(seconds=float(seconds[row.run]) / num_devices)))
    times.sort()
    return any(later[0] < earlier[1] for earlier, later in zip(times, times[1:], strict=False))


def _code(runs: pd.DataFrame) -> str:
    versions = []
    for row in runs[["code_hash", "commit", "dirty"]].drop_duplicates().sort_values(["code_hash", "commit"]).itertuples():
        state = "unknown whether clean" if pd.isna(row.dirty) else "with uncommitted changes" if row.dirty else "clean"
        versions.append(
            f"{row.code_hash or 'unknown'} (commit {row.commit[:10]}, {state})" if row.commit else f"{row.code_hash} (no commit)"
        )
    mixed = " The runs were made by different code." if runs["code_hash"].nunique() > 1 else ""
    return f"Code: {'; '.join(versions)}.{mixed}"
