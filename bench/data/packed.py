"""How are images read from memory-mapped arrays, and how do the images of a slower data set get there?

Below `data.path`: train_images.npy (n, C, H, H) uint8, train_labels.npy (n,), heldout_images.npy, heldout_labels.npy.
A batch is gathered from the arrays; nothing is decoded, and only the rows that are asked for are read.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from bench.config import DataConfig
from bench.data.buffers import Buffers
from bench.data.digest import stamp
from bench.data.source import (
    DataSource,
    balanced_order,
    check_image_size,
    hash_arrays,
    open_array,
    read_uint8,
    scale_to_unit_range,
)

PARTS = ("train", "heldout")
LAYOUT = "data.path must hold train_images.npy, train_labels.npy, heldout_images.npy and heldout_labels.npy"
WRITTEN_TOGETHER = 256  # images


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images in a memory-mapped file; image i is row `rows[i]`."""

    images: np.ndarray  # (n, C, H, W) uint8
    rows: np.ndarray  # (n,) int64
    labels: Tensor
    buffers: Buffers = field(default_factory=Buffers)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x = self.buffers.empty((len(indices), *self.images.shape[1:]))
        for image, row in zip(x.numpy(), self.rows[indices.numpy()], strict=True):
            np.copyto(image, self.images[row])  # from the file to float32 at once
        return scale_to_unit_range(x), self.labels[indices]

    def pixels(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.take(self.images, self.rows[indices.numpy()], axis=0))  # a copy, of these rows alone


def load_packed(config: DataConfig) -> DataSource:
    """As `pack` has written it; labels are 0..K-1, where K follows from the training labels."""
    if not config.path:
        raise ValueError(f"data.path is empty: {LAYOUT}")
    root = Path(config.path)
    names = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    arrays = {name: open_array(root / f"{name}.npy", LAYOUT, "pack it again") for name in names}
    channels, size = _check(root, arrays)
    check_image_size(config.image_size, size, "these packed")
    labels = {part: torch.from_numpy(np.array(arrays[f"{part}_labels"], dtype=np.int64)) for part in PARTS}
    num_classes = int(labels["train"].max()) + 1
    if any(int(of_part.min()) < 0 or int(of_part.max()) >= num_classes for of_part in labels.values()):
        raise ValueError(f"the labels in {root} leave 0..{num_classes - 1}, the range of the training labels: pack them again")
    order = balanced_order(labels["heldout"])
    train = PackedImages(arrays["train_images"], np.arange(len(labels["train"])), labels["train"])
    heldout = PackedImages(arrays["heldout_images"], order.numpy(), labels["heldout"][order])
    stamped = stamp((root / f"{name}.npy" for name in names), "packed")  # what is mapped, whatever is written later

    def fingerprint() -> str:
        return hash_arrays(arrays.items())

    return DataSource("packed", num_classes, channels, size, train, heldout, fingerprint, stamp=lambda: stamped)


def pack(source: DataSource, folder: Path, told: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a data set of pixels as arrays, to be read with data.name=packed and data.path=FOLDER.

    `told` is called with the images written so far and their number. ValueError if the folder holds such arrays already.
    """
    if not source.pixels:
        raise ValueError(f"data set {source.name!r} holds latents, which are arrays already: read them with data.name=latents")
    there = [folder / f"{part}_images.npy" for part in PARTS if (folder / f"{part}_images.npy").exists()]
    if there:
        raise ValueError(f"{there[0]} exists already: choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    done, total = 0, len(source.train) + len(source.heldout)
    shape = source.channels, source.input_size, source.input_size
    parts = {"train": source.train, "heldout": source.heldout}
    temporary = {part: folder / f".{part}_images.{os.getpid()}.tmp" for part in parts}
    try:
        arrays = {part: make_array(temporary[part], (len(images), *shape), np.uint8) for part, images in parts.items()}
        for part, images in parts.items():
            for indices in torch.arange(len(images)).split(WRITTEN_TOGETHER):
                arrays[part][indices.numpy()] = read_uint8(images, indices).numpy()
                done += len(indices)
                told(done, total)
            arrays.pop(part).flush()
            np.save(folder / f"{part}_labels.npy", images.labels.numpy())
        for part in parts:
            os.replace(temporary[part], folder / f"{part}_images.npy")  # last: images mean that labels are there
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def make_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.memmap:
    """In a new file that has its room on the disk: written to without, it would end the process, not raise an error."""
    array: np.memmap = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _check(root: Path, arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    """Channels and size of the images; ValueError if types, ranks or lengths disagree."""
    shape = arrays["train_images"].shape
    for part in PARTS:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[1:] != shape[1:]:
            raise ValueError(f"{part}_images.npy in {root} is {images.dtype} {images.shape}: it must be uint8 (n, C, H, H)")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{part}_labels.npy in {root} is {labels.dtype} {labels.shape}, but there are {len(images)} images: "
                "it must hold one integer for each of them, and at least one"
            )
    return int(shape[1]), int(shape[2])
