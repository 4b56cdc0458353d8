"""How well do the methods, and each of their experts, denoise at each timestep?"""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from bench.figures.difference import beside_difference
from bench.figures.losses import TRAINING_LOSS, moving_mean, rows_of, with_denoising_loss
from bench.figures.seeds import over_seeds, seeds_sentence
from bench.figures.style import SEQUENTIAL, TIMESTEP, Drawn, Material, Shown, image_axis, log_loss_axis, names_for, new_figure

BIN = ["bin", "start", "stop", "middle"]
INTERVAL = ["interval", "start", "stop", "images_seen"]
NUM_NUMBERED = 20  # intervals; with more, their numbers would not be readable


def loss_per_timestep(material: Material) -> list[Drawn]:
    """The held-out loss at the end of training, per bin of timesteps, and how it differs from the baseline's."""
    curves = [(shown, rows) for shown in material.shown if len(rows := final_heldout(shown))]
    if not curves:
        return []
    figure, table, sentence = beside_difference(curves, BIN, "middle", "Held-out loss per timestep, at the end", material)
    for axes in figure.axes:
        axes.set_xlabel(TIMESTEP)
        axes.set_xlim(0, table["stop"].max())
    caption = (
        f"Denoising loss of the averaged weights at the end of training, in {table['bin'].nunique()} bins of timesteps, on "
        f"held-out images with fixed noise. {sentence}"
    )
    return [Drawn("loss_per_timestep", figure, table, caption)]


def per_expert_loss(material: Material) -> list[Drawn]:
    """For each method that splits the schedule: the training loss of every interval, over training and over timesteps."""
    split = [shown for shown in material.one_per_label() if _num_intervals(shown) > 1]
    return [
        _per_expert_loss(name, shown, material) for name, shown in zip(names_for("per_expert_loss", split), split, strict=True)
    ]


def interval_curves(shown: Shown) -> pd.DataFrame:
    """interval, start, stop, images_seen, smoothed: a moving mean over each interval's own steps."""
    rows = with_denoising_loss(rows_of(shown, "train"))
    parts = []
    for _, own in rows.sort_values("step").groupby("interval"):
        smoothed = moving_mean(own["denoising"].to_numpy(), own["num_steps"].to_numpy())
        parts.append(own[INTERVAL].assign(smoothed=smoothed))
    return pd.concat(parts, ignore_index=True)


def final_heldout(shown: Shown) -> pd.DataFrame:
    """The rows of the last measuring point, with the `middle` of each bin."""
    rows = rows_of(shown, "heldout")
    if rows.empty:
        return rows
    return rows[rows["step"] == rows["step"].max()].assign(middle=lambda last: (last["start"] + last["stop"]) / 2)


def _per_expert_loss(name: str, shown: Shown, material: Material) -> Drawn:
    curves = [(other, interval_curves(other)) for other in material.shown if other.label == shown.label]
    table = over_seeds(curves, INTERVAL, "smoothed")
    figure = new_figure(9.6, 3.7)
    left, right = figure.subplots(1, 2, sharey=True)
    indices = sorted(table["interval"].unique())
    for place, index in enumerate(indices):
        colour = colormaps[SEQUENTIAL](0.92 * place / max(len(indices) - 1, 1))
        own = table[table["interval"] == index]
        for _, line in own.groupby("seeds", sort=False):
            left.plot(line["images_seen"], line["smoothed"], color=colour, linewidth=1.3)
            if line["half_width"].notna().any():
                low, high = line["smoothed"] - line["half_width"], line["smoothed"] + line["half_width"]
                left.fill_between(line["images_seen"], low, high, color=colour, alpha=0.16, linewidth=0)
        _at_the_end(right, own, colour, numbered=len(indices) <= NUM_NUMBERED)
    figure.suptitle(f"{shown.label}: training loss of each interval of timesteps")
    image_axis(left, table["images_seen"].max())
    left.set_title("over training (colours as on the right)")
    log_loss_axis(left, TRAINING_LOSS)
    right.set_title("at the end, by interval")
    right.set_xlabel(TIMESTEP)
    right.set_xlim(0, table["stop"].max())
    caption = (
        f"{shown.label}: denoising loss on the training batches of each of its {len(indices)} intervals of timesteps, penalties "
        f"left out, as a moving mean over training and at its end. {seeds_sentence(table)}"
    )
    return Drawn(name, figure, table, caption)


def _at_the_end(axes: Axes, own: pd.DataFrame, colour: tuple[float, ...], numbered: bool) -> None:
    """A level line over the timesteps of one interval, with its 95% interval as a box."""
    last = own[own["images_seen"] == own["images_seen"].max()]
    start, stop = own["start"].iloc[0], own["stop"].iloc[0]
    for loss, half_width in zip(last["smoothed"], last["half_width"], strict=True):
        axes.hlines(loss, start, stop, color=colour, linewidth=3.5)
        if np.isfinite(half_width):
            axes.fill_between([start, stop], loss - half_width, loss + half_width, color=colour, alpha=0.2, linewidth=0)
    if numbered:
        middle = ((start + stop) / 2, last["smoothed"].max())
        number = str(int(own["interval"].iloc[0]))
        axes.annotate(number, middle, (0, 5), textcoords="offset points", ha="center", fontsize=8)


def _num_intervals(shown: Shown) -> int:
    rows = rows_of(shown, "train")
    return rows["interval"].nunique() if len(rows) else 0
