"""How well do the methods denoise: over training, over timesteps, and each of their experts?"""

import numpy as np
import pandas as pd
from matplotlib import colormaps

from bench.figures.style import (
    SEQUENTIAL,
    Drawn,
    Material,
    Shown,
    image_axis,
    legend_beside,
    log_loss_axis,
    names_for,
    new_figure,
    new_label,
)

SMOOTHING = 0.04  # half the width of the moving mean, as a part of the curve
TRAINING_LOSS = "denoising loss (mse + vb)"
HELDOUT_LOSS = "denoising loss (mse)"


def training_loss(material: Material) -> list[Drawn]:
    """What was measured while training, without penalties: a moving mean over the raw values."""
    curves = [(shown, training_curve(shown)) for shown in material.shown]
    curves = [(shown, curve) for shown, curve in curves if len(curve)]
    if not curves:
        return []
    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    for shown, curve in curves:
        axes.plot(curve["images_seen"], curve["loss"], color=shown.colour, alpha=0.18, linewidth=0.7)
    for shown, curve in curves:
        axes.plot(curve["images_seen"], curve["smoothed"], color=shown.colour, linestyle=shown.line, label=new_label(axes, shown))
    axes.set_title("Training loss without penalties (moving mean; raw values pale)")
    image_axis(axes, max(curve["images_seen"].max() for _, curve in curves))
    log_loss_axis(axes, TRAINING_LOSS)
    legend_beside(figure, axes)
    return [Drawn("training_loss", figure, _table(curves))]


def heldout_loss(material: Material) -> list[Drawn]:
    """The mean over all timesteps, on fixed images and noise."""
    curves = []
    for shown in material.shown:
        rows = _rows(shown, "heldout")
        if len(rows):
            rows = rows.assign(width=rows["stop"] - rows["start"], weighted=rows["loss"] * (rows["stop"] - rows["start"]))
            sums = rows.groupby("images_seen", as_index=False)[["weighted", "width"]].sum()
            curves.append((shown, sums.assign(loss=sums["weighted"] / sums["width"])[["images_seen", "loss"]]))
    if not curves:
        return []
    figure = new_figure(10.2, 3.9)
    left, right = figure.subplots(1, 2)
    first = curves[0][0].label
    reference = pd.concat([curve for shown, curve in curves if shown.label == first]).groupby("images_seen")["loss"].mean()
    for shown, curve in curves:
        look = {"color": shown.colour, "linestyle": shown.line, "marker": shown.marker, "markersize": 4}
        left.plot(curve["images_seen"], curve["loss"], label=new_label(left, shown), **look)
        percent = 100 * (curve["loss"] / curve["images_seen"].map(reference) - 1)
        right.plot(curve["images_seen"], percent, **look)
    left.set_title("Held-out loss, mean over all timesteps")
    log_loss_axis(left, HELDOUT_LOSS)
    right.set_title(f"Difference to {first} (below 0: better)")
    right.set_ylabel("difference (%)")
    for axes in (left, right):
        image_axis(axes, max(curve["images_seen"].max() for _, curve in curves))
    legend_beside(figure, left)
    return [Drawn("heldout_loss", figure, _table(curves))]


def loss_per_timestep(material: Material) -> list[Drawn]:
    """The held-out loss at the end of training, per bin of timesteps, and how it differs from that of the first method."""
    finals: dict[Shown, pd.DataFrame] = {}
    for shown in material.one_per_label():
        seeds = [final_heldout(other) for other in material.shown if other.label == shown.label]
        measured = [rows for rows in seeds if len(rows)]
        if measured:
            finals[shown] = pd.DataFrame(pd.concat(measured).groupby(["bin", "start", "stop"])["loss"].mean().reset_index())
    if not finals:
        return []
    figure = new_figure(10.2, 3.9)
    left, right = figure.subplots(1, 2)
    first, reference = next(iter(finals.items()))
    tables = []
    for shown, rows in finals.items():
        middle = (rows["start"] + rows["stop"]) / 2
        look = {"color": shown.colour, "linestyle": shown.line, "marker": shown.marker, "markersize": 4, "label": shown.label}
        left.plot(middle, rows["loss"], **look)
        matched = rows.merge(reference, on=["bin", "start", "stop"], suffixes=("", "_first"), how="left")
        percent = 100 * (matched["loss"] / matched["loss_first"] - 1)
        right.plot(middle, percent, **look)
        tables.append(rows.assign(label=shown.label, difference_percent=percent))
    left.set_title("Held-out loss per timestep, at the end")
    log_loss_axis(left, HELDOUT_LOSS)
    right.set_title(f"Difference to {first.label} (below 0: better)")
    right.set_ylabel("difference (%)")
    for axes in (left, right):
        axes.set_xlabel("timestep (0: almost no noise)")
        axes.set_xlim(0, max(rows["stop"].max() for rows in finals.values()))
    legend_beside(figure, left)
    return [
        Drawn("loss_per_timestep", figure, pd.concat(tables)[["label", "bin", "start", "stop", "loss", "difference_percent"]])
    ]


