"""Which runs make up a comparison? Reads a suite file: a base configuration, the methods, and a grid over any settings."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.config import RunConfig, read_yaml

FOLDER = Path(__file__).parent / "suites"
KEYS = ("name", "title", "converged", "base", "methods", "grid")

MakeConfig = Callable[[dict[str, Any], list[str]], RunConfig]


def load_suite(name: str) -> dict[str, Any]:
    """A suite by name (`bench/suites/NAME.yaml`) or path; ValueError in one sentence if it is not there or not one."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ValueError(f"there is no suite {name!r}: give the path of a YAML file, or one of {known}")
    suite = read_yaml(path)
    unknown = sorted(set(suite) - set(KEYS))
    if unknown:
        raise ValueError(f"suite {path} has unknown keys {', '.join(unknown)}: allowed are {', '.join(KEYS)}")
    entries = suite.get("methods")
    if not entries or not all(isinstance(entry, Mapping) and "method" in entry for entry in entries):
        raise ValueError(f"suite {path} lists no methods: give `methods` as a list of entries with a `method` each")
    return suite


def suite_configs(suite: Mapping[str, Any], overrides: list[str], make_config: MakeConfig) -> list[RunConfig]:
    """The suite's runs: every method at every point of the grid (`key.path: [values]`), with `key=value` overrides on top."""
    grid = suite.get("grid") or {}
    points = [list(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    configs = []
    for entry in suite["methods"]:
        tree = OmegaConf.merge(suite.get("base") or {}, {key: value for key, value in entry.items() if key != "colour"})
        base = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(base, dict)
        for point in points:
            settings = [f"{key}={value}" for key, value in point]
            configs.append(make_config({str(key): value for key, value in base.items()}, settings + overrides))
    return configs
