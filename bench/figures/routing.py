"""Which experts does a block use, for which timesteps, positions and classes? From the diagnostics `routing`, `routing_by_*`."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.ticker import MaxNLocator

from bench.figures.diagnostics import having, mean_over, num_timesteps
from bench.figures.style import SEQUENTIAL, TIMESTEP, Drawn, Material, Shown, names_for, new_figure, spread

NUM_GROUPS = 100  # of timesteps or classes in a heatmap; more are averaged in groups
NUM_EXPERTS, NUM_BLOCKS = 16, 8  # shown; of more, so many evenly spread ones
NUM_CLASS_NAMES = 12
NOTHING_SEEN = "#dcdcdc"
SHARE, WEIGHT = "share of routing", "routing weight"  # what sums to 1 over experts, and what need not


def routing(material: Material) -> list[Drawn]:
    """(block, timestep, expert): a heatmap per expert."""
    drawn = []
    for name, shown, shares in _shares(material, "routing", ("block", "timestep", "expert")):
        edges = np.linspace(0, num_timesteps(shown), shares.shape[1] + 1)
        drawn.append(_heatmaps(name, shown, shares, edges, "timestep", TIMESTEP))
    return drawn


def routing_by_class(material: Material) -> list[Drawn]:
    """(block, class, expert): a heatmap per expert."""
    drawn = []
    for name, shown, shares in _shares(material, "routing_by_class", ("block", "class", "expert")):
        named = len(material.class_names) == shares.shape[1] <= NUM_CLASS_NAMES
        edges = np.arange(shares.shape[1] + 1) - 0.5
        drawn.append(_heatmaps(name, shown, shares, edges, "class", "class", material.class_names if named else ()))
    return drawn


def routing_by_position(material: Material) -> list[Drawn]:
    """(block, position, expert): a small map of the image for each block and expert."""
    drawn = []
    for name, shown, shares in _shares(material, "routing_by_position", ("block", "expert", "position")):
        blocks, experts = spread(shares.shape[0], NUM_BLOCKS), spread(shares.shape[1], NUM_EXPERTS)
        figure = new_figure(0.72 * len(experts) + 2.2, 0.72 * len(blocks) + 1.0)
        axes = figure.subplots()
        whole, centres_x, centres_y = mosaic_of_maps(shares[np.ix_(blocks, experts)])
        image = axes.imshow(whole, cmap=_colours(), vmin=0, interpolation="nearest")
        axes.set_xticks(centres_x, [str(expert) for expert in experts])
        axes.set_yticks(centres_y, [str(block) for block in blocks])
        axes.tick_params(length=0)
        axes.set_frame_on(False)
        axes.grid(False)
        axes.set_xlabel("expert")
        axes.set_ylabel("block")
        unit = _unit(shares, axis=1)
        figure.colorbar(image, ax=axes, label=unit)
        figure.suptitle(f"{shown.label}: routing by position")
        block, expert, position = (index.ravel() for index in np.indices(shares.shape))
        data = {"label": shown.label, "block": block, "position": position, "expert": expert, "value": shares.ravel()}
        table = pd.DataFrame(data)
        caption = (
            f"{shown.label}: an expert's {unit} at each position of the image, for each block. "
            f"{_even(unit, shares.shape[1])} {_source(shown)}{_omitted(shares.shape[0], shares.shape[1])}"
        )
        kept = table["block"].isin(blocks) & table["expert"].isin(experts)
        drawn.append(Drawn(name, figure, table[kept], caption))
    return drawn


def mosaic_of_maps(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, columns, position) in raster order -> one array with gaps of NaN, and the centres of its columns and rows.

    A number of positions that is no square makes strips.
    """
    side = math.isqrt(shares.shape[2])
    height, width = (side, side) if side * side == shares.shape[2] else (1, shares.shape[2])
    gap = max(1, width // 5)
    rows, columns = shares.shape[:2]
    whole = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + gap), column * (width + gap)
        whole[top : top + height, left : left + width] = shares[row, column].reshape(height, width)
    centres = [np.arange(count) * (size + gap) + (size - 1) / 2 for count, size in ((columns, width), (rows, height))]
    return whole, centres[0], centres[1]


