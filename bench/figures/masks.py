"""Which channels are on at each timestep? From the diagnostic `channel_mask`."""

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from bench.figures.diagnostics import having, mean_over, num_timesteps
from bench.figures.style import TIMESTEP, Drawn, Material, Shown, names_for, new_figure, spread
from bench.runs import Diagnostic

NUM_BLOCKS = 12
OFF = "#f2f2f2"


def channel_masks(material: Material) -> list[Drawn]:
    """(timestep, channel), or with a panel per block."""
    found = having(material, "channel_mask")
    names = names_for("channel_masks", [shown for shown, _ in found])
    return [_channel_masks(name, *each) for name, each in zip(names, found, strict=True)]


def _channel_masks(name: str, shown: Shown, diagnostic: Diagnostic) -> Drawn:
    kept = tuple(axis for axis in ("block", "timestep", "channel") if axis in diagnostic.axes)
    masks = mean_over(diagnostic.values.astype(np.float64), diagnostic.axes, kept)
    masks = masks.reshape(-1, *masks.shape[-2:]) > 0.5  # (block, timestep, channel)
    blocks = spread(len(masks), NUM_BLOCKS)
    columns = min(4, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = new_figure(6.4 if columns == 1 else 2.5 * columns + 1.6, 3.6 if rows == 1 else 2.1 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(blocks) :]:
        axes.axis("off")
    extent = (0, num_timesteps(shown), 0, masks.shape[2])
    look = {"cmap": ListedColormap([OFF, shown.colour]), "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    for block, axes in zip(blocks, grid.flat, strict=False):
        axes.imshow(masks[block].T, aspect="auto", origin="lower", extent=extent, **look)
        axes.grid(False)
        if len(masks) > 1:
            axes.set_title(f"block {block}")
    figure.supxlabel(TIMESTEP, fontsize=9)
    figure.supylabel("channel", fontsize=9)
    handles = [Patch(facecolor=shown.colour, label="on"), Patch(facecolor=OFF, edgecolor="#b0b0b0", label="off")]
    figure.legend(handles=handles, loc="outside right upper")
    figure.suptitle(f"{shown.label}: channels that are on at each timestep")
    share = masks.mean()
    of_blocks = "the same in every block" if len(masks) == 1 else f"{len(blocks)} of {len(masks)} blocks"
    caption = (
        f"{shown.label}: the channels that are on at each timestep, {of_blocks}. On average {share:.0%} of them are on. "
        f"Seed {shown.run.config['seed']}."
    )
    table = _table(shown.label, masks)
    return Drawn(name, figure, table[table["block"].isin(blocks)], caption)


def _table(label: str, masks: np.ndarray) -> pd.DataFrame:
    """Per block and timestep: how many channels are on, the first and the last (-1 where none is)."""
    block, timestep = np.indices(masks.shape[:2])
    count = masks.sum(axis=2)
    first = np.where(count > 0, masks.argmax(axis=2), -1)
    last = np.where(count > 0, masks.shape[2] - 1 - masks[:, :, ::-1].argmax(axis=2), -1)
    data = {"block": block, "timestep": timestep, "num_on": count, "first_on": first, "last_on": last}
    return pd.DataFrame({"label": label, **{name: values.ravel() for name, values in data.items()}})
