"""What do the images look like, and how do they come out of noise?"""

from collections.abc import Sequence

import numpy as np

from bench.arrays import Trajectory, read_samples, read_trajectory
from bench.figures.style import Drawn, Material, new_figure, short_label, spread
from bench.runs import LATENTS

NUM_COLUMNS = 20  # samples
NUM_FRAMES = 11
NUM_ROWS = 12  # of trajectories; with more methods than half of them, each shows one image instead of two
CELL_PIXELS = 64  # small images are enlarged to at least this, without smoothing
CELL_INCHES = 0.46
GROUP_GAP = 6  # times that between images
ROW_WIDTH = 26  # letters of a row's label


def samples(material: Material) -> list[Drawn]:
    """A row per method: the images of the same indices, so of the same class and noise; real images last."""
    rows = [(shown.label, read_samples(shown.run.path)) for shown in material.one_per_label()]
    found = [(label, images) for label, images in rows if images is not None]
    if not found:
        return []
    with_real = material.real_images is not None
    if material.real_images is not None:
        found.append(("Real data", material.real_images))
    num_classes = len(material.class_names)
    whole_classes = NUM_COLUMNS // num_classes * num_classes if num_classes else 0  # each class equally often, if there is room
    columns = min(whole_classes or NUM_COLUMNS, *(len(images) for _, images in found))
    labels = [short_label(label, ROW_WIDTH) for label, _ in found]
    figure = new_figure(CELL_INCHES * columns + _inches(labels), CELL_INCHES * len(found) + 0.75)
    axes = figure.subplots()
    grid, centres_x, centres_y = mosaic([images[:columns] for _, images in found])
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks(centres_y, labels, fontsize=9)
    axes.set_xticks(centres_x, [material.class_names[i % num_classes] if num_classes else "" for i in range(columns)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    axes.grid(False)
    figure.suptitle("Samples: same class and same noise in each column")
    caption = (
        f"The first {columns} samples of each method, not selected: a column has the same class and starts from the same noise."
        f"{' Last row: held-out images of these classes.' if with_real else ''} First seed of each method."
    )
    return [Drawn("samples", figure, None, caption)]


def trajectories(material: Material) -> list[Drawn]:
    """Rows: methods; columns: timesteps. Left the noisy images, right the clean images that the network sees in them.

    Methods that sample at other timesteps than the first come in a figure of their own.
    """
    by_times: dict[bytes, list[tuple[str, Trajectory]]] = {}
    for shown in material.one_per_label():
        trajectory = read_trajectory(shown.run.path)
        if trajectory is not None and trajectory.images.shape[2] in (1, 3):  # others are no pixels
            by_times.setdefault(trajectory.times.tobytes(), []).append((shown.label, trajectory))
    names = ["trajectories", *(f"trajectories_{i}" for i in range(2, len(by_times) + 1))]
    return [_trajectories(name, found, material) for name, found in zip(names, by_times.values(), strict=False)]


def mosaic(rows: Sequence[np.ndarray], group: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of images (columns, H, W, C) uint8 -> one image with white gaps, wider ones between groups of so many rows; and the
    pixels of its columns' and groups' centres.
    """
    factor = max(1, CELL_PIXELS // rows[0].shape[1])
    enlarged = [row.repeat(factor, axis=1).repeat(factor, axis=2) for row in rows]
    height, width = enlarged[0].shape[1:3]
    gap = max(1, width // 20)
    below = [gap * (GROUP_GAP if group > 1 and (row + 1) % group == 0 else 1) for row in range(len(rows))]
    lines = [
        np.concatenate(list(np.pad(row, ((0, 0), (0, gap_below), (0, gap), (0, 0)), constant_values=255)), axis=1)
        for row, gap_below in zip(enlarged, below, strict=True)
    ]
    whole = np.concatenate(lines)[: -below[-1], :-gap]
    centres_x = np.arange(len(rows[0])) * (width + gap) + width / 2 - 0.5
    tops = np.cumsum([0, *(height + gap_below for gap_below in below[:-1])])
    centres_y = (tops + height / 2 - 0.5).reshape(-1, group).mean(axis=1)
    return whole[..., 0] if whole.shape[-1] == 1 else whole, centres_x, centres_y


def _trajectories(name: str, found: list[tuple[str, Trajectory]], material: Material) -> Drawn:
    first = found[0][1]
    frames = spread(len(first.times), NUM_FRAMES)
    num_images = min(2 if 2 * len(found) <= NUM_ROWS else 1, *(len(each.labels) for _, each in found))
    labels = [short_label(label, ROW_WIDTH) for label, _ in found]
    gaps = 0.05 * GROUP_GAP * (len(found) - 1) if num_images > 1 else 0.0  # in images
    height = CELL_INCHES * (len(found) * num_images + gaps) + 0.9
    figure = new_figure(2 * CELL_INCHES * len(frames) + _inches(labels) + 0.4, height)
    panels = figure.subplots(1, 2, sharey=True)
    sides = (("noisy image, as the network is given it", "images"), ("clean image that the network predicts", "predicted"))
    for axes, (title, kind) in zip(panels, sides, strict=True):
        rows = [
            getattr(each, kind)[frames, image].transpose(0, 2, 3, 1)  # (frame, H, W, C)
            for _, each in found
            for image in range(num_images)
        ]
        grid, centres_x, centres_y = mosaic(rows, num_images)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks(centres_x, [_time(first.times[frame]) for frame in frames], fontsize=7.5)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_frame_on(False)
        axes.grid(False)
        axes.set_title(title)
        axes.set_yticks(centres_y, labels, fontsize=9)
    figure.suptitle("From noise to image, by timestep")
    classes = [material.class_names[i] if i < len(material.class_names) else str(i) for i in first.labels[:num_images]]
    on_latents = any(shown.run.config["data"]["name"] == LATENTS for shown in material.shown)
    caption = (
        f"The first {'image' if num_images == 1 else f'{num_images} images'} of each method's sample "
        f"({'class' if num_images == 1 else 'classes'} {', '.join(classes)}, the same noise for all) on the way from noise "
        "to the sample (end). Left: what the network is given at a timestep; right: the clean image it predicts from that. "
        f"{'Latents, decoded. ' if on_latents else ''}First seed of each method."
    )
    return Drawn(name, figure, None, caption)


def _inches(labels: Sequence[str]) -> float:
    """What the labels of rows need beside the images."""
    return 0.5 + 0.088 * max(len(line) for label in labels for line in label.split("\n"))


def _time(time: float) -> str:
    return f"{time:g}" if np.isfinite(time) else "end"
