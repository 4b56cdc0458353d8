"""How are images drawn from a trained method, so that anyone anywhere draws the same ones?

Image i depends on (seed, i) alone: indices are cut into fixed blocks, a block draws its own noise and is computed as
one batch of fixed size, the last one padded. Ranks own whole blocks. The label of image i is i mod the number of
classes. The schedule is walked interval by interval from noise to image, so each expert is specialised once and only
one is alive at a time.
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench.config import DiffusionConfig, EvaluationConfig, ModelConfig
from bench.data import DataSource, to_uint8
from bench.diffusion import ancestral_step, ddim_step, guide
from bench.distributed import World
from bench.flow import euler_step, flow_times_to_sample
from bench.method import Denoiser, Method, timestep_index
from bench.noise_schedule import make_schedule, respace
from bench.randomness import generator


class Samples(NamedTuple):
    """Images of the indices 0..n-1, in order."""

    images: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,) int64
    images_per_second: float  # over all ranks; specialising and moving to uint8 included
    network_evaluations_per_sample: int  # guided ones count twice


class Walk(Protocol):
    """A sampler: `times` are what the network is given at each step, from noise to image."""

    times: Tensor  # (S,) int64 timesteps, or float in (0, 1]

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """x (B, C, H, W) after the step at `place`, given the network's output there."""


class DiffusionWalk:
    """Ancestral or DDIM steps over a respaced chain."""

    def __init__(self, diffusion: DiffusionConfig, evaluation: EvaluationConfig, learn_sigma: bool) -> None:
        self.schedule = respace(make_schedule(diffusion.schedule, diffusion.num_timesteps), evaluation.steps)
        self.levels = range(self.schedule.num_steps - 1, -1, -1)
        self.times = self.schedule.timesteps.values.flip(0)
        self.ancestral, self.eta = evaluation.sampler == "ancestral", evaluation.eta
        self.variance = "learned" if learn_sigma else "fixed_large"

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        index = torch.full((len(x),), self.levels[place], device=x.device)
        if self.ancestral:
            return ancestral_step(self.schedule, output, x, index, noise, self.variance)
        return ddim_step(self.schedule, output, x, index, noise, self.eta)


class FlowWalk:
    """Euler steps of a rectified flow, from t = 1 to 0."""

    def __init__(self, evaluation: EvaluationConfig) -> None:
        if not evaluation.steps.isdigit() or int(evaluation.steps) < 1:
            raise ValueError(f"evaluation.steps is {evaluation.steps!r}: rectified flow takes a whole number of steps")
        self.times = flow_times_to_sample(int(evaluation.steps))

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        t = torch.full((len(x),), float(self.times[place]), device=x.device)
        return euler_step(output, x, t, 1 / len(self.times))


def make_walk(diffusion: DiffusionConfig, evaluation: EvaluationConfig, model: ModelConfig) -> Walk:
    """ValueError where the sampler does not fit the objective or the steps do not fit the chain."""
    if (diffusion.objective == "flow") != (evaluation.sampler == "euler"):
        raise ValueError(
            f"evaluation.sampler is {evaluation.sampler!r}, which does not fit diffusion.objective={diffusion.objective}: "
            "choose ancestral or ddim for noise; for flow euler, with evaluation.steps a plain number"
        )
    return FlowWalk(evaluation) if diffusion.objective == "flow" else DiffusionWalk(diffusion, evaluation, model.learn_sigma)


@dataclass(frozen=True)
class Sampler:
    """Everything that a sample depends on, but the network."""

    walk: Walk
    evaluation: EvaluationConfig
    num_timesteps: int
    num_classes: int
    image_shape: tuple[int, int, int]  # (C, H, W)

    @torch.no_grad()
    def draw(self, method: Method, device: torch.device, world: World | None = None) -> Samples:
        """`num_samples` images from the method as it is (apply the averaged weights before); the same on every rank."""
        world = world or World()
        size, count = self.evaluation.block_size, self.evaluation.num_samples
        num_blocks = math.ceil(count / size)
        mine = [b for b in range(num_blocks) if b % world.size == world.rank]
        started = time.perf_counter()
        own = dict(zip(mine, self._draw_blocks(method, mine, device), strict=True))
        empty = torch.empty((size, *self.image_shape), dtype=torch.uint8, device=device)
        shared = [world.share_block(own.get(b, empty.clone()), owner=b % world.size).cpu() for b in range(num_blocks)]
        images_per_second = count / (time.perf_counter() - started)
        evaluations = len(self.walk.times) * (1 if self.evaluation.guidance_scale == 1 else 2)
        return Samples(torch.cat(shared)[:count], torch.arange(count) % self.num_classes, images_per_second, evaluations)

    def _draw_blocks(self, method: Method, blocks: list[int], device: torch.device) -> list[Tensor]:
        """uint8 (block_size, C, H, W) for each block."""
        size = self.evaluation.block_size
        sources = [generator(self.evaluation.seed, "sample", block) for block in blocks]
        x = [self._noise(source).to(device) for source in sources]
        labels = [(torch.arange(block * size, (block + 1) * size) % self.num_classes).to(device) for block in blocks]
        index = timestep_index(self.walk.times, self.num_timesteps)  # of each step: which interval it is in
        for interval in reversed(method.intervals):
            places = torch.nonzero((index >= interval.start) & (index < interval.stop)).squeeze(1).tolist()
            if not places:
                continue
            denoiser = method.specialise(interval)
            for i in range(len(blocks)):
                for place in places:
                    output = self._evaluate(denoiser, x[i], self.walk.times[place], labels[i])
                    x[i] = self.walk.step(place, output, x[i], self._noise(sources[i]).to(device))
            del denoiser  # before the next one is made
        return [to_uint8(image) for image in x]

    def _noise(self, source: torch.Generator) -> Tensor:
        return torch.randn((self.evaluation.block_size, *self.image_shape), generator=source)

    def _evaluate(self, denoiser: Denoiser, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        t = time.to(x.device).expand(len(x))
        scale = self.evaluation.guidance_scale
        if scale == 1:
            return denoiser(x, t, labels)
        channels = self.evaluation.guidance_channels or self.image_shape[0]
        null = torch.full_like(labels, self.num_classes)
        doubled = guide(denoiser, torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]), scale, channels)
        return doubled[: len(x)]


def make_sampler(diffusion: DiffusionConfig, evaluation: EvaluationConfig, model: ModelConfig, data: DataSource) -> Sampler:
    """ValueError, before anything is trained, for a sampler that does not fit."""
    if evaluation.guidance_channels > data.channels:
        raise ValueError(
            f"evaluation.guidance_channels is {evaluation.guidance_channels}, but {data.name} has {data.channels}: "
            f"choose from 1 to {data.channels}, or 0 for all"
        )
    shape = (data.channels, data.input_size, data.input_size)
    walk = make_walk(diffusion, evaluation, model)
    return Sampler(walk, evaluation, diffusion.num_timesteps, data.num_classes, shape)
