"""What is a data set, to those who train on it and score against it?"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bench.data.digest import Stamp, hashed_once

UINT8_RULE = "floor(127.5 * x + 128) clamped to 0..255"


class ImageSet(Protocol):
    """Labelled images, read by index; the same indices always give the same bytes."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """(n,) int64, 0 <= label < num_classes."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """`indices` (B,) int64 on the CPU -> x (B, C, H, W) float32 in [-1, 1] (latents: scaled), y (B,) int64."""
        ...


@runtime_checkable
class HasPixels(Protocol):
    """An image set that holds pixels as uint8."""

    def pixels(self, indices: Tensor) -> Tensor:
        """(B,) int64 on the CPU -> (B, C, H, W) uint8, of which `batch` makes float32."""
        ...


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set. Images are `channels` x `input_size` x `input_size`; `train` and `heldout` share none.

    The held-out set is in balanced order: as long as no class runs out, image i has class i mod num_classes.
    """

    name: str
    num_classes: int
    channels: int
    input_size: int
    train: ImageSet
    heldout: ImageSet
    fingerprint: Callable[[], str]
    pixels: bool = True  # False: latents, which are images only when they are decoded
    scaling: float = 1.0  # what latents were multiplied by
    mirrored: ImageSet | None = None  # of latents: the training images, mirrored before they were encoded
    decoder: Callable[[], str] = lambda: "none"  # what makes images of samples that are latents, in words for a protocol
    decoded: "DataSource | None" = None  # these latents
    stamp: Callable[[], Stamp] | None = None  # of its files, if they are read for the fingerprint
    digests: Path | None = None  # a folder in which the hash is kept for other processes

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what is trained on and held out, labels and split included. Reads everything, when first asked, unless it
        is known of files with this stamp.
        """
        return hashed_once(self.stamp(), self.fingerprint, self.digests) if self.stamp else self.fingerprint()


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images in memory: (n, C, H, W), float32 in [-1, 1] or uint8."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return to_unit_range(self.images[indices]), self.labels[indices]

    def pixels(self, indices: Tensor) -> Tensor:
        found = self.images[indices]
        return found if found.dtype == torch.uint8 else to_uint8(found)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]; float32 passes."""
    return scale_to_unit_range(images.float()) if images.dtype == torch.uint8 else images


def scale_to_unit_range(x: Tensor) -> Tensor:
    """float32 0..255 -> [-1, 1], in place: memory is what it costs."""
    return x.div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> uint8, halves upwards (values are never negative, so away from zero), clamped.

    The rule `UINT8_RULE` is part of the evaluation protocol; it is the inverse of `to_unit_range`. Raises ValueError if
    a value is not finite: NaN would silently become a colour.
    """
    num_bad = int((~torch.isfinite(x)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {x.numel()} pixel values are not finite: what drew these images has diverged")
    return (127.5 * x.float() + 128.0).floor().clamp(0, 255).to(torch.uint8)


def read_uint8(images: ImageSet, indices: Tensor) -> Tensor:
    """(B,) int64 -> (B, C, H, W) uint8: the same as `to_uint8` of a batch, but sets of uint8 give them as they lie there."""
    return images.pixels(indices) if isinstance(images, HasPixels) else to_uint8(images.batch(indices)[0])


def balanced_order(labels: Tensor) -> Tensor:
    """Indices that visit the classes in turn: first of each class, second of each class ... (n,) int64.

    Classes that run out are passed over. Any prefix is as balanced as the classes allow.
    """
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    num_classes = int(labels.max()) + 1 if len(labels) else 1
    return torch.argsort(rank * num_classes + labels)


def spread_choice(labels: Tensor, count: int) -> Tensor:
    """`count` indices, as balanced as the classes allow and spread evenly through each, in balanced order; no randomness."""
    classes = labels.unique()
    per_class = -(-count // len(classes))
    candidates = []
    for label in classes:
        members = (labels == label).nonzero().squeeze(1)
        picked = torch.zeros(len(members), dtype=torch.bool)
        picked[evenly_spread(len(members), min(per_class, len(members)))] = True
        candidates += [members[picked], members[~picked]]  # the rest only for classes that are too small elsewhere
    indices = torch.cat(candidates)
    return indices[balanced_order(labels[indices])[:count]]


def evenly_spread(length: int, count: int) -> Tensor:
    """`count` different positions in 0..length-1, at the middles of equal parts; needs count <= length."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def open_array(path: Path, layout: str, remedy: str) -> np.ndarray:
    """A NumPy file, memory-mapped; ValueError, with what belongs there or the remedy, if it is missing or cannot be read."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {layout}")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a NumPy array ({error}): {remedy}") from None
    return array


def hash_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order given; memory-mapped arrays are read in pieces."""
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        rows_per_piece = max(1, 2**24 // max(1, array[:1].nbytes))
        for start in range(0, len(array), rows_per_piece):
            digest.update(np.ascontiguousarray(array[start : start + rows_per_piece]).tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_image_size(given: int, own: int, name: str) -> None:
    """ValueError unless `data.image_size` is 0 or the one size that the data set has."""
    if given not in (0, own):
        raise ValueError(f"data.image_size is {given}, but {name} images are {own} pixels wide: set it to {own}, or 0")
