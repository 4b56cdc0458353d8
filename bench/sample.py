"""How are images drawn from a trained method, so that anyone anywhere draws the same ones?

Image i depends on (seed, i) alone: indices are cut into fixed blocks, a block draws its own noise and is computed as
one batch of fixed size, the last one padded. Ranks own whole blocks. The label of image i is i mod the number of
classes. The schedule is walked interval by interval from noise to image, so each expert is specialised once and only
one is alive at a time. Between the first noise and the finished block, nothing waits for the device.

    guidance in a limited interval, arXiv 2404.07724    `Sampler.guided_places`, in timesteps
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bench.arrays import Trajectory
from bench.config import DiffusionConfig, EvaluationConfig, ModelConfig
from bench.data import DataSource, to_uint8
from bench.diffusion import guide
from bench.distributed import World
from bench.files import make_folder, write_bytes_atomically
from bench.method import Denoiser, Method, timestep_index
from bench.pixels import Decoder, decoder_of
from bench.randomness import generator, moved
from bench.trajectory import NUM_IMAGES, Film, packed, unpacked
from bench.walk import Walk, make_walk

Watch = Callable[[int, int, Tensor, Tensor], None]
"""`(block, place, x (B, C, H, W), the network's output there)`, before the block's step from `place`."""

ROUND = 40  # blocks, over all ranks: what an interruption can cost


class Samples(NamedTuple):
    """Images of the indices 0..n-1, in order."""

    images: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,) int64
    images_per_second: float  # over all ranks; specialising, decoding and moving to uint8 included
    network_evaluations_per_sample: int  # guided ones count twice
    trajectory: Trajectory | None  # of the first ones; rank 0 has it


class Round(NamedTuple):
    """Blocks that are drawn together, on every rank."""

    images: Tensor  # (n, C, H, W) uint8, on the CPU
    seconds: float
    trajectory: Trajectory | None  # on the rank that draws block 0


