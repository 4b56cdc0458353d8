"""Which runs left a diagnostic, and how is it averaged? Figures look for diagnostics by name and axes, and know no method."""

import warnings

import numpy as np

from bench.figures.style import Material, Shown
from bench.runs import Diagnostic


def having(material: Material, name: str, axes: tuple[str, ...] = ()) -> list[tuple[Shown, Diagnostic]]:
    """The first seed of each label, with its diagnostic, if it has one (with exactly these axes)."""
    found = [(shown, shown.run.diagnostics.get(name)) for shown in material.one_per_label()]
    return [(shown, each) for shown, each in found if each is not None and (not axes or set(each.axes) == set(axes))]


def mean_over(values: np.ndarray, axes: tuple[str, ...], kept: tuple[str, ...]) -> np.ndarray:
    """The array with the axes `kept`, in this order, averaged over all others; NaN (nothing seen) does not count."""
    others = tuple(i for i, axis in enumerate(axes) if axis not in kept)
    left = [axis for axis in axes if axis in kept]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # nothing seen at all stays NaN
        averaged: np.ndarray = np.nanmean(values, axis=others) if others else values
    return averaged.transpose([left.index(axis) for axis in kept])


def num_timesteps(shown: Shown) -> int:
    return int(shown.run.config["diffusion"]["num_timesteps"])
