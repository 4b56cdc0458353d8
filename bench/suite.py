"""Which runs make up a comparison? Reads a suite file: a base configuration, methods, and a grid over any settings.

A suite may have `groups`: comparisons of their own, each with methods and a grid, and settings on top of the suite's.
Equal budgets are asked for inside a group. An entry can `start_from` the trained weights of a named entry.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.config import RUN, RunConfig
from bench.files import read_yaml

FOLDER = Path(__file__).parent / "suites"
OF_GROUP = ("title", "baseline", "base", "methods", "grid", "columns", "notes")
OF_PUBLISHED = ("published", "settings", "deviations")  # of a suite that stands for a table of a paper: bench.published
KEYS = ("name", "converged", "groups", *OF_PUBLISHED, *OF_GROUP)
OF_ENTRY = (  # the rest are settings
    *("name", "colour", "start_from", "group", "grid"),
    *("published", "section", "deviations", "notes"),
)

MakeConfig = Callable[[dict[str, Any], list[str]], RunConfig]


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite."""

    config: RunConfig
    entry: Mapping[str, Any]  # as in the file
    group: str  # its name; "" in a suite without groups

    @property
    def starts_from(self) -> str:
        """The id of the run whose weights it begins with; "" for one that begins with its own."""
        given = self.config.train.init_from
        return given.removeprefix(RUN) if given.startswith(RUN) else ""


def load_suite(name: str) -> dict[str, Any]:
    """A suite by name (`bench/suites/NAME.yaml`) or path; ValueError in one sentence if it is not there or not one.

    `methods` lists the entries of all groups, each with the name of its `group`.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ValueError(f"there is no suite {name!r}: give the path of a YAML file, or one of {known}")
    suite = {"name": path.stem, **read_yaml(path)}
    _check_keys(suite, KEYS, f"suite {path}")
    if "groups" not in suite:
        _check_group(suite, f"suite {path}")
        return suite
    if not isinstance(suite["groups"], Mapping) or not suite["groups"] or suite.get("methods"):
        raise ValueError(f"suite {path} has groups that are no mapping of names, or methods beside them: put these into a group")
    for group_name, group in suite["groups"].items():
        where = f"group {group_name} of suite {path}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} is {group!r}: give it methods")
        _check_keys(group, OF_GROUP, where)
        _check_group(group, where)
    suite["methods"] = [{**entry, "group": name} for name, group in suite["groups"].items() for entry in group["methods"]]
    return suite


def suite_configs(suite: Mapping[str, Any], overrides: list[str], make_config: MakeConfig) -> list[RunConfig]:
    """The configurations of `suite_runs`, each run once."""
    return list({run.config.run_id: run.config for run in suite_runs(suite, overrides, make_config)}.values())


def suite_runs(suite: Mapping[str, Any], overrides: list[str], make_config: MakeConfig) -> list[SuiteRun]:
    """The suite's runs: in each group every method at every point of the grid (`key.path: [values]`), with `key=value`
    overrides on top. A run that is in two groups is listed in both.

    ValueError in one sentence for anything that is not allowed, and where two of a group are the same run.
    """
    runs: list[SuiteRun] = []
    for name, group in (suite.get("groups") or {"": suite}).items():
        there: set[str] = set()
        for run in _group_runs(suite, name, group, overrides, make_config, runs):
            if run.config.run_id in there:
                raise ValueError(
                    f"{run.config.run_id} ({run.config.label or run.config.method}) is in the suite more than once with these "
                    "settings: let its entries differ, or take one out"
                )
            there.add(run.config.run_id)
            runs.append(run)
    _check_labels(runs)
    return runs


def _check_labels(runs: list[SuiteRun]) -> None:
    """A run knows one label only, and by it the groups that it is shown in."""
    labels: dict[str, str] = {}
    for run in runs:
        known = labels.setdefault(run.config.run_id, run.config.label)
        if known != run.config.label:
            raise ValueError(
                f"{run.config.run_id} is in the suite as {known!r} and as {run.config.label!r}, with the same settings: give "
                "both entries one label, or settings that differ"
            )


def _group_runs(
    suite: Mapping[str, Any],
    name: str,
    group: Mapping[str, Any],
    overrides: list[str],
    make_config: MakeConfig,
    before: list[SuiteRun],
) -> Iterator[SuiteRun]:
    base = OmegaConf.merge(suite.get("base") or {}, group.get("base") or {})
    for entry in group["methods"]:
        tree = OmegaConf.merge(base, {key: value for key, value in entry.items() if key not in OF_ENTRY})
        settings = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(settings, dict)
        grid = {**(group.get("grid") or {}), **(entry.get("grid") or {})}
        for values in itertools.product(*grid.values()):
            point = [f"{key}={json.dumps(value)}" for key, value in zip(grid, values, strict=True)]
            plain = {str(key): value for key, value in settings.items()}
            config = make_config(plain, [*point, *overrides])
            if entry.get("start_from"):
                source = _source(entry["start_from"], config.seed, before)
                config = make_config(plain, [*point, *overrides, f"train.init_from={RUN}{source.config.run_id}"])
            yield SuiteRun(config, entry, name)


def _source(entry_name: str, seed: int, before: list[SuiteRun]) -> SuiteRun:
    """The run of that entry with the same seed, or its only one."""
    named = [run for run in before if run.entry.get("name") == entry_name]
    fitting = [run for run in named if run.config.seed == seed] or (named if len(named) == 1 else [])
    if len(fitting) != 1:
        raise ValueError(
            f"start_from is {entry_name!r}, of which {len(fitting)} runs with seed {seed} come before: name an "
            "earlier entry that has this seed once, or only one run"
        )
    return fitting[0]


def _check_keys(tree: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(tree) - set(allowed))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}: allowed are {', '.join(allowed)}")


def _check_group(group: Mapping[str, Any], where: str) -> None:
    entries = group.get("methods")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) and "method" in entry for entry in entries or [0]):
        raise ValueError(f"{where} lists no methods: give `methods` as a list of entries with a `method` each")
    for grid in (group.get("grid") or {}, *(entry.get("grid") or {} for entry in entries)):
        if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
            raise ValueError(f"{where} has the grid {grid!r}: give a list of values for each setting, as in seed: [0, 1, 2]")
    if not isinstance(group.get("base") or {}, Mapping):
        raise ValueError(f"{where} has the base {group['base']!r}: give settings as a mapping")
