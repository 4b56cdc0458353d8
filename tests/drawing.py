"""Runs to draw figures of, and what the figures then show; for the tests of figures."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from fake_runs import FLOOR_RECORD, REAL_IMAGES, REAL_NAMES, SUITE, write_fake_runs

from bench.arrays import Trajectory, write_trajectory
from bench.figures.style import Drawn, Material, data_file, dress
from bench.plots import make_figures
from bench.runs import Run, find_runs

LABELS = [entry["label"] for entry in SUITE["methods"]]


def write_runs(root: Path) -> list[Run]:
    """Two seeds of every method, scored on their way, with every diagnostic that there is."""
    runs = write_fake_runs(root, seeds=(0, 1), curve=(0.3, 0.6))
    draw = np.random.default_rng(2)
    for run in runs:
        frames = draw.integers(0, 256, (5, 3, 1, 8, 8)).astype(np.uint8)
        write_trajectory(run.path, Trajectory(frames, frames[::-1], np.array([900.0, 600, 300, 0, np.nan]), np.arange(3)))
        if run.config["method"] == "dit_moe":
            add_diagnostics(run.path, routing_by_position=shares(draw, 4, 16, 8), routing_by_class=shares(draw, 4, 10, 8))
    return find_runs(root)


def draw_all(root: Path) -> list[Path]:
    """All figures of these runs in `root/figures`; their files."""
    runs, figures = write_runs(root), root / "figures"
    return make_figures(runs, SUITE, figures, floor=FLOOR_RECORD, real_images=REAL_IMAGES, class_names=REAL_NAMES)


def shares(draw: np.random.Generator, *shape: int) -> np.ndarray:
    values = draw.uniform(size=shape)
    return values / values.sum(axis=-1, keepdims=True)


def add_diagnostics(folder: Path, **arrays: np.ndarray) -> None:
    with np.load(folder / "diagnostics.npz") as stored:
        old = dict(stored)
    axes = {f"{name}/axes": np.array(["block", name.removeprefix("routing_by_"), "expert"]) for name in arrays}
    np.savez_compressed(folder / "diagnostics.npz", **old, **arrays, **axes)  # type: ignore[arg-type]


def only_diagnostic(folder: Path, name: str, values: np.ndarray, axes: Sequence[str]) -> None:
    np.savez_compressed(folder / "diagnostics.npz", **{name: values, f"{name}/axes": np.array(axes)})  # type: ignore[arg-type]


def material_of(runs: Sequence[Run], **more: object) -> Material:
    return Material(dress(runs, SUITE), baseline=LABELS[0], **more)  # type: ignore[arg-type]


def data_of(drawn: Drawn) -> pd.DataFrame:
    """As a reader of the CSV gets it."""
    return pd.read_csv(io.BytesIO(data_file(drawn)[f"{drawn.name}.csv"]), dtype={"seeds": str})


def only(drawn: list[Drawn]) -> Drawn:
    assert len(drawn) == 1
    return drawn[0]


def first_of(runs: Sequence[Run], label: str) -> Run:
    """The run of that label with the smallest seed."""
    return min((run for run in runs if run.label == label), key=lambda run: int(run.config["seed"]))
