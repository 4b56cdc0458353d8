"""Which runs make up a comparison? Reads a suite file: a base configuration, the methods, and a grid over any settings."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bench.config import RunConfig
from bench.files import read_yaml

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
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) and "method" in entry for entry in entries or [0]):
        raise ValueError(f"suite {path} lists no methods: give `methods` as a list of entries with a `method` each")
    grid = suite.get("grid") or {}
    if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"suite {path} has the grid {grid!r}: give a list of values for each setting, as in seed: [0, 1, 2]")
    if not isinstance(suite.get("base") or {}, Mapping):
        raise ValueError(f"suite {path} has the base {suite['base']!r}: give settings as a mapping")
    return suite


def suite_configs(suite: Mapping[str, Any], overrides: list[str], make_config: MakeConfig) -> list[RunConfig]:
    """The suite's runs: every method at every point of the grid (`key.path: [values]`), with `key=value` overrides on top.

    ValueError in one sentence for anything that is not allowed, and where two are the same run.
    """
    grid = suite.get("grid") or {}
    points = [list(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    configs: list[RunConfig] = []
    for entry in suite["methods"]:
        tree = OmegaConf.merge(suite.get("base") or {}, {key: value for key, value in entry.items() if key != "colour"})
        base = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(base, dict)
        for point in points:
            settings = [f"{key}={json.dumps(value)}" for key, value in point]
            config = make_config({str(key): value for key, value in base.items()}, settings + overrides)
            if config.run_id in {other.run_id for other in configs}:
                raise ValueError(
                    f"{config.run_id} ({config.label or config.method}) is in the suite more than once with these settings: "
                    "let its entries differ, or take one out"
                )
            configs.append(config)
    return configs
