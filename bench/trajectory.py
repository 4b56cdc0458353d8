"""How do the first images of a sample come out of noise? Seen while they are drawn, at a few places on their way."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bench.arrays import Trajectory
from bench.data import to_uint8
from bench.walk import Walk

NUM_IMAGES, NUM_FRAMES = 10, 11
PREFIX = "trajectory/"  # before the names of its arrays in a file


class Film:
    """Of the first `count` images of block 0. Its frames are evenly spread over the steps from pure noise to the sample; a
    walk of fewer steps has a frame for each.
    """

    def __init__(self, walk: Walk, count: int, pixels: Callable[[Tensor], Tensor], num_frames: int = NUM_FRAMES) -> None:
        """`pixels` makes images of what is denoised; see `Sampler.pixels`."""
        assert num_frames >= 2
        self.walk, self.count, self.pixels = walk, count, pixels
        places = torch.linspace(0, len(walk.times), num_frames, dtype=torch.float64).round().long().unique()
        self.places: list[int] = places[:-1].tolist()
        self.images: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def watch(self, block: int, place: int, x: Tensor, output: Tensor) -> None:
        """Before each step of each block; see `bench.sample.Watch`. It never waits for the device."""
        if block == 0 and place in self.places:
            first = x[: self.count].clone()  # a slice would hold on to all
            self.images.append(first)
            self.predicted.append(self.walk.predicted(place, output[: self.count], first))

    def trajectory(self, drawn: Tensor, labels: Tensor) -> Trajectory:
        """Of block 0, once it is drawn: uint8 (block_size, C, H, W), and its labels."""
        final = drawn[: self.count].cpu()
        images, predicted = (
            torch.stack([*(to_uint8(self.pixels(frame).cpu()) for frame in seen), final]).numpy()
            for seen in (self.images, self.predicted)
        )
        times = np.array([*self.walk.times[self.places].tolist(), math.nan])
        return Trajectory(images, predicted, times, labels[: self.count].numpy())


def packed(trajectory: Trajectory | None) -> dict[str, Tensor]:
    """Its arrays by name, for a file; without any, nothing."""
    arrays = trajectory._asdict() if trajectory else {}
    return {PREFIX + name: torch.from_numpy(array) for name, array in arrays.items()}


def unpacked(tensors: Mapping[str, Tensor]) -> Trajectory | None:
    """What `packed` put among them, if anything."""
    names = [PREFIX + name for name in Trajectory._fields]
    return Trajectory(*(tensors[name].numpy() for name in names)) if names[0] in tensors else None