def per_expert_loss(material: Material) -> list[Drawn]:
    """For each method that splits the schedule: the training loss of every interval, over training and over timesteps."""
    split = [shown for shown in material.one_per_label() if _num_intervals(shown) > 1]
    drawn = []
    for name, shown in zip(names_for("per_expert_loss", split), split, strict=True):
        rows = _with_denoising_loss(_rows(shown, "train"))
        figure = new_figure(9.6, 3.6)
        left, right = figure.subplots(1, 2, sharey=True)
        indices = sorted(rows["interval"].unique())
        tables = []
        for place, index in enumerate(indices):
            colour = colormaps[SEQUENTIAL](0.92 * place / max(len(indices) - 1, 1))
            own = rows[rows["interval"] == index].sort_values("step")
            smoothed = moving_mean(own["denoising"].to_numpy(), own["num_steps"].to_numpy())
            left.plot(own["images_seen"], smoothed, color=colour)
            start, stop, last = own["start"].iloc[0], own["stop"].iloc[0], smoothed[-1]
            right.hlines(last, start, stop, color=colour, linewidth=4)
            right.annotate(
                str(int(index)), ((start + stop) / 2, last), (0, 5), textcoords="offset points", ha="center", fontsize=8
            )
            tables.append(own.assign(label=shown.label, smoothed=smoothed))
        figure.suptitle(f"{shown.label}: training loss of each interval of timesteps")
        image_axis(left, rows["images_seen"].max())
        left.set_title("over training (colours as on the right)")
        log_loss_axis(left, TRAINING_LOSS)
        right.set_title("at the end, by interval (numbered)")
        right.set_xlabel("timestep (0: almost no noise)")
        right.set_xlim(0, rows["stop"].max())
        columns = ["label", "interval", "start", "stop", "images_seen", "denoising", "smoothed"]
        drawn.append(Drawn(name, figure, pd.concat(tables)[columns]))
    return drawn


def training_curve(shown: Shown) -> pd.DataFrame:
    """images_seen, loss (over all intervals of a window) and smoothed."""
    rows = _rows(shown, "train")
    if rows.empty:
        return rows
    rows = _with_denoising_loss(rows)
    rows = rows.assign(weighted=rows["denoising"] * rows["num_steps"])
    sums = rows.groupby("images_seen", as_index=False)[["weighted", "num_steps"]].sum()
    loss = sums["weighted"] / sums["num_steps"]
    smoothed = moving_mean(loss.to_numpy(), sums["num_steps"].to_numpy())
    return pd.DataFrame({"images_seen": sums["images_seen"], "loss": loss, "smoothed": smoothed})


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


def final_heldout(shown: Shown) -> pd.DataFrame:
    """The rows of the last measuring point."""
    rows = _rows(shown, "heldout")
    return rows[rows["step"] == rows["step"].max()] if len(rows) else rows


def _num_intervals(shown: Shown) -> int:
    rows = _rows(shown, "train")
    return rows["interval"].nunique() if len(rows) else 0


def _rows(shown: Shown, kind: str) -> pd.DataFrame:
    metrics = shown.run.metrics
    return metrics[metrics["kind"] == kind] if len(metrics) else metrics


def _with_denoising_loss(rows: pd.DataFrame) -> pd.DataFrame:
    variational = rows["vb"].fillna(0.0) if "vb" in rows else 0.0
    return rows.assign(denoising=rows["mse"] + variational)


def _table(curves: list[tuple[Shown, pd.DataFrame]]) -> pd.DataFrame:
    parts = [curve.assign(label=shown.label, seed=shown.run.config["seed"]) for shown, curve in curves]
    table = pd.concat(parts)
    return table[["label", "seed", *(name for name in table.columns if name not in ("label", "seed"))]]
