"""How is a loss drawn beside its difference to the baseline's?"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures.seeds import draw_lines, over_seeds, seeds_sentence
from bench.figures.style import Material, Shown, legend_beside, log_loss_axis, new_figure, short_label

OUTLYING_PERCENT, FAR = 5, 1.6  # of an axis: so much at either end may be cut, where all would make it so many times as long

Curves = list[tuple[Shown, pd.DataFrame]]  # of runs, with a column `loss`


def beside_difference(
    curves: Curves, at: list[str], along: str, title: str, material: Material
) -> tuple[Figure, pd.DataFrame, str]:
    """Held-out losses at the places `at` (drawn along one of them), and right of them, where the baseline is among them, the
    difference to it. Its axes are the figure's, still without a horizontal one; the data of both; and what to say of them.
    """
    loss = over_seeds(curves, at, "loss")
    difference = over_seeds(_to_baseline(curves, at, material.baseline), at, "percent")
    figure = new_figure(10.6 if len(difference) else 7.6, 3.9)
    panels = figure.subplots(1, 2 if len(difference) else 1, squeeze=False)[0]
    draw_lines(panels[0], loss, material, along, "loss")
    panels[0].set_title(title)
    log_loss_axis(panels[0], "denoising loss (mse)")
    if len(difference):
        draw_lines(panels[1], difference, material, along, "percent")
        _name_difference(panels[1], material.baseline)
    legend_beside(figure, panels[0])
    return figure, _both(loss, difference), seeds_sentence(loss) + _sentence(material, difference)


def _to_baseline(curves: Curves, at: list[str], baseline: str) -> Curves:
    """Each run's loss against that of the baseline with the same seed, in percent; without the baseline itself."""
    by_seed = {shown.run.config["seed"]: curve for shown, curve in curves if shown.label == baseline}
    found = []
    for shown, curve in curves:
        if shown.label != baseline and shown.run.config["seed"] in by_seed:
            matched = curve.merge(by_seed[shown.run.config["seed"]], on=at, suffixes=("", "_baseline"))
            found.append((shown, matched.assign(percent=100 * (matched["loss"] / matched["loss_baseline"] - 1))))
    return found


def _name_difference(axes: Axes, baseline: str) -> None:
    """Where a few points lie far from all others, the axis ends before them, and says so."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    low, high = np.nanpercentile(values, [OUTLYING_PERCENT, 100 - OUTLYING_PERCENT])
    margin = 0.15 * (high - low)
    is_cut = margin > 0 and np.nanmax(values) - np.nanmin(values) > FAR * (high - low)
    if is_cut:
        axes.set_ylim(max(np.nanmin(values), low) - margin, min(np.nanmax(values), high) + margin)
    axes.axhline(0, color="black", linewidth=1.0, zorder=1)
    axes.set_title(f"Difference to {short_label(baseline, 26)} (below 0: better)")
    axes.set_ylabel("difference (%), lines leave the axis" if is_cut else "difference (%)")


def _sentence(material: Material, difference: pd.DataFrame) -> str:
    if difference.empty:
        return ""
    sentence = f" Right: difference to {material.baseline} with the same seed, in percent of its loss"
    has_bands = difference["half_width"].notna().any()
    return sentence + ("; bands are 95% intervals of these paired differences." if has_bands else ".")


def _both(loss: pd.DataFrame, difference: pd.DataFrame) -> pd.DataFrame:
    """The data of two panels in one table: which of them, and the value."""
    parts = [
        loss.rename(columns={"loss": "value"}).assign(panel="loss"),
        difference.rename(columns={"percent": "value"}).assign(panel="difference_percent"),
    ]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return table[["panel", *(name for name in table.columns if name != "panel")]]
