"""How do the first images of a sample come out of noise? Seen while they are drawn, at a few places on their way."""

import math
from collections.abc import Mapping

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

    def __init__(self, walk: Walk, count: int, num_frames: int = NUM_FRAMES) -> None:
        assert num_frames >= 2
        self.walk, self.count = walk, count
        places = torch.linspace(0, len(walk.times), num_frames, dtype=torch.float64).round().long().unique()
        self.places: list[int] = places[:-1].tolist()
        self.images: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def watch(self, block: int, place: int, x: Tensor, output: Tensor) -> None:
        """Before each step of each block; see `bench.sample.Watch`. It never waits for the device."""
        if block == 0 and place in self.places:
            self.images.append(to_uint8(x[: self.count]))
            self.predicted.append(to_uint8(self.walk.predicted(place, output, x)[: self.count]))

    def trajectory(self, drawn: Tensor, labels: Tensor) -> Trajectory:
        """Of block 0, once it is drawn: uint8 (block_size, C, H, W), and its labels."""
        images, predicted = (torch.stack([*seen, drawn[: self.count]]).cpu().numpy() for seen in (self.images, self.predicted))
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
