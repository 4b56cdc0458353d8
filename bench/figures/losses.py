"""How well do the methods denoise over training?"""

import numpy as np
import pandas as pd

from bench.figures.difference import beside_difference
from bench.figures.seeds import draw_lines, over_seeds, seeds_sentence
from bench.figures.style import Drawn, Material, Shown, image_axis, legend_beside, log_loss_axis, new_figure

SMOOTHING = 0.04  # half the width of the moving mean, as a part of the curve
TRAINING_LOSS = "denoising loss (mse + vb)"


def training_loss(material: Material) -> list[Drawn]:
    """What was measured while training, without penalties: a moving mean over the raw values."""
    curves = [(shown, curve) for shown in material.shown if len(curve := training_curve(shown))]
    if not curves:
        return []
    table = over_seeds(curves, ["images_seen"], "smoothed")
    figure = new_figure(7.6, 3.8)
    axes = figure.subplots()
    draw_lines(axes, table, material, "images_seen", "smoothed")
    axes.set_title("Training loss without penalties")
    image_axis(axes, table["images_seen"].max())
    log_loss_axis(axes, TRAINING_LOSS)
    legend_beside(figure, axes)
    caption = (
        "Denoising loss on the training batches, penalties left out, as a moving mean. "
        f"{seeds_sentence(table)} Methods draw timesteps in different ways: compare them by the held-out loss."
    )
    return [Drawn("training_loss", figure, table, caption)]


def heldout_loss(material: Material) -> list[Drawn]:
    """The mean over all timesteps, on fixed images and noise, and how it differs from the baseline's."""
    curves = [(shown, curve) for shown in material.shown if len(curve := heldout_curve(shown))]
    if not curves:
        return []
    title = "Held-out loss, mean over all timesteps"
    figure, table, sentence = beside_difference(curves, ["images_seen"], "images_seen", title, material)
    for axes in figure.axes:
        image_axis(axes, table["images_seen"].max())
    caption = (
        "Denoising loss of the averaged weights on held-out images with fixed noise, the same for every method, as a mean over "
        f"all timesteps. {sentence}"
    )
    return [Drawn("heldout_loss", figure, table, caption)]


def training_curve(shown: Shown) -> pd.DataFrame:
    """images_seen, loss (over all intervals of a window) and smoothed."""
    rows = rows_of(shown, "train")
    if rows.empty:
        return rows
    rows = with_denoising_loss(rows)
    rows = rows.assign(weighted=rows["denoising"] * rows["num_steps"])
    sums = rows.groupby("images_seen", as_index=False)[["weighted", "num_steps"]].sum()
    loss = sums["weighted"] / sums["num_steps"]
    smoothed = moving_mean(loss.to_numpy(), sums["num_steps"].to_numpy())
    return pd.DataFrame({"images_seen": sums["images_seen"], "loss": loss, "smoothed": smoothed})


def heldout_curve(shown: Shown) -> pd.DataFrame:
    """images_seen, loss: each bin of timesteps counts by its width."""
    rows = rows_of(shown, "heldout")
    if rows.empty:
        return rows
    width = rows["stop"] - rows["start"]
    sums = (
        rows.assign(width=width, weighted=rows["loss"] * width)
        .groupby("images_seen", as_index=False)[["weighted", "width"]]
        .sum()
    )
    return sums.assign(loss=sums["weighted"] / sums["width"])[["images_seen", "loss"]]


def moving_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over a moving window: (n,) -> (n,).

    Centred, so it shrinks at the steep start; at the flat end it keeps its past half, as a short window would only be noisy.
    """
    count = len(values)
    place = np.arange(count)
    reach = np.minimum(max(1, int(SMOOTHING * count)), place)
    sums = np.concatenate([[0.0], np.cumsum(values * weights)])
    totals = np.concatenate([[0.0], np.cumsum(weights)])
    low, high = place - reach, np.minimum(place + reach + 1, count)
    return (sums[high] - sums[low]) / (totals[high] - totals[low])


def rows_of(shown: Shown, kind: str) -> pd.DataFrame:
    metrics = shown.run.metrics
    return metrics[metrics["kind"] == kind] if len(metrics) else metrics


def with_denoising_loss(rows: pd.DataFrame) -> pd.DataFrame:
    variational = rows["vb"].fillna(0.0) if "vb" in rows else 0.0
    return rows.assign(denoising=rows["mse"] + variational)
