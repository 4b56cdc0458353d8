"""What happens inside the methods: which bases an expert mixes, which experts a block uses, which channels are on?

Every figure is keyed on the name of a diagnostic and its axes.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.figures.style import COLOURS, LINES, SEQUENTIAL, Drawn, Material, Shown, image_axis, names_for, new_figure
from bench.runs import Diagnostic

DEAD_SHARE = 0.01  # an expert with less than this part of an equal share is dead
NUM_ANNOTATED = 80  # cells; with more, numbers would not be readable


def mixing_coefficients(material: Material) -> list[Drawn]:
    """(expert, basis) at the end of training, and over training; a block axis is averaged over."""
    having = _having(material, "mixing_coefficients")
    drawn = []
    for name, (shown, diagnostic) in zip(names_for("mixing_coefficients", [shown for shown, _ in having]), having, strict=True):
        final = _mean_over(diagnostic.values, diagnostic.axes, ("expert", "basis"))
        over_training = diagnostic.history is not None and len(diagnostic.history) > 1
        num_experts = len(final)
        columns = min(4, num_experts)
        rows = -(-num_experts // columns)
        height = max(3.2, 0.34 * num_experts + 1.2, 1.35 * rows + 1.0 if over_training else 0)
        figure = new_figure(11.0 if over_training else 5.0, min(height, 14))
        left, right = _side_by_side(figure, (1, 2.1)) if over_training else (figure, None)
        _mixing_heatmap(left, final, shown)
        if right is not None and diagnostic.history is not None and diagnostic.images_seen is not None:
            history = _mean_over(diagnostic.history, ("point", *diagnostic.axes), ("point", "expert", "basis"))
            _mixing_history(right, history, diagnostic.images_seen, rows, columns)
        averaged = " (mean over blocks)" if "block" in diagnostic.axes else ""
        figure.suptitle(f"{shown.label}: mixing coefficients{averaged}")
        expert, basis = np.indices(final.shape)
        data = {"label": shown.label, "expert": expert.ravel(), "basis": basis.ravel(), "coefficient": final.ravel()}
        drawn.append(Drawn(name, figure, pd.DataFrame(data)))
    return drawn


def routing(material: Material) -> list[Drawn]:
    """(block, timestep, expert): a heatmap per expert, the evenness of the load per block, and which experts are dead."""
    having = [
        (shown, diagnostic)
        for shown, diagnostic in _having(material, "routing")
        if set(diagnostic.axes) == {"block", "timestep", "expert"}
    ]
    drawn = []
    for name, (shown, diagnostic) in zip(names_for("routing", [shown for shown, _ in having]), having, strict=True):
        shares = _mean_over(diagnostic.values, diagnostic.axes, ("block", "timestep", "expert"))
        usage = shown.run.diagnostics.get("expert_usage")
        load = _mean_over(usage.values, usage.axes, ("block", "expert")) if usage else shares.mean(axis=1)
        num_blocks, _, num_experts = shares.shape
        columns = min(4, num_experts)
        rows = -(-num_experts // columns)
        figure = new_figure(2.3 * columns + 3.4, min(max(1.05 + 0.17 * num_blocks, 1.7) * rows + 1.0, 14))
        left, right = _side_by_side(figure, (2.3 * columns + 0.9, 2.5))
        _routing_heatmaps(left, shares, rows, columns, _num_timesteps(shown))
        entropy = load_entropy(load)
        dead = dead_experts(load)
        _entropy_bars(right, entropy, dead)
        figure.suptitle(f"{shown.label}: routing by block and timestep")
        block, expert = np.indices(load.shape)
        data = {"label": shown.label, "block": block.ravel(), "expert": expert.ravel(), "load": load.ravel()}
        table = pd.DataFrame({**data, "block_load_entropy": entropy[block.ravel()], "dead": dead[block, expert].ravel()})
        drawn.append(Drawn(name, figure, table))
    return drawn


def channel_masks(material: Material) -> list[Drawn]:
    """(timestep, channel), or one panel per block: which channels are on."""
    having = _having(material, "channel_mask")
    drawn = []
    for name, (shown, diagnostic) in zip(names_for("channel_masks", [shown for shown, _ in having]), having, strict=True):
        axes_names = tuple(axis for axis in ("block", "timestep", "channel") if axis in diagnostic.axes)
        masks = _mean_over(diagnostic.values.astype(np.float64), diagnostic.axes, axes_names)
        masks = masks.reshape(-1, *masks.shape[-2:]) > 0.5  # (panel, timestep, channel)
        columns = min(4, len(masks))
        rows = -(-len(masks) // columns)
        figure = new_figure(6.4 if columns == 1 else 2.5 * columns + 1.6, 3.6 if rows == 1 else 2.1 * rows + 0.8)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(masks):
                axes.axis("off")
                continue
            extent = (0, _num_timesteps(shown), 0, masks.shape[2])
            colours = ListedColormap(["#f2f2f2", shown.colour])
            axes.imshow(
                masks[place].T,
                aspect="auto",
                origin="lower",
                extent=extent,
                cmap=colours,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axes.grid(False)
            if len(masks) > 1:
                axes.set_title(f"block {place}")
        figure.supxlabel("timestep (0: almost no noise)", fontsize=9)
        figure.supylabel("channel", fontsize=9)
        handles = [Patch(facecolor=shown.colour, label="on"), Patch(facecolor="#f2f2f2", edgecolor="#b0b0b0", label="off")]
        figure.legend(handles=handles, loc="outside right upper")
        figure.suptitle(f"{shown.label}: channels that are on at each timestep")
        drawn.append(Drawn(name, figure, _mask_table(shown.label, masks)))
    return drawn


def load_entropy(load: np.ndarray) -> np.ndarray:
    """(block, expert) loads -> (block,) entropies over the highest possible: 1 is an even load, 0 one expert for everything."""
    shares = load / np.maximum(load.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return -(shares * logs).sum(axis=1) / max(np.log(load.shape[1]), np.finfo(float).tiny)


def dead_experts(load: np.ndarray) -> np.ndarray:
    """(block, expert) bool: less than DEAD_SHARE of an equal share."""
    shares = load / np.maximum(load.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return shares < DEAD_SHARE / load.shape[1]


def _side_by_side(figure: Figure, widths: tuple[float, float]) -> tuple[SubFigure, SubFigure]:
    parts = figure.subfigures(1, 2, width_ratios=widths, squeeze=False)
    return parts[0, 0], parts[0, 1]


def _mixing_heatmap(figure: FigureBase, final: np.ndarray, shown: Shown) -> None:
    axes = figure.subplots()
    between = final.min() >= 0 and final.max() <= 1
    most = 1.0 if between else float(np.abs(final).max())
    colours = {"cmap": SEQUENTIAL, "vmin": 0.0} if between else {"cmap": "PuOr", "vmin": -most}
    annotations = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 7.5}} if final.size <= NUM_ANNOTATED else {}
    sns.heatmap(final, ax=axes, vmax=most, linewidths=0.5, cbar_kws={"label": "coefficient"}, **colours, **annotations)
    intervals = shown.run.diagnostics.get("intervals")
    if intervals is not None and len(intervals.values) == len(final):
        axes.set_yticks(np.arange(len(final)) + 0.5, [f"{i}: {a}–{b - 1}" for i, (a, b) in enumerate(intervals.values)])
        axes.set_ylabel("expert: its timesteps")
    else:
        axes.set_ylabel("expert")
    axes.tick_params(axis="y", rotation=0)
    axes.set_xlabel("basis")
    axes.set_title("at the end of training")


def _mixing_history(figure: FigureBase, history: np.ndarray, images_seen: np.ndarray, rows: int, columns: int) -> None:
    """history (point, expert, basis): a panel per expert, a line per basis."""
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    num_bases = history.shape[2]
    for place, axes in enumerate(grid.flat):
        if place >= history.shape[1]:
            axes.axis("off")
            continue
        for basis in range(num_bases):
            look = {"color": COLOURS[basis % len(COLOURS)], "linestyle": LINES[basis % len(LINES)], "linewidth": 1.4}
            axes.plot(images_seen, history[:, place, basis], label=f"basis {basis}", **look)
        axes.set_title(f"expert {place}", fontsize=8.5)
        image_axis(axes, images_seen.max())
        axes.xaxis.set_major_locator(MaxNLocator(3))
        label = axes.get_xlabel()
        axes.set_xlabel("")
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("coefficient", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=3)


def _routing_heatmaps(figure: FigureBase, shares: np.ndarray, rows: int, columns: int, num_timesteps: int) -> None:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    num_blocks = shares.shape[0]
    image = None
    for place, axes in enumerate(grid.flat):
        if place >= shares.shape[2]:
            axes.axis("off")
            continue
        look = {"cmap": SEQUENTIAL, "vmin": 0.0, "vmax": float(shares.max()), "interpolation": "nearest"}
        extent = (0, num_timesteps, num_blocks - 0.5, -0.5)
        image = axes.imshow(shares[:, :, place], aspect="auto", extent=extent, **look)
        axes.grid(False)
        axes.set_title(f"expert {place}", fontsize=8.5)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("timestep (0: almost no noise)", fontsize=9)
    figure.supylabel("block", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=grid, label="routing weight (share)", fraction=0.05, aspect=30)


def _entropy_bars(figure: FigureBase, entropy: np.ndarray, dead: np.ndarray) -> None:
    axes = figure.subplots()
    blocks = np.arange(len(entropy))
    axes.barh(blocks, entropy, color="#c4c4c4", height=0.7)
    for block in blocks:
        names = ", ".join(str(expert) for expert in np.flatnonzero(dead[block]))
        if names:
            axes.text(0.03, int(block), f"dead: {names}", va="center", fontsize=7.5, weight="bold")
    axes.set_ylim(len(entropy) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(False, axis="y")
    axes.set_ylabel("block")
    axes.set_xlabel("load entropy (1: even)")
    axes.set_title("dead experts: none" if not dead.any() else f"dead experts: {dead.sum()} of {dead.size}")


def _mask_table(label: str, masks: np.ndarray) -> pd.DataFrame:
    """Per panel and timestep: how many channels are on, the first and the last (-1 where none is)."""
    panel, timestep = np.indices(masks.shape[:2])
    count = masks.sum(axis=2)
    first = np.where(count > 0, masks.argmax(axis=2), -1)
    last = np.where(count > 0, masks.shape[2] - 1 - masks[:, :, ::-1].argmax(axis=2), -1)
    data = {"panel": panel, "timestep": timestep, "num_on": count, "first_on": first, "last_on": last}
    return pd.DataFrame({"label": label, **{name: values.ravel() for name, values in data.items()}})


def _having(material: Material, name: str) -> list[tuple[Shown, Diagnostic]]:
    found = [(shown, shown.run.diagnostics.get(name)) for shown in material.one_per_label()]
    return [(shown, diagnostic) for shown, diagnostic in found if diagnostic is not None]


def _mean_over(values: np.ndarray, axes: tuple[str, ...], kept: tuple[str, ...]) -> np.ndarray:
    """The array with the axes `kept`, in this order, averaged over all others."""
    others = tuple(i for i, axis in enumerate(axes) if axis not in kept)
    left = [axis for axis in axes if axis in kept]
    averaged: np.ndarray = values.mean(axis=others) if others else values
    return averaged.transpose([left.index(axis) for axis in kept])


def _num_timesteps(shown: Shown) -> int:
    return int(shown.run.config["diffusion"]["num_timesteps"])
