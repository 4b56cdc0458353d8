"""How do the mixing coefficients that a paper shows look beside ours?"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from bench.figures.style import SEQUENTIAL, Drawn, new_figure
from bench.published.table import Cell, PublishedTable, Section

TIMESTEPS = re.compile(r"t in \[(\d+),(\d+)\)")  # in the label of a row that is one expert
DARK = 0.55  # below it, numbers are written in white


class Panel(NamedTuple):
    """Coefficients (expert, basis) over the timesteps of the experts."""

    title: str
    edges: np.ndarray  # (expert + 1,)
    values: np.ndarray
    is_published: bool


def published_mixing(table: PublishedTable) -> list[Drawn]:
    """The sections of a table that hold coefficients: published, and below them ours where there are runs (mean over seeds)."""
    panels = [panel for section in table.sections for panel in _panels(section)]
    if not panels:
        return []
    num_bases = panels[0].values.shape[1]
    figure = new_figure(11.0, 0.9 + (0.75 + 0.27 * num_bases) * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    all_axes[-1].set_xlabel("timestep (0: almost no noise)")
    colours = ScalarMappable(Normalize(0, 1), SEQUENTIAL)
    figure.colorbar(colours, ax=list(all_axes), label="coefficient", aspect=12 * len(panels), pad=0.015)
    figure.suptitle(table.title)
    data = pd.concat(map(_data, panels), ignore_index=True)
    return [Drawn(f"{table.name}.mixing_coefficients", figure, data, _caption(table, panels))]


def _caption(table: PublishedTable, panels: list[Panel]) -> str:
    ours = "none of ours is run" if all(panel.is_published for panel in panels) else "ours below, as the mean over seeds"
    return (
        "How much of each basis (row) is in the expert of each interval of timesteps, at the end of training: as published in "
        f"{table.paper}, {ours}. Bases have no order of their own: compare patterns, not rows."
    )


def _panels(section: Section) -> list[Panel]:
    found = [TIMESTEPS.search(row.label) for row in section.rows]
    ranges = [(int(match[1]), int(match[2])) for match in found if match]
    if len(ranges) < len(section.rows):
        return []
    edges = np.array([ranges[0][0], *(stop for _, stop in ranges)])
    cells = [row.cells for row in section.rows]
    published = np.array([[float(cell.published) for cell in row] for row in cells])
    kinds = ", ".join(sorted({cell.confidence for row in cells for cell in row} - {"primary"}))
    panels = [Panel(f"{section.title}, published{f' ({kinds})' * bool(kinds)}", edges, published, True)]
    if all(cell.values for row in cells for cell in row):
        num_seeds = {len(cell.values) for row in cells for cell in row}
        seeds = f"{num_seeds.pop()} seeds" if num_seeds != {1} else "one seed"
        ours = np.array([[_mean(cell) for cell in row] for row in cells])
        panels.append(Panel(f"{section.title}, ours ({seeds})", edges, ours, False))
    return panels


def _mean(cell: Cell) -> float:
    return float(np.mean(cell.values))


def _draw(axes: Axes, panel: Panel) -> None:
    num_bases = panel.values.shape[1]
    axes.pcolormesh(
        panel.edges, np.arange(num_bases + 1), panel.values.T, vmin=0, vmax=1, cmap=SEQUENTIAL, edgecolors="white", linewidth=0.5
    )
    middles = (panel.edges[:-1] + panel.edges[1:]) / 2
    for expert, basis in np.ndindex(*panel.values.shape):
        value = panel.values[expert, basis]
        colour = "white" if value < DARK else "black"
        place = (float(middles[expert]), basis + 0.5)
        axes.text(*place, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_yticks(np.arange(num_bases) + 0.5, [str(basis + 1) for basis in range(num_bases)])
    axes.set_ylim(num_bases, 0)
    axes.set_xlim(panel.edges[0], panel.edges[-1])
    axes.grid(False)
    axes.set_ylabel("basis")
    axes.set_title(panel.title, loc="left")


def _data(panel: Panel) -> pd.DataFrame:
    expert, basis = np.indices(panel.values.shape)
    place = {"expert": expert.ravel(), "start": panel.edges[expert.ravel()], "stop": panel.edges[expert.ravel() + 1]}
    return pd.DataFrame({"panel": panel.title, **place, "basis": basis.ravel() + 1, "coefficient": panel.values.ravel()})
