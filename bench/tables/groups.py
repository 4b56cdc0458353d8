"""Which runs make up a row of a table, and what did they measure?"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from bench.tables.fairness import TableRefusal
from bench.tidy import distinct_labels


@dataclass(frozen=True)
class Group:
    """The runs of one row: all seeds of one method with one set of options. `rows` of the tidy frame, one per run and metric."""

    label: str
    rows: pd.DataFrame

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run, by seed."""
        return self._sorted.drop_duplicates("run")

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(map(str, self.runs["run"]))

    @property
    def num_seeds(self) -> int:
        return len(self.runs)

    def of(self, metric: str) -> pd.DataFrame:
        """The rows that have a value of a metric, by seed; of its smallest and largest where it is a list.

        `n` is the number of samples behind the FID and `seeds` that of the runs, as the `value` of a row each.
        """
        if metric == "seeds":
            return self.runs.assign(value=float(self.num_seeds))
        if metric == "n":
            of_fid = self._sorted[self._sorted["metric"].str.startswith("fid") & self._sorted["n"].notna()].drop_duplicates("run")
            return of_fid.assign(value=of_fid["n"].astype("float64"))
        exact = self._by_metric.get(metric)
        if exact is not None:
            return exact
        ends = [rows for name in (f"{metric}_min", f"{metric}_max") if (rows := self._by_metric.get(name)) is not None]
        return pd.concat(ends) if ends else self.rows[:0]

    @cached_property
    def _sorted(self) -> pd.DataFrame:
        return self.rows.sort_values(["seed", "run"], kind="stable")

    @cached_property
    def _by_metric(self) -> dict[str, pd.DataFrame]:
        known = self._sorted[self._sorted["value"].notna()]
        return {str(metric): rows for metric, rows in known.groupby("metric", sort=False)}

    def values(self, metric: str) -> list[float]:
        return [float(value) for value in self.of(metric)["value"]]

    def by_seed(self, metric: str) -> dict[int, float]:
        rows = self.of(metric)
        return {int(seed): float(value) for seed, value in zip(rows["seed"], rows["value"], strict=True)}

    def is_list(self, metric: str) -> bool:
        return bool((self.of(metric)["metric"] == f"{metric}_min").any())


def group_runs(runs: pd.DataFrame, suite: Mapping[str, Any]) -> list[Group]:
    """The runs by row of the table, in the suite's order and then by name."""
    labels = distinct_labels(zip(runs["label"], runs["options"], strict=True))
    shown = runs.assign(shown=[labels[key] for key in zip(runs["label"], runs["options"], strict=True)])
    order = suite_labels(suite)

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
        groups.append(Group(label, rows))
    return groups


def suite_labels(suite: Mapping[str, Any]) -> list[str]:
    return [str(entry.get("label") or entry["method"]) for entry in suite.get("methods", [])]
