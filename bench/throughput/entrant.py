"""What does a contestant do when it is timed? The trainer's own step, and the sampler's, on latents that lie on the device.

Training: forward, loss, backward, optimiser and average, by `Trainer.step`. Sampling: the specialised network, guided
with both halves in one batch, and the step of the walk. Batches and noise are drawn before, as training draws them, over up to
`MOST_BATCHES` of the method's intervals (over all where each has parameters of its own: their states take memory); weights
are the initial ones.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench import job
from bench.config import RunConfig
from bench.data import DataSource
from bench.data.source import TensorImages
from bench.diffusion import guide
from bench.flops import Cost
from bench.intervals import interval_of
from bench.method import Method, timestep_index
from bench.randomness import Batch
from bench.sample import make_sampler
from bench.shares import draw_shares, intervals_of
from bench.throughput.clock import Call
from bench.throughput.contest import CHANNELS, INPUT_SIZE, NUM_CLASSES, Contestant, Setup, config_of
from bench.throughput.memory import Memory
from bench.trainer import Trainer

MOST_BATCHES = 4
RECORDING = 3  # calls until CUDA graphs are replayed: one as it is, one that records
NUM_IMAGES = 1024


class Plain(NamedTuple):
    """How a contestant becomes one in plain code."""

    method: Callable[[Method], Method]  # the same weights
    updates: Callable[[Trainer], None]  # gives a trainer another optimiser and average


def synthetic_latents() -> DataSource:
    source = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, CHANNELS, INPUT_SIZE, INPUT_SIZE, generator=source)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=source)
    part = TensorImages(images, labels)
    return DataSource("synthetic latents", NUM_CLASSES, CHANNELS, INPUT_SIZE, part, part, lambda: "synthetic", pixels=False)


class Entrant:
    """A contestant that is built and warm."""

    def __init__(self, contestant: Contestant, setup: Setup, cost: Cost, plain: Plain) -> None:
        config, data, device = config_of(contestant, setup), synthetic_latents(), torch.device(setup.device)
        memory = Memory(device)
        method = job.build_method(config, data)
        trainer = Trainer(plain.method(method) if contestant.plain else method, config, data, cost=cost)
        if contestant.plain:
            plain.updates(trainer)
        self.contestant, self.trainer = contestant, trainer
        batches = draw_batches(trainer, data)
        self.train = training_step(trainer, batches)
        calls = RECORDING if config.system.compile == "cuda_graphs" else 1
        for _ in range(calls * len(batches)):  # each: states are made and code is compiled when an interval is first met
            self.train()
        self.settle()
        self.peak_memory_bytes, self.memory_kind = memory.peak_bytes(), memory.kind
        self.sample = sampling_step(trainer.method, config, data, device)
        self.sample()
        self.sample()
        self.rest()

    def settle(self) -> None:
        """What the trainer does now and then: look at the losses, and forget them."""
        self.trainer.flush()

    def rest(self) -> None:
        """Hold no more than weights and states while others run; a step makes new gradients."""
        self.trainer.optimizer.zero_grad(set_to_none=True)


def draw_batches(trainer: Trainer, data: DataSource) -> list[list[Batch]]:
    """Of the first few steps."""
    batches = []
    most = len(trainer.intervals) if trainer.method.independent_experts else MOST_BATCHES
    for step in range(max(2, min(most, len(trainer.intervals)))):
        intervals = intervals_of(step, trainer.method, trainer.config)
        drawn = draw_shares(step, intervals, trainer.shares, trainer.config, data, 0.5)
        batches.append([batch.to(trainer.device) for batch in drawn])
    return batches


def training_step(trainer: Trainer, batches: Sequence[Sequence[Batch]]) -> Call:
    """One step of the trainer on the next of a few batches."""
    following = itertools.cycle(batches)
    return lambda: trainer.step(*next(following))


def sampling_step(method: Method, config: RunConfig, data: DataSource, device: torch.device) -> Call:
    """One step of the walk near its middle, for a batch of images."""
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    walk, size = sampler.walk.of_block(), config.evaluation.block_size
    place = len(walk.times) // 2
    time = walk.times[place]  # () int64, or of a flow float
    with torch.no_grad():
        denoiser = method.specialise(interval_of(int(timestep_index(time, config.diffusion.num_timesteps)), method.intervals))
    if config.system.compile_sampling:
        denoiser = torch.compile(denoiser, fullgraph=True, dynamic=False)
    x, t = torch.randn(size, *sampler.image_shape, device=device), time.to(device).expand(size)
    labels, noise = torch.arange(size, device=device) % data.num_classes, torch.randn_like(x)
    no_label, scale = torch.full_like(labels, data.num_classes), config.evaluation.guidance_scale
    doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, no_label])

    def evaluate(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return denoiser(x, t, y).float()

    @torch.no_grad()
    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.evaluation.precision == "bf16"):
            output = evaluate(x, t, labels) if scale == 1 else guide(evaluate, *doubled, scale, sampler.image_shape[0])[:size]
            return walk.step(place, output, x, noise)

    return step
