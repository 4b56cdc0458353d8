"""What came out: how good for how much compute, and what do the images look like?"""

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from bench.figures.style import Drawn, Material, Shown, new_figure, new_label
from bench.runs import read_samples
from bench.tables import shared_protocol
from bench.tidy import FLOOR, at_the_end, tidy

FIDS = (("fid_train", "FID (against training images)"), ("fid_heldout", "FID (against held-out images)"))
FRONT_LABEL = "Pareto front"
FLOOR_LABEL = "floor: real data against real data"
NUM_COLUMNS = 20
CELL_PIXELS = 64  # small images are enlarged to at least this, without smoothing
OFFSETS = ((8, 0), (-8, 0), (0, 11), (0, -11), (8, 9), (8, -9), (-8, 9), (-8, -9), (0, 20), (0, -20))  # points, the best first
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"))


def fid_vs_flops(material: Material) -> list[Drawn]:
    """A panel per FID: every run, the front of those that no other beats in both, and the floor of real data."""
    frame = at_the_end(
        tidy([shown.run for shown in material.shown if shown.run.evaluations and shown.run.summary], material.floor)
    )
    if frame[frame["run"] != FLOOR].empty:
        return []
    frame = frame[frame["protocol_hash"].isin(["", shared_protocol(frame)])]
    wide = frame.pivot_table(index="run", columns="metric", values="value").astype("float64")
    panels = [
        (metric, title) for metric, title in FIDS if metric in wide and wide[metric].drop(FLOOR, errors="ignore").notna().any()
    ]
    if "train_flops" not in wide or not panels:
        return []
    divisor, prefix = next(((size, p) for size, p in PREFIXES if wide["train_flops"].max() >= size), (1.0, ""))
    shown = [each for each in material.shown if each.run.run_id in wide.index]
    protocol = json.loads(frame.loc[frame["protocol_hash"] != "", "protocol"].iloc[0])
    count = int(frame["n"].dropna().iloc[0])
    figure = new_figure(5.2 * len(panels), 4.2)
    points = wide.loc[[each.run.run_id for each in shown]]
    for axes, (metric, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        floor = float(wide[metric][FLOOR]) if FLOOR in wide.index else float("nan")
        _scatter(axes, shown, np.stack([points["train_flops"] / divisor, points[metric]], axis=1), floor)
        axes.set_xlabel(f"training compute ({prefix}FLOPs)")
        axes.set_ylabel(f"{title}, lower is better")
    steps = f", sampling steps {protocol['steps']}" if "steps" in protocol else ""
    figure.suptitle(f"Quality against training compute (n = {count}{steps})")
    legend = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    several_seeds = len({each.label for each in shown}) < len(shown)
    if not several_seeds:
        _place_labels(figure, shown)
        legend = {label: handle for label, handle in legend.items() if label in (FRONT_LABEL, FLOOR_LABEL)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4)
    data = wide.drop(FLOOR, errors="ignore")[["train_flops", *(metric for metric, _ in panels)]].reset_index()
    data.insert(0, "label", data["run"].map({each.run.run_id: each.label for each in shown}))
    return [Drawn("fid_vs_flops", figure, data)]


def samples(material: Material) -> list[Drawn]:
    """A row per method: the images of the same indices, so of the same class and noise; real images last."""
    rows = [(shown.label, read_samples(shown.run.path)) for shown in material.one_per_label()]
    found = [(label, images) for label, images in rows if images is not None]
    if not found:
        return []
    if material.real_images is not None:
        found.append(("Real data", material.real_images))
    num_classes = len(material.class_names)
    whole_classes = NUM_COLUMNS // num_classes * num_classes if num_classes else 0  # each class equally often, if there is room
    columns = min(whole_classes or NUM_COLUMNS, *(len(images) for _, images in found))
    figure = new_figure(0.46 * columns + 1.5, 0.46 * len(found) + 0.75)
    axes = figure.subplots()
    grid, centres_x, centres_y = _mosaic([images[:columns] for _, images in found])
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks(centres_y, [label for label, _ in found], fontsize=9)
    axes.set_xticks(centres_x, [material.class_names[i % num_classes] if num_classes else "" for i in range(columns)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    axes.grid(False)
    figure.suptitle("Samples: same class and same noise in each column")
    return [Drawn("samples", figure, None)]


def _mosaic(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of images (columns, H, W, C) uint8 -> one image with white gaps, and the pixels of its columns' and rows' centres."""
    factor = max(1, CELL_PIXELS // rows[0].shape[1])
    enlarged = [row.repeat(factor, axis=1).repeat(factor, axis=2) for row in rows]
    height, width = enlarged[0].shape[1:3]
    gap = max(1, width // 20)
    padding = ((0, 0), (0, gap), (0, gap), (0, 0))
    lines = [np.concatenate(list(np.pad(row, padding, constant_values=255)), axis=1) for row in enlarged]
    whole = np.concatenate(lines)[:-gap, :-gap]
    centres_x = np.arange(len(rows[0])) * (width + gap) + width / 2 - 0.5
    centres_y = np.arange(len(rows)) * (height + gap) + height / 2 - 0.5
    return whole[..., 0] if whole.shape[-1] == 1 else whole, centres_x, centres_y


def pareto_front(points: np.ndarray) -> np.ndarray:
    """points (n, 2), less is better in both -> the indices of those that no other beats, by the first coordinate."""
    front: list[int] = []
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if np.isfinite(points[i]).all() and (not front or points[i, 1] < points[front[-1], 1]):
            front.append(int(i))
    return np.array(front, dtype=int)


def _scatter(axes: Axes, shown: Sequence[Shown], points: np.ndarray, floor: float) -> None:
    front = points[pareto_front(points)]
    axes.step(front[:, 0], front[:, 1], where="post", color="#9a9a9a", linewidth=1.2, zorder=1, label=FRONT_LABEL)
    for each, (x, y) in zip(shown, points, strict=True):
        axes.scatter(
            x,
            y,
            s=60,
            color=each.colour,
            label=new_label(axes, each),
            marker=each.marker,
            edgecolor="white",
            linewidth=0.5,
            zorder=3,
        )
    low, high = np.nanmin(points[:, 0]), np.nanmax(points[:, 0])
    if high > 8 * low:
        axes.set_xscale("log")
    else:
        axes.set_xlim(max(0, low - 0.15 * (high - low or high)), high + 0.3 * (high - low or high))
    axes.set_ylim(0, 1.12 * np.nanmax(points[:, 1]))
    if np.isfinite(floor):
        axes.axhline(floor, color="black", linestyle="--", linewidth=1.0, zorder=1, label=FLOOR_LABEL)
        axes.annotate(
            f"{floor:.3g}",
            (1, floor),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
        )


def _place_labels(figure: Figure, shown: Sequence[Shown]) -> None:
    """Write each label, once, beside its point where it covers no other label and no point; a later one gives way."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        places = [np.ma.filled(np.ma.asarray(dot.get_offsets(), dtype=float), np.nan)[0] for dot in axes.collections]
        pixels = [axes.transData.transform(place) for place in places]
        taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in pixels if np.isfinite([x, y]).all()]
        for line in axes.lines:
            path = line.get_transform().transform_path(line.get_path()).vertices
            taken += [Bbox([a, b]).padded(2) for a, b in pairwise(_corners(np.asarray(path)))]
        labelled: set[str] = set()
        for each, (x, y) in zip(shown, places, strict=True):
            if each.label in labelled or not np.isfinite([x, y]).all():
                continue
            labelled.add(each.label)
            text = axes.annotate(each.label, (x, y), xytext=OFFSETS[0], textcoords="offset points", fontsize=8, va="center")
            text.set_in_layout(False)
            badness = [_covered(text, offset, axes.get_window_extent(), taken) for offset in OFFSETS]
            _put(text, OFFSETS[int(np.argmin(badness))])
            taken.append(text.get_window_extent())


def _corners(path: np.ndarray) -> np.ndarray:
    """A path of steps with its corners (n, 2): every piece is then level or upright, and its box is thin."""
    corners = np.stack([path[1:, 0], path[:-1, 1]], axis=1)
    return np.concatenate([np.stack([path[:-1], corners], axis=1).reshape(-1, 2), path[-1:]])


def _put(text: Annotation, offset: tuple[float, float]) -> None:
    text.xyann = offset
    text.set_horizontalalignment("left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")


def _covered(text: Annotation, offset: tuple[float, float], frame: Bbox, taken: Sequence[Bbox]) -> float:
    """How many square pixels of text would lie over something else, or outside the frame."""
    _put(text, offset)
    box = text.get_window_extent()
    overlaps = [Bbox.intersection(box, other) for other in taken]
    inside = Bbox.intersection(box, frame)
    area = sum(overlap.width * overlap.height for overlap in overlaps if overlap is not None)
    return area + 2 * (box.width * box.height - (inside.width * inside.height if inside is not None else 0))
