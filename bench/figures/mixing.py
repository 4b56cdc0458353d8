"""Which bases does an expert mix, over the timesteps and over training? From the diagnostic `mixing_coefficients`."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.figures.diagnostics import having, mean_over
from bench.figures.style import (
    COLOURS,
    LINES,
    SEQUENTIAL,
    TIMESTEP,
    Drawn,
    Material,
    Shown,
    image_axis,
    names_for,
    new_figure,
    spread,
)
from bench.runs import Diagnostic

NAME = "mixing_coefficients"
NUM_ANNOTATED = 20  # experts; with more, numbers would not be readable
NUM_PANELS = 12  # experts whose curves are shown
DARK = 0.55  # of the colour scale; below it, numbers are written in white


def mixing_coefficients(material: Material) -> list[Drawn]:
    """(expert, basis) at the end of training, each expert over its timesteps; a block axis is averaged over."""
    found = having(material, NAME)
    names = names_for(NAME, [shown for shown, _ in found])
    return [_over_timesteps(name, *each) for name, each in zip(names, found, strict=True)]


def mixing_over_training(material: Material) -> list[Drawn]:
    """A panel per expert, a line per basis."""
    found = [(shown, each) for shown, each in having(material, NAME) if each.history is not None and len(each.history) > 1]
    names = names_for("mixing_over_training", [shown for shown, _ in found])
    return [_over_training(name, *each) for name, each in zip(names, found, strict=True)]


def _over_timesteps(name: str, shown: Shown, diagnostic: Diagnostic) -> Drawn:
    final = mean_over(diagnostic.values, diagnostic.axes, ("expert", "basis"))
    edges = _edges(shown, len(final))
    num_experts, num_bases = final.shape
    figure = new_figure(10.0, 1.5 + 0.36 * num_bases)
    axes = figure.subplots()
    most = max(1.0, float(np.abs(final).max()))
    least = 0.0 if final.min() >= 0 else -most
    borders: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5} if num_experts <= NUM_ANNOTATED else {}
    mesh = axes.pcolormesh(edges, np.arange(num_bases + 1), final.T, vmin=least, vmax=most, cmap=SEQUENTIAL, **borders)
    if num_experts <= NUM_ANNOTATED:
        _write_numbers(axes, edges, final, dark=least + DARK * (most - least))
        above = axes.secondary_xaxis("top")
        above.set_xticks((edges[:-1] + edges[1:]) / 2, [str(i) for i in range(num_experts)])
        above.tick_params(length=0)
        above.set_xlabel("expert")
        above.spines["top"].set_visible(False)
    axes.set_yticks(np.arange(num_bases) + 0.5, [str(basis) for basis in range(num_bases)])
    axes.set_ylim(num_bases, 0)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(False)
    axes.set_ylabel("basis")
    axes.set_xlabel(TIMESTEP)
    figure.colorbar(mesh, ax=axes, label="coefficient", pad=0.015)
    figure.suptitle(f"{shown.label}: mixing coefficients{_averaged(diagnostic)}")
    expert, basis = (index.ravel() for index in np.indices(final.shape))
    data = {"label": shown.label, "expert": expert, "start": edges[expert], "stop": edges[expert + 1], "basis": basis}
    caption = (
        f"{shown.label}: how much of each basis is in the expert of each interval of timesteps, at the end of training"
        f"{_averaged(diagnostic)}. Averaged weights of seed {shown.run.config['seed']}."
    )
    return Drawn(name, figure, pd.DataFrame({**data, "coefficient": final.ravel()}), caption)


def _over_training(name: str, shown: Shown, diagnostic: Diagnostic) -> Drawn:
    assert diagnostic.history is not None and diagnostic.images_seen is not None
    history = mean_over(diagnostic.history, ("point", *diagnostic.axes), ("point", "expert", "basis"))
    edges = _edges(shown, history.shape[1])
    experts = spread(history.shape[1], NUM_PANELS)
    columns = min(4, len(experts))
    rows = -(-len(experts) // columns)
    figure = new_figure(2.4 * columns + 1.6, 1.55 * rows + 1.1)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(experts) :]:
        axes.axis("off")
    for expert, axes in zip(experts, grid.flat, strict=False):
        for basis in range(history.shape[2]):
            look = {"color": COLOURS[basis % len(COLOURS)], "linestyle": LINES[basis % len(LINES)], "linewidth": 1.4}
            axes.plot(diagnostic.images_seen, history[:, expert, basis], label=f"basis {basis}", **look)
        axes.set_title(f"expert {expert}: t {edges[expert]}–{edges[expert + 1] - 1}", fontsize=8.5)
        image_axis(axes, diagnostic.images_seen.max())
        axes.xaxis.set_major_locator(MaxNLocator(3))
        label = axes.get_xlabel()
        axes.set_xlabel("")
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("coefficient", fontsize=9)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper", handlelength=3)
    figure.suptitle(f"{shown.label}: mixing coefficients over training{_averaged(diagnostic)}")
    point, of_expert, of_basis = (index.ravel() for index in np.indices(history.shape))
    data = {"label": shown.label, "images_seen": diagnostic.images_seen[point], "expert": of_expert, "basis": of_basis}
    table = pd.DataFrame({**data, "coefficient": history.ravel()})
    some = f", of {len(experts)} of its {history.shape[1]} experts" if len(experts) < history.shape[1] else ""
    caption = (
        f"{shown.label}: the coefficients of the bases over training{some}{_averaged(diagnostic)}; t is the expert's interval of "
        f"timesteps. Seed {shown.run.config['seed']}."
    )
    return Drawn(name, figure, table[table["expert"].isin(experts)], caption)


def _write_numbers(axes: Axes, edges: np.ndarray, final: np.ndarray, dark: float) -> None:
    middles = (edges[:-1] + edges[1:]) / 2
    for expert, basis in np.ndindex(*final.shape):
        value = final[expert, basis]
        place, number = (float(middles[expert]), basis + 0.5), f"{round(float(value), 2) + 0.0:.2f}"  # no minus before zero
        axes.text(*place, number, ha="center", va="center", fontsize=7.5, color="white" if value < dark else "black")


def _edges(shown: Shown, num_experts: int) -> np.ndarray:
    """(num_experts + 1,): where the experts' intervals begin, and the last one's end."""
    found = shown.run.diagnostics.get("intervals")
    intervals = found.values if found is not None else np.empty((0, 2), dtype=int)
    if len(intervals) != num_experts:
        raise ValueError(
            f"{shown.run.path / 'diagnostics.npz'} has coefficients of {num_experts} experts but {len(intervals)} intervals: "
            "delete it and score the run again"
        )
    return np.array([intervals[0][0], *(stop for _, stop in intervals)])


def _averaged(diagnostic: Diagnostic) -> str:
    return " (mean over blocks)" if "block" in diagnostic.axes else ""
