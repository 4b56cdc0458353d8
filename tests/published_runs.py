"""What do the tests of published tables share? Finished runs of their suites."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.config import RunConfig
from bench.job import make_config
from bench.published.ours import SCORING
from bench.published.table import load_published_suite
from bench.suite import suite_runs


def write_run(root: Path, config: RunConfig, fid: float, protocol_hash: str = "0123456789", **protocol: Any) -> Path:
    """A finished run of these settings, as a folder."""
    folder = root / "runs" / config.run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    scoring = {key: value for key, value in asdict(config.evaluation).items() if key in SCORING}
    metrics = {"fid_train": fid, "inception_score": 100 + fid, "precision": 0.5, "recall": 0.25}
    record = {
        "protocol_hash": protocol_hash,
        "protocol": {**scoring, **protocol},
        "n": scoring["num_samples"],
        "metrics": metrics,
    }
    (folder / "eval.json").write_text(json.dumps([{**record, "metrics": metrics}]))
    (folder / "summary.json").write_text(json.dumps({"train_images_per_second": 512.0, "peak_memory_bytes": 3 * 2**30}))
    if "experts" in config.options:
        rng = np.random.default_rng(config.seed)
        values = rng.dirichlet(np.ones(config.options["bases"]), config.options["experts"])
        axes = np.array(["expert", "basis"])
        np.savez(folder / "diagnostics.npz", **{"mixing_coefficients": values, "mixing_coefficients/axes": axes})
    (folder / "done").touch()
    return folder


def config_of(name: str, label: str, seed: int = 0, *settings: str) -> RunConfig:
    runs = suite_runs(load_published_suite(name), [*settings], make_config)
    return replace(next(run.config for run in runs if run.config.label == label), seed=seed)
