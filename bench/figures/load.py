"""How evenly is the work spread over the experts, and which of them are dead? From the diagnostic `expert_usage`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.figures.diagnostics import mean_over
from bench.figures.seeds import draw_lines, over_seeds, seeds_sentence
from bench.figures.style import Drawn, Material, Shown, image_axis, legend_beside, new_figure, short_label

DEAD_SHARE = 0.01  # an expert with less than this part of an equal share is dead
DEAD = f"less than {DEAD_SHARE:.0%} of an equal share"


def expert_load(material: Material) -> list[Drawn]:
    """The evenness of the load by block and over training, and how many experts are dead."""
    by_block = [(shown, _by_block(shown)) for shown in material.shown if "expert_usage" in shown.run.diagnostics]
    if not by_block:
        return []
    history = [(shown, _over_training(shown)) for shown, _ in by_block]
    history = [(shown, curve) for shown, curve in history if len(curve)]
    blocks, training = over_seeds(by_block, ["block"], "entropy"), over_seeds(history, ["images_seen"], "entropy")
    dead = pd.DataFrame([_dead_of(shown) for shown, _ in by_block])
    any_dead = bool(dead["dead_percent"].any())
    num_panels = 1 + bool(len(training)) + any_dead
    figure = new_figure(3.6 * num_panels + 2.4, 3.4)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    draw_lines(panels[0], blocks, material, "block", "entropy", marker="o", markersize=3)
    panels[0].set_title("Load entropy by block, at the end")
    panels[0].set_xlabel("block")
    panels[0].xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if len(training):
        draw_lines(panels[1], training, material, "images_seen", "entropy")
        panels[1].set_title("over training, mean over blocks")
        image_axis(panels[1], training["images_seen"].max())
    for axes in panels[: num_panels - any_dead]:
        axes.set_ylabel("load entropy (1: even)")
        axes.set_ylim(0, 1.03)
    if any_dead:
        _dead_bars(panels[-1], dead, [shown for shown, _ in by_block])
    legend_beside(figure, panels[0])
    parts = [(blocks, "by_block", "entropy"), (training, "over_training", "entropy"), (dead, "dead_experts", "dead_percent")]
    table = pd.concat([part.rename(columns={value: "value"}).assign(panel=panel) for part, panel, value in parts if len(part)])
    caption = (
        "How evenly each block's work is spread over its experts: the entropy of their loads over the highest possible (1: even, "
        f"0: one expert does all). {seeds_sentence(blocks)} "
        + (f"Dead experts get {DEAD}; a point for each seed." if any_dead else f"No expert is dead, with {DEAD}.")
    )
    columns = ["panel", "label", "seeds", "block", "images_seen", "value", "half_width"]
    return [Drawn("expert_load", figure, table.reindex(columns=columns), caption)]


def load_entropy(load: np.ndarray) -> np.ndarray:
    """(..., expert) loads -> (...) entropies over the highest possible: 1 is an even load, 0 one expert for everything."""
    shares = load / np.maximum(load.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.asarray(-(shares * logs).sum(axis=-1) / max(np.log(load.shape[-1]), np.finfo(float).tiny))


def dead_experts(load: np.ndarray) -> np.ndarray:
    """(block, expert) bool: less than DEAD_SHARE of an equal share."""
    shares = load / np.maximum(load.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return shares < DEAD_SHARE / load.shape[1]


def _load(shown: Shown) -> np.ndarray:
    usage = shown.run.diagnostics["expert_usage"]
    return mean_over(usage.values, usage.axes, ("block", "expert"))


def _by_block(shown: Shown) -> pd.DataFrame:
    entropy = load_entropy(_load(shown))
    return pd.DataFrame({"block": np.arange(len(entropy)), "entropy": entropy})


def _over_training(shown: Shown) -> pd.DataFrame:
    usage = shown.run.diagnostics["expert_usage"]
    if usage.history is None or usage.images_seen is None or len(usage.history) < 2:
        return pd.DataFrame()
    load = mean_over(usage.history, ("point", *usage.axes), ("point", "block", "expert"))
    return pd.DataFrame({"images_seen": usage.images_seen, "entropy": load_entropy(load).mean(axis=1)})


def _dead_of(shown: Shown) -> dict[str, object]:
    dead = dead_experts(_load(shown))
    return {"label": shown.label, "seeds": str(shown.run.config["seed"]), "dead_percent": 100 * dead.mean(), "half_width": np.nan}


def _dead_bars(axes: Axes, dead: pd.DataFrame, shown: Sequence[Shown]) -> None:
    looks = {each.label: each for each in shown}
    for row, (label, each) in enumerate(looks.items()):
        percent = dead.loc[dead["label"] == label, "dead_percent"]
        axes.barh(row, percent.mean(), color=each.colour, alpha=0.45, height=0.55)
        axes.plot(percent, [row] * len(percent), linestyle="", marker=each.marker, color=each.colour, markersize=5, clip_on=False)
    axes.set_yticks(range(len(looks)), [short_label(label, 24) for label in looks])
    axes.set_ylim(len(looks) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * dead["dead_percent"].max())
    axes.grid(False, axis="y")
    axes.set_xlabel("share of all blocks' experts (%)")
    axes.set_title("Dead experts")
