"""What does optimiser step k see?

Every random number comes from a generator seeded by (seed, purpose, place): the place is the optimiser step or a
block of sample indices, never a rank or a device. All of a step is drawn for the GLOBAL batch, on the CPU; a rank
takes its slice. Which interval a step trains (or which several, each on a part of its rows: `bench.shares`) follows from
the step (`bench.intervals.interval_at_step`): an expert trained in a job of its own draws the same numbers. At equal
batch sizes all methods see the same images, noise, dropped labels and relative timesteps at step k.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.config import RunConfig
from bench.data import DataSource
from bench.diffusion import clustered_timesteps
from bench.flow import flow_times
from bench.intervals import Interval


class Batch(NamedTuple):
    """A drawn batch, of one interval."""

    x0: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) int64, or float in (0, 1) for rectified flow
    y: Tensor  # (B,) int64; num_classes where the label was dropped
    interval: Interval
    progress: float = 0.0  # the part of the budget that is spent, in [0, 1]
    intervals_of_step: tuple[Interval, ...] = ()  # where a step trains several, those of all its batches, on all ranks

    def part(self, rows: slice) -> "Batch":
        return self._replace(x0=self.x0[rows], noise=self.noise[rows], t=self.t[rows], y=self.y[rows])

    def cut(self, num_parts: int) -> "list[Batch]":
        size = len(self.x0) // num_parts
        return [self.part(slice(i * size, (i + 1) * size)) for i in range(num_parts)]

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        x0, noise, t, y = (moved(tensor, device) for tensor in (self.x0, self.noise, self.t, self.y))
        return self._replace(x0=x0, noise=noise, t=t, y=y)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from the host to a GPU without waiting, out of memory that it can read by itself (pinned)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def generator(seed: int, *place: object) -> torch.Generator:
    """A CPU generator for one purpose at one place."""
    key = "/".join(map(str, (seed, *place)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)


def draw_batch(
    step: int, interval: Interval, config: RunConfig, data: DataSource, progress: float, rows: slice = slice(None)
) -> Batch:
    """Rows of the global batch of optimiser step `step` (from 0), by default all, as of this interval. Only their images are
    read.
    """
    count, seed = config.train.batch_size, config.seed
    indices = image_indices(step, count, len(data.train), seed)[rows]
    if config.data.flip:
        x0, y = _flip(data, indices, torch.rand(count, generator=generator(seed, "flip", step))[rows] < 0.5)
    else:
        x0, y = data.train.batch(indices)
    device = x0.device  # of images that are kept there
    dropped = torch.rand(count, generator=generator(seed, "label dropout", step))[rows] < config.train.label_dropout
    y = y.masked_fill(moved(dropped, device), data.num_classes)
    t = draw_timesteps(step, interval, config)[rows]
    noise = torch.randn((count, *x0.shape[1:]), generator=generator(seed, "noise", step))[rows]
    return Batch(x0, noise, t, y, interval, progress)


def _flip(data: DataSource, indices: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
    """Training images, those that are `flipped` (B,) mirrored: pixels here, latents when their images were encoded."""
    if data.mirrored is None:
        x, y = data.train.batch(indices)
        return torch.where(moved(flipped, x.device)[:, None, None, None], x.flip(-1), x), y
    parts = data.train.batch(indices[~flipped]), data.mirrored.batch(indices[flipped])
    place = torch.cat([(~flipped).nonzero(), flipped.nonzero()]).squeeze(1).argsort()  # in `parts`, of each of `indices`
    x, y = (torch.cat(both)[moved(place, both[0].device)] for both in zip(*parts, strict=True))
    return x, y


def draw_timesteps(step: int, interval: Interval, config: RunConfig) -> Tensor:
    """(B,): uniform over the interval, or as the objective asks."""
    count, source = config.train.batch_size, generator(config.seed, "timestep", step)
    if config.diffusion.objective == "flow":
        return _shuffled(flow_times(config.diffusion.flow_times, count, source), source)
    if config.diffusion.loss_weight == "uncertainty":
        return _shuffled(clustered_timesteps(count, config.diffusion.num_timesteps, source), source)
    relative = torch.rand(count, generator=source, dtype=torch.float64)
    return interval.start + (relative * interval.length).long()


def image_indices(step: int, count: int, num_images: int, seed: int) -> Tensor:
    """(count,): the next images of an endless row of seeded shuffles of the training set."""
    position = torch.arange(step * count, (step + 1) * count)
    epochs = position // num_images
    parts = [_shuffle(int(e), num_images, seed)[position[epochs == e] % num_images] for e in epochs.unique()]
    return torch.cat(parts)


def _shuffled(t: Tensor, source: torch.Generator) -> Tensor:
    """Stratified draws come in order; shuffled, the part that a rank takes is spread over the schedule too."""
    return t[torch.randperm(len(t), generator=source)]


@lru_cache(maxsize=4)
def _shuffle(epoch: int, num_images: int, seed: int) -> Tensor:
    return torch.randperm(num_images, generator=generator(seed, "images", epoch))
