"""How is a data set kept on the GPU, so that no image has to be copied there twice?

The same values to the bit as those that its own `batch` gives: images are kept as they come from it, in float32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.data.source import DataSource, ImageSet

BYTES_PER_GB = 1e9
READ_TOGETHER = 1024  # images, while a set is copied


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """Images on a device; indices may come from the host, and batches stay on the device."""

    images: Tensor  # (n, C, H, W) float32, on the device
    labels_there: Tensor  # (n,) int64, on the device
    labels: Tensor  # (n,) int64, on the CPU

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pinned = indices.pin_memory() if self.images.is_cuda and not indices.is_cuda else indices
        there = pinned.to(self.images.device, non_blocking=True)
        return self.images[there], self.labels_there[there]


def keep_on_device(data: DataSource, device: torch.device, limit_gb: float) -> DataSource:
    """`data`, its training images on the device if that is a GPU and they, mirrored ones included, take at most `limit_gb`
    there (1e9 bytes).
    """
    num_images = len(data.train) * (1 if data.mirrored is None else 2)
    size = 4 * num_images * data.channels * data.input_size**2
    if device.type == "cpu" or size > limit_gb * BYTES_PER_GB:
        return data
    mirrored = None if data.mirrored is None else resident(data.mirrored, device)
    return replace(data, train=resident(data.train, device), mirrored=mirrored)


def resident(images: ImageSet, device: torch.device) -> ResidentImages:
    """All of a set on a device, read in pieces."""
    parts = [images.batch(indices)[0].to(device) for indices in torch.arange(len(images)).split(READ_TOGETHER)]
    return ResidentImages(torch.cat(parts), images.labels.to(device), images.labels)