@dataclass(frozen=True)
class Sampler:
    """Everything that a sample depends on, but the network."""

    walk: Walk
    evaluation: EvaluationConfig
    num_timesteps: int
    num_classes: int
    image_shape: tuple[int, int, int]  # (C, H, W) of what is denoised
    compiled: bool = False  # the denoiser, by torch.compile
    decoder: Decoder | None = None  # from what is denoised to pixels, where these are not the same

    @property
    def num_evaluations(self) -> int:
        """Of the network, for one sample; guided ones count twice."""
        return sum(2 if guided else 1 for guided in self.guided_places())

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that are drawn."""
        return self.decoder.shape_of(self.image_shape) if self.decoder else self.image_shape

    def pixels(self, x: Tensor) -> Tensor:
        """What was denoised, (B, *image_shape), as pixels (B, *sample_shape) in about [-1, 1]."""
        return self.decoder(x) if self.decoder else x

    def labels(self, count: int) -> Tensor:
        """Of the images 0..count-1."""
        return torch.arange(count) % self.num_classes

    def rounds(self, num_ranks: int, multiple_of: int = 1) -> list[list[int]]:
        """The blocks of all samples, cut into rounds. All but the last hold a multiple of as many images, and as many blocks for
        each rank.
        """
        size, count = self.evaluation.block_size, self.evaluation.num_samples
        whole = math.lcm(multiple_of // math.gcd(size, multiple_of), num_ranks)  # blocks
        length = -(-ROUND // whole) * whole
        blocks = list(range(math.ceil(count / size)))
        return [blocks[start : start + length] for start in range(0, len(blocks), length)]

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
        rounds, count = self.rounds(world.size), self.evaluation.num_samples
        drawn: list[Round] = []
        for blocks in rounds:
            pause()
            part = parts / f"round-{blocks[0]:06d}-{len(blocks)}.safetensors" if parts and len(rounds) > 1 else None
            is_there = part is not None and world.decide(part.exists(), device)
            with world.together():
                found = _read(part) if part and is_there else None
            drawn.append(found or self.draw_round(method, blocks, device, world))
            with world.together():
                if part and not found and world.is_main:
                    make_folder(part.parent)
                    tensors = {"images": drawn[-1].images, "seconds": torch.tensor(drawn[-1].seconds, dtype=torch.float64)}
                    write_bytes_atomically(part, save(tensors | packed(drawn[-1].trajectory)))
        images, seconds = torch.cat([one.images for one in drawn]), sum(one.seconds for one in drawn)
        return Samples(images, self.labels(count), count / seconds, self.num_evaluations, drawn[0].trajectory)

    def draw_round(self, method: Method, blocks: list[int], device: torch.device, world: World) -> Round:
        """The images of the blocks, without those that only fill up the last one, and the seconds that they took."""
        mine = [block for block in blocks if block % world.size == world.rank]
        size, count = self.evaluation.block_size, self.evaluation.num_samples
        film = Film(self.walk, min(NUM_IMAGES, size, count), self.pixels)
        with world.together():
            if self.decoder:
                self.decoder.load(device)  # which takes seconds, but no part in sampling
        started = time.perf_counter()
        with world.together():
            own = dict(zip(mine, self._draw_blocks(method, mine, device, film.watch), strict=True))
        empty = torch.empty((size, *self.sample_shape), dtype=torch.uint8, device=device)
        shared = [world.share_block(own.get(block, empty.clone()), owner=block % world.size).cpu() for block in blocks]
        seconds = time.perf_counter() - started
        with world.together():
            trajectory = film.trajectory(own[0], self.labels(size)) if 0 in own else None
        return Round(torch.cat(shared)[: count - blocks[0] * size], seconds, trajectory)

    @torch.no_grad()
    def _draw_blocks(
        self, method: Method, blocks: list[int], device: torch.device, watch: Watch = lambda block, place, x, output: None
    ) -> list[Tensor]:
        """uint8 (block_size, C, H, W) for each block; `watch` sees each step of each block before it is taken."""
        size = self.evaluation.block_size
        sources = [generator(self.evaluation.seed, "sample", block) for block in blocks]
        walks = [self.walk.of_block() for _ in blocks]
        x = [moved(self._noise(source), device) for source in sources]
        labels = [moved(torch.arange(block * size, (block + 1) * size) % self.num_classes, device) for block in blocks]
        index, guided = self._timesteps(), self.guided_places()
        times = self.walk.times.to(device)  # once: to copy one at every step would wait for the device
        for interval in reversed(method.intervals):
            places = torch.nonzero((index >= interval.start) & (index < interval.stop)).squeeze(1).tolist()
            if not places:
                continue
            denoiser = method.specialise(interval)
            if self.compiled:
                denoiser = torch.compile(denoiser, fullgraph=True, dynamic=False)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.evaluation.precision == "bf16"):
                for i, place in ((i, place) for i in range(len(blocks)) for place in places):
                    output = self._evaluate(denoiser, x[i], times[place].expand(size), labels[i], guided[place])
                    watch(blocks[i], place, x[i], output)
                    noise = moved(self._noise(sources[i]), device) if self.walk.adds_noise else None
                    x[i] = walks[i].step(place, output, x[i], noise)
            del denoiser  # before the next one is made
        return [to_uint8(self.pixels(image)) for image in x]

    def guided_places(self) -> list[bool]:
        """Whether the step at each place is guided."""
        settings, index = self.evaluation, self._timesteps()
        inside = (index >= settings.guidance_start) & (index < (settings.guidance_stop or self.num_timesteps))
        return [settings.guidance_scale != 1 and guided for guided in inside.tolist()]

    def _timesteps(self) -> Tensor:
        """(S,) int64: of each step of the walk, also where its times are continuous."""
        return timestep_index(self.walk.times, self.num_timesteps)

    def _noise(self, source: torch.Generator) -> Tensor:
        return torch.randn((self.evaluation.block_size, *self.image_shape), generator=source)

    def _evaluate(self, denoiser: Denoiser, x: Tensor, t: Tensor, labels: Tensor, guided: bool) -> Tensor:
        """The network's output (B, C_out, H, W) in float32; with and without labels in one batch where it is guided."""
        if not guided:
            return denoiser(x, t, labels).float()
        channels = self.evaluation.guidance_channels or self.image_shape[0]
        null = torch.full_like(labels, self.num_classes)
        doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])
        return guide(lambda *inputs: denoiser(*inputs).float(), *doubled, self.evaluation.guidance_scale, channels)[: len(x)]


def _read(part: Path) -> Round:
    tensors = load_file(part)
    return Round(tensors["images"], float(tensors["seconds"]), unpacked(tensors))


def make_sampler(
    diffusion: DiffusionConfig, evaluation: EvaluationConfig, model: ModelConfig, data: DataSource, compiled: bool = False
) -> Sampler:
    """ValueError, before anything is trained, for a sampler that does not fit."""
    if evaluation.guidance_channels > data.channels:
        raise ValueError(
            f"evaluation.guidance_channels is {evaluation.guidance_channels}, but {data.name} has {data.channels}: "
            f"choose from 1 to {data.channels}, or 0 for all"
        )
    shape = (data.channels, data.input_size, data.input_size)
    _check_guidance_interval(evaluation, diffusion.num_timesteps)
    walk = make_walk(diffusion, evaluation, model)
    decoder = decoder_of(evaluation, data)
    return Sampler(walk, evaluation, diffusion.num_timesteps, data.num_classes, shape, compiled, decoder)


def _check_guidance_interval(evaluation: EvaluationConfig, num_timesteps: int) -> None:
    start, stop = evaluation.guidance_start, evaluation.guidance_stop
    if not start < (stop or num_timesteps) <= num_timesteps:
        raise ValueError(
            f"evaluation.guidance_start and guidance_stop are {start} and {stop}: guidance needs start < stop, "
            f"both at most {num_timesteps} (a stop of 0 is {num_timesteps})"
        )
    if (start or stop) and evaluation.guidance_scale == 1:
        raise ValueError(
            "evaluation.guidance_start or guidance_stop is set, but guidance_scale is 1, which is no guidance: "
            "set a scale, or leave both at 0"
        )
