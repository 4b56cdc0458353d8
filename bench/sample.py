"""How are images drawn from a trained method, so that anyone anywhere draws the same ones?

Image i depends on (seed, i) alone: indices are cut into fixed blocks, a block draws its own noise and is computed as
one batch of fixed size, the last one padded. Ranks own whole blocks. The label of image i is i mod the number of
classes. The schedule is walked interval by interval from noise to image, so each expert is specialised once and only
one is alive at a time.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bench.arrays import Trajectory
from bench.config import DiffusionConfig, EvaluationConfig, ModelConfig
from bench.data import DataSource, to_uint8
from bench.diffusion import ancestral_step, ddim_step, guide, split_output, x0_from_noise
from bench.distributed import World
from bench.files import write_bytes_atomically
from bench.flow import euler_step, flow_times_to_sample
from bench.method import Denoiser, Method, timestep_index
from bench.noise_schedule import make_schedule, respace
from bench.randomness import generator

Watch = Callable[[int, Tensor, Tensor], None]
"""`(place, x (B, C, H, W), the network's output there)`, before the step from `place`."""

ROUND = 40  # blocks, over all ranks: what an interruption can cost


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

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        """The clean image (B, C, H, W) that the output stands for."""


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

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        index = torch.full((len(x),), self.levels[place], device=x.device)
        return x0_from_noise(self.schedule, split_output(output, x)[0], x, index)


class FlowWalk:
    """Euler steps of a rectified flow, from t = 1 to 0."""

    def __init__(self, evaluation: EvaluationConfig) -> None:
        if not evaluation.steps.isdigit() or int(evaluation.steps) < 1:
            raise ValueError(f"evaluation.steps is {evaluation.steps!r}: rectified flow takes a whole number of steps")
        self.times = flow_times_to_sample(int(evaluation.steps))

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        t = torch.full((len(x),), float(self.times[place]), device=x.device)
        return euler_step(output, x, t, 1 / len(self.times))

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        t = torch.full((len(x),), float(self.times[place]), device=x.device)
        return euler_step(output, x, t, 1.0)  # all the way to 0


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
    def draw(
        self,
        method: Method,
        device: torch.device,
        world: World | None = None,
        parts: Path | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> Samples:
        """`num_samples` images from the method as it is (apply the averaged weights before); the same on every rank.

        Blocks are drawn in rounds. Of more than one round, each is kept in the folder `parts` when it is drawn, and found
        there by the next call; before each, `pause` is called, which may raise.
        """
        world = world or World()
        size, count = self.evaluation.block_size, self.evaluation.num_samples
        blocks = list(range(math.ceil(count / size)))
        rounds = [blocks[start : start + ROUND] for start in range(0, len(blocks), ROUND)]
        images, seconds = [], 0.0
        for drawn_together in rounds:
            pause()
            part = parts / f"blocks-{drawn_together[0]:06d}.safetensors" if parts and len(rounds) > 1 else None
            of_round = load_file(part) if part and world.decide(part.exists(), device) else None
            if of_round is None:
                of_round = self._draw_round(method, drawn_together, device, world)
                if part and world.is_main:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes_atomically(part, save(of_round))
            images.append(of_round["images"])
            seconds += float(of_round["seconds"])
        evaluations = len(self.walk.times) * (1 if self.evaluation.guidance_scale == 1 else 2)
        return Samples(torch.cat(images)[:count], torch.arange(count) % self.num_classes, count / seconds, evaluations)

    def _draw_round(self, method: Method, blocks: list[int], device: torch.device, world: World) -> dict[str, Tensor]:
        """`images` of the blocks, uint8, and the `seconds` that they took."""
        mine = [block for block in blocks if block % world.size == world.rank]
        started = time.perf_counter()
        with world.together():
            own = dict(zip(mine, self._draw_blocks(method, mine, device), strict=True))
        empty = torch.empty((self.evaluation.block_size, *self.image_shape), dtype=torch.uint8, device=device)
        shared = [world.share_block(own.get(block, empty.clone()), owner=block % world.size).cpu() for block in blocks]
        return {"images": torch.cat(shared), "seconds": torch.tensor(time.perf_counter() - started, dtype=torch.float64)}

    @torch.no_grad()
    def trajectory(self, method: Method, device: torch.device, count: int = 10, num_frames: int = 11) -> Trajectory:
        """The first images of the sample at `num_frames` places, evenly spread over the steps from pure noise to the sample.

        At most `count` images, and no more than are drawn together; a walk of fewer steps has a frame for each. Draws
        block 0 as `draw` does, so the last frame has the same bytes; it needs no other rank.
        """
        assert num_frames >= 2
        count = min(count, self.evaluation.block_size, self.evaluation.num_samples)
        num_steps = len(self.walk.times)
        places = torch.linspace(0, num_steps, num_frames, dtype=torch.float64).round().long().unique().tolist()
        images, predicted = [], []

        def watch(place: int, x: Tensor, output: Tensor) -> None:
            if place in places:
                images.append(to_uint8(x[:count]))
                predicted.append(to_uint8(self.walk.predicted(place, output, x)[:count]))

        final = self._draw_blocks(method, [0], device, watch)[0][:count]
        frames = [torch.stack([*seen, final]).cpu().numpy() for seen in (images, predicted)]
        times = np.array([*self.walk.times[places[:-1]].tolist(), math.nan])
        return Trajectory(frames[0], frames[1], times, np.arange(count) % self.num_classes)

    def _draw_blocks(
        self, method: Method, blocks: list[int], device: torch.device, watch: Watch = lambda place, x, output: None
    ) -> list[Tensor]:
        """uint8 (block_size, C, H, W) for each block; `watch` sees each step of each block before it is taken."""
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
                    watch(place, x[i], output)
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
