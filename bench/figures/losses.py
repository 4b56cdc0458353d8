"""How well do the methods denoise over training?"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bench.figures.seeds import draw_lines, over_seeds, seeds_sentence
from bench.figures.style import Drawn, Material, Shown, image_axis, legend_beside, log_loss_axis, new_figure, short_label

SMOOTHING = 0.04  # half the width of the moving mean, as a part of the curve
OUTLYING_PERCENT, FAR = 5, 1.6  # of an axis: so much at either end may be cut, where all would make it so many times as long
TRAINING_LOSS = "denoising loss (mse + vb)"
HELDOUT_LOSS = "denoising loss (mse)"


def training_loss(material: Material) -> list[Drawn]:
    """What was measured while training, without penalties: a moving mean over the raw values."""
    curves = [(shown, training_curve(shown)) for shown in material.shown]
    curves = [(shown, curve) for shown, curve in curves if len(curve)]
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
    curves = [(shown, heldout_curve(shown)) for shown in material.shown]
    curves = [(shown, curve) for shown, curve in curves if len(curve)]
    if not curves:
        return []
    loss = over_seeds(curves, ["images_seen"], "loss")
    difference = over_seeds(to_baseline(curves, ["images_seen"], material.baseline), ["images_seen"], "percent")
    figure = new_figure(10.6 if len(difference) else 7.6, 3.9)
    panels = figure.subplots(1, 2 if len(difference) else 1, squeeze=False)[0]
    draw_lines(panels[0], loss, material, "images_seen", "loss")
    panels[0].set_title("Held-out loss, mean over all timesteps")
    log_loss_axis(panels[0], HELDOUT_LOSS)
    if len(difference):
        draw_lines(panels[1], difference, material, "images_seen", "percent")
        name_difference(panels[1], material.baseline)
    for axes in panels:
        image_axis(axes, loss["images_seen"].max())
    legend_beside(figure, panels[0])
    caption = (
        "Denoising loss of the averaged weights on held-out images with fixed noise, the same for every method, as a mean over "
        f"all timesteps. {seeds_sentence(loss)}{difference_sentence(material, difference)}"
    )
    return [Drawn("heldout_loss", figure, both(loss, difference), caption)]


def to_baseline(curves: list[tuple[Shown, pd.DataFrame]], at: list[str], baseline: str) -> list[tuple[Shown, pd.DataFrame]]:
    """Each run's loss against that of the baseline with the same seed, in percent; without the baseline itself."""
    by_seed = {shown.run.config["seed"]: curve for shown, curve in curves if shown.label == baseline}
    found = []
    for shown, curve in curves:
        if shown.label != baseline and shown.run.config["seed"] in by_seed:
            matched = curve.merge(by_seed[shown.run.config["seed"]], on=at, suffixes=("", "_baseline"))
            found.append((shown, matched.assign(percent=100 * (matched["loss"] / matched["loss_baseline"] - 1))))
    return found


def name_difference(axes: Axes, baseline: str) -> None:
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


def difference_sentence(material: Material, difference: pd.DataFrame) -> str:
    if difference.empty:
        return ""
    sentence = f" Right: difference to {material.baseline} with the same seed, in percent of its loss"
    has_bands = difference["half_width"].notna().any()
    return sentence + ("; bands are 95% intervals of these paired differences." if has_bands else ".")


def both(loss: pd.DataFrame, difference: pd.DataFrame) -> pd.DataFrame:
    """The data of two panels in one table: which of them, and the value."""
    parts = [
        loss.rename(columns={"loss": "value"}).assign(panel="loss"),
        difference.rename(columns={"percent": "value"}).assign(panel="difference_percent"),
    ]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return table[["panel", *(name for name in table.columns if name != "panel")]]


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
