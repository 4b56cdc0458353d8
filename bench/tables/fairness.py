"""May these runs stand in one table? If not, which of them do not belong together, and why?"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from bench.runs import FLOOR

BUDGET_TOLERANCE = 0.01
BUDGET_METRICS = {"images": "images_seen", "train_flops": "train_flops", "device_seconds": "device_seconds"}
NUM_NAMED = 6  # runs named in a message


class TableRefusal(ValueError):
    """A comparison that would not be fair. The message says why, in one sentence, and names the runs."""


def check_comparable(frame: pd.DataFrame) -> None:
    """Refuse incomplete runs, different numbers of samples and unequal budgets; `frame` holds one protocol."""
    runs = frame[frame["run"] != FLOOR]
    if runs.empty:
        raise TableRefusal("there is no run to compare: train and score some first")
    incomplete = runs[runs["state"] != "done"].drop_duplicates("run")
    if len(incomplete):
        states = [f"{run} ({state})" for run, state in zip(incomplete["run"], incomplete["state"], strict=True)]
        raise TableRefusal(f"runs {_listed(states)} are not done: finish them or leave them out")
    unscored = sorted(set(runs["run"]) - set(runs[runs["protocol_hash"] != ""]["run"]))
    if unscored:
        raise TableRefusal(
            f"runs {_listed(unscored)} have no scores: score them with the protocol of the others, or leave them out"
        )
    _check_counts(frame)
    _check_budgets(runs)


def shared_protocol(frame: pd.DataFrame) -> str:
    """The hash of the one protocol by which all runs, and the floor, were scored; empty if there are no scores at all."""
    scored = frame[frame["protocol_hash"] != ""]
    by_run = {str(run): set(rows["protocol_hash"]) for run, rows in scored.groupby("run")}
    if not by_run:
        return ""
    common = set.intersection(*by_run.values())
    if len(common) == 1:
        return str(common.pop())
    if common:
        raise TableRefusal(
            f"all runs are scored by each of the protocols {', '.join(sorted(common))}: choose one of them by its hash"
        )
    first = min(by_run, key=lambda run: (run == FLOOR, run))
    other = next(run for run in sorted(by_run) if not by_run[run] & by_run[first])
    protocols = dict(zip(scored["protocol_hash"], scored["protocol"], strict=True))
    fields = differing_fields(json.loads(protocols[min(by_run[first])]), json.loads(protocols[min(by_run[other])]))
    raise TableRefusal(
        f"runs {first} and {other} were scored by protocols that differ in {'; '.join(fields) or 'their hash alone'}: "
        "score all with one protocol"
    )


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested mappings: "name (value and value)", with dotted names."""
    fields = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            fields += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            fields.append(f"{prefix}{key} ({a} and {b})")
    return fields


def _check_counts(frame: pd.DataFrame) -> None:
    counts = frame[frame["metric"].str.startswith("fid") & frame["n"].notna()].drop_duplicates("run")
    by_count = {int(str(n)): list(rows["run"]) for n, rows in counts.groupby("n")}
    if len(by_count) > 1:
        parts = [f"{_listed(runs)} ({n} samples)" for n, runs in sorted(by_count.items())]
        raise TableRefusal(
            f"FIDs of different numbers of samples cannot be compared, as in {' and '.join(parts)}: score all with one n"
        )


def _check_budgets(runs: pd.DataFrame) -> None:
    units = {str(unit): list(rows["run"].unique()) for unit, rows in runs.groupby("budget_unit")}
    if len(units) > 1:
        parts = [f"{_listed(names)} in {unit}" for unit, names in units.items()]
        raise TableRefusal(f"the budgets are counted differently, {' and '.join(parts)}: compare runs of one unit")
    metric = BUDGET_METRICS[next(iter(units))]
    spent = runs[runs["metric"] == metric].set_index("run")["value"]
    unknown = sorted(set(runs["run"]) - set(spent.index))
    if unknown:
        raise TableRefusal(f"runs {_listed(unknown)} do not say how many {metric} they used: train them again")
    least, most = str(spent.idxmin()), str(spent.idxmax())
    if spent[most] > spent[least] * (1 + BUDGET_TOLERANCE):
        raise TableRefusal(
            f"the budgets are not equal, as {metric} is {spent[least]:.6g} for {least} and {spent[most]:.6g} for {most}, "
            f"more than {BUDGET_TOLERANCE:.0%} apart: compare runs of one budget"
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
