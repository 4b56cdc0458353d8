"""May these runs stand in one table? If not, which of them do not belong together, and why?"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from bench.tidy import FLOOR, PLACES, at_the_end

BUDGET_TOLERANCE = 0.01
BUDGET_METRICS = {name.removeprefix("at_"): metric for name, metric in PLACES.items()}  # of the units of a budget
ALLOWABLE = ("protocols", "incomplete", "n", "budgets")  # what may be shown all the same, where it is asked for
NUM_NAMED = 6  # runs named in a message


class TableRefusal(ValueError):
    """A comparison that would not be fair. The message says why, in one sentence, and names the runs."""


class Objection(NamedTuple):
    """`kind`: one of ALLOWABLE; `remedy`: what to do about it."""

    kind: str
    what: str
    remedy: str


def admit(objections: Iterable[Objection], allow: Collection[str] = ()) -> list[str]:
    """What is allowed although it is not fair, in words; TableRefusal for the first objection that is not."""
    unknown = sorted(set(allow) - set(ALLOWABLE))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be allowed: choose from {', '.join(ALLOWABLE)}")
    admitted = []
    for each in objections:
        if each.kind not in allow:
            raise TableRefusal(f"{each.what}: {each.remedy}, or show them all the same with --allow {each.kind}")
        admitted.append(each.what)
    return admitted


def objections(frame: pd.DataFrame) -> Iterator[Objection]:
    """Incomplete runs, different numbers of samples and unequal budgets; `frame` holds one scoring of each run."""
    runs = frame[frame["run"] != FLOOR]
    if runs.empty:
        raise TableRefusal("there is no run to compare: train and score some first")
    incomplete = runs[runs["state"] != "done"].drop_duplicates("run")
    if len(incomplete):
        states = [f"{run} ({state})" for run, state in zip(incomplete["run"], incomplete["state"], strict=True)]
        yield Objection("incomplete", f"runs {_listed(states)} are not done", "finish them or leave them out")
    done = runs[runs["state"] == "done"]
    unscored = sorted(set(done["run"]) - set(done[done["protocol_hash"] != ""]["run"]))
    if unscored and (frame["protocol_hash"] != "").any():  # where nothing has scores, as on latents, nothing is left out
        yield Objection(
            "incomplete",
            f"runs {_listed(unscored)} have no scores",
            "score them with the protocol of the others, or leave them out",
        )
    yield from _different_counts(frame)
    if len(done):
        yield from _unequal_budgets(done)


def one_protocol(frame: pd.DataFrame, protocol_hash: str, allow: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the table: costs, and of each run and the floor the scores by one protocol; and what was allowed for it.

    `protocol_hash`, or its beginning, chooses between those that all runs share. TableRefusal if they share none, unless
    protocols are allowed to differ: then each run stands with the one that most of them have.
    """
    scored = frame[frame["protocol_hash"] != ""]
    if len(scored) and not scored["protocol_hash"].str.startswith(protocol_hash).any():
        known = ", ".join(sorted(set(scored["protocol_hash"])))
        raise TableRefusal(f"no run was scored by the protocol {protocol_hash}: choose from {known}")
    frame = frame[(frame["protocol_hash"] == "") | frame["protocol_hash"].str.startswith(protocol_hash)]
    by_run = _protocols(frame)
    common = set.intersection(*by_run.values()) if by_run else {""}
    if common:
        return frame[frame["protocol_hash"].isin(["", _only(common)])], []
    admitted = admit([_different_protocols(frame, by_run)], allow)
    counts = scored.drop_duplicates(["run", "protocol_hash"])["protocol_hash"].value_counts()
    chosen = {run: min(hashes, key=lambda each: (-counts[each], each)) for run, hashes in by_run.items()}
    is_chosen = [not each or chosen[run] == each for run, each in zip(frame["run"], frame["protocol_hash"], strict=True)]
    return frame[is_chosen], admitted


def shared_protocol(frame: pd.DataFrame) -> str:
    """The hash of the one protocol by which all runs, and the floor, were scored; empty if there are no scores at all."""
    by_run = _protocols(frame)
    if not by_run:
        return ""
    common = set.intersection(*by_run.values())
    if not common:
        objection = _different_protocols(frame, by_run)
        raise TableRefusal(f"{objection.what}: {objection.remedy}")
    return _only(common)


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


def _protocols(frame: pd.DataFrame) -> dict[str, set[str]]:
    """run -> the hashes of those it was scored by at its end."""
    scored = at_the_end(frame[frame["protocol_hash"] != ""])
    return {str(run): set(rows["protocol_hash"]) for run, rows in scored.groupby("run")}


def _only(common: set[str]) -> str:
    if len(common) > 1:
        raise TableRefusal(
            f"all runs are scored by each of the protocols {', '.join(sorted(common))}: choose one of them by its hash"
        )
    return next(iter(common))


def _different_protocols(frame: pd.DataFrame, by_run: Mapping[str, set[str]]) -> Objection:
    first = min(by_run, key=lambda run: (run == FLOOR, run))
    other = next((run for run in sorted(by_run) if not by_run[run] & by_run[first]), None)
    if other is None:  # each two share one, but not all of them the same
        return Objection("protocols", "the runs share no one protocol", "score all with one")
    protocols = dict(zip(frame["protocol_hash"], frame["protocol"], strict=True))
    fields = differing_fields(json.loads(protocols[min(by_run[first])]), json.loads(protocols[min(by_run[other])]))
    what = f"runs {first} and {other} were scored by protocols that differ in {'; '.join(fields) or 'their hash alone'}"
    return Objection("protocols", what, "score all with one protocol")


def _different_counts(frame: pd.DataFrame) -> Iterator[Objection]:
    counts = frame[frame["metric"].str.startswith("fid") & frame["n"].notna()].drop_duplicates("run")
    by_count = {int(str(n)): list(rows["run"]) for n, rows in counts.groupby("n")}
    if len(by_count) > 1:
        parts = [f"{_listed(runs)} ({n} samples)" for n, runs in sorted(by_count.items())]
        what = f"FIDs of different numbers of samples cannot be compared, as in {' and '.join(parts)}"
        yield Objection("n", what, "score all with one n")


def _unequal_budgets(runs: pd.DataFrame) -> Iterator[Objection]:
    units = {str(unit): list(rows["run"].unique()) for unit, rows in runs.groupby("budget_unit")}
    if len(units) > 1:
        parts = [f"{_listed(names)} in {unit}" for unit, names in units.items()]
        what = f"the budgets are counted differently, {' and '.join(parts)}"
        yield Objection("budgets", what, "compare runs of one unit")
        return
    metric = BUDGET_METRICS[next(iter(units))]
    spent = runs[runs["metric"] == metric].set_index("run")["value"]
    unknown = sorted(set(runs["run"]) - set(spent.index))
    if unknown:
        yield Objection("budgets", f"runs {_listed(unknown)} do not say how many {metric} they used", "train them again")
    if spent.empty:
        return
    least, most = str(spent.idxmin()), str(spent.idxmax())
    if spent[most] > spent[least] * (1 + BUDGET_TOLERANCE):
        what = (
            f"the budgets are not equal, as {metric} is {spent[least]:.6g} for {least} and {spent[most]:.6g} for {most}, "
            f"more than {BUDGET_TOLERANCE:.0%} apart"
        )
        yield Objection("budgets", what, "compare runs of one budget")


def _listed(names: list[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