def in_groups(shares: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(block, place, expert) and (place + 1,), with no more than NUM_GROUPS places: their means over neighbours."""
    count = shares.shape[1]
    cuts = np.linspace(0, count, min(count, NUM_GROUPS) + 1).round().astype(int)
    parts = [mean_over(shares[:, a:b], ("block", "place", "expert"), ("block", "expert")) for a, b in pairwise(cuts)]
    return np.stack(parts, axis=1), edges[cuts]


def _shares(material: Material, diagnostic: str, axes: tuple[str, ...]) -> Iterator[tuple[str, Shown, np.ndarray]]:
    """The figure's name, the run and its array with its axes in this order, for each label that left the diagnostic."""
    found = having(material, diagnostic, axes)
    names = names_for(diagnostic, [shown for shown, _ in found])
    for name, (shown, of_run) in zip(names, found, strict=True):
        yield name, shown, mean_over(of_run.values, of_run.axes, axes)


def _heatmaps(
    name: str, shown: Shown, shares: np.ndarray, edges: np.ndarray, axis: str, xlabel: str, class_names: Sequence[str] = ()
) -> Drawn:
    """shares (block, place, expert): a panel per expert, blocks from top to bottom."""
    grouped = f" Averaged in {NUM_GROUPS} groups of neighbours." if shares.shape[1] > NUM_GROUPS else ""
    shares, edges = in_groups(shares, edges)
    num_blocks, _, num_experts = shares.shape
    experts = spread(num_experts, NUM_EXPERTS)
    columns = min(4, len(experts))
    rows = -(-len(experts) // columns)
    figure = new_figure(2.3 * columns + 1.6, min(max(0.75 + 0.17 * num_blocks, 1.45) * rows + 0.9, 14))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(experts) :]:
        axes.axis("off")
    most = float(np.nanmax(shares[:, :, experts]))
    for expert, axes in zip(experts, grid.flat, strict=False):
        mesh = axes.pcolormesh(
            edges, np.arange(num_blocks + 1) - 0.5, shares[:, :, expert], cmap=_colours(), vmin=0, vmax=most, rasterized=True
        )
        axes.set_facecolor(NOTHING_SEEN)
        axes.set_ylim(num_blocks - 0.5, -0.5)
        axes.grid(False)
        axes.set_title(f"expert {expert}", fontsize=8.5)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        _name_places(axes, axis, class_names)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel("block", fontsize=9)
    unit = _unit(shares, axis=2)
    figure.colorbar(mesh, ax=grid, label=unit, fraction=0.05, aspect=18 * rows)
    figure.suptitle(f"{shown.label}: routing by block and {axis}")
    block, place, of_expert = (index.ravel() for index in np.indices(shares.shape))
    where = {"start": edges[place], "stop": edges[place + 1]} if axis == "timestep" else {axis: np.round(edges[place] + 0.5)}
    table = pd.DataFrame({"label": shown.label, "block": block, **where, "expert": of_expert, "value": shares.ravel()})
    caption = (
        f"{shown.label}: an expert's {unit} for each {axis}, by block (first at the top). "
        f"{_even(unit, num_experts)} {_source(shown)}{grouped}{_omitted(1, num_experts)}"
        + (" Grey: nothing was seen there." if np.isnan(shares).any() else "")
    )
    return Drawn(name, figure, table[table["expert"].isin(experts)], caption)


def _name_places(axes: Axes, axis: str, class_names: Sequence[str]) -> None:
    if class_names:
        rotation = 90 if max(map(len, class_names)) > 2 else 0
        axes.set_xticks(np.arange(len(class_names)), class_names, rotation=rotation, fontsize=7.5)
        axes.tick_params(axis="x", length=0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=axis == "class"))


def _colours() -> Colormap:
    return colormaps[SEQUENTIAL].with_extremes(bad="#ffffff")


def _unit(values: np.ndarray, axis: int) -> str:
    sums = values.sum(axis=axis)
    return SHARE if np.allclose(sums[np.isfinite(sums)], 1, atol=1e-3) else WEIGHT


def _even(unit: str, num_experts: int) -> str:
    if unit == SHARE:
        return f"Even routing would be 1/{num_experts} everywhere."
    return "A weight is what the gate gives an expert that is in use, 0 for the others; they need not sum to 1."


def _source(shown: Shown) -> str:
    return f"Averaged weights of seed {shown.run.config['seed']}, at the end of training."


def _omitted(num_blocks: int, num_experts: int) -> str:
    left_out = [
        f"{most} of {count} {what}"
        for count, most, what in ((num_blocks, NUM_BLOCKS, "blocks"), (num_experts, NUM_EXPERTS, "experts"))
        if count > most
    ]
    return f" Shown: {' and '.join(left_out)}, evenly spread." if left_out else ""
