"""How are samples scored as they are drawn, so that only some of them are ever kept?

A round of blocks is drawn, and its features and its images' distances to the nearest training images take its place. For
these distances the whole training set is read, so images wait until there are many: memory and disk hold the features of
all samples, but the images of `PIXELS_WAITING` and a round. The scores are those of samples that are all kept, to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from bench.arrays import Trajectory
from bench.data import DataSource
from bench.distance import nearest_squared
from bench.distributed import World
from bench.evaluate import Seconds, Seen, features_of, prepare, score_seen
from bench.files import make_folder, write_bytes_atomically
from bench.method import Method
from bench.protocol import EvalProtocol
from bench.sample import Sampler, Samples
from bench.trajectory import packed, unpacked

FEATURES = "features/"  # before the names of features in a file
PIXELS_WAITING = 4 * 10**9  # bytes on each rank and, while it searches, on its device; 50,000 images of 3 x 256 x 256 are 9.8e9


class SeenRound(NamedTuple):
    """What is kept of a round."""

    part: Path | None  # the file in which rank 0 keeps it
    images: Tensor  # (k, C, H, W) uint8: those that are kept
    waiting: Tensor  # (n, C, H, W) uint8: all images, until their nearest ones are searched for; then (0, C, H, W)
    nearest: Tensor  # (n,) float64, see `Seen`; until then, and without training images, (0,)
    features: dict[str, Tensor]  # see `Seen`
    seconds: float  # that drawing took
    trajectory: Trajectory | None  # of the first round; rank 0 has it


@dataclass(frozen=True)
class Stream:
    """Draws and scores at once, and keeps the first `num_kept` images. All ranks take part, and all get the same."""

    sampler: Sampler
    protocol: EvalProtocol
    data: DataSource
    num_kept: int

    def run(
        self,
        method: Method,
        device: torch.device,
        world: World,
        parts: Path | None = None,
        pause: Callable[[], None] = lambda: None,
        references: Path | None = None,
        seconds: Seconds | None = None,
    ) -> tuple[Samples, dict[str, float]]:
        """The images that are kept, and the scores of all. Rounds are kept in `parts` and found there, as by `Sampler.draw`;
        `pause` is called before each round and each reading of the training set.
        """
        seconds = Seconds() if seconds is None else seconds
        prepare(self.protocol, self.data, str(device), world)
        rounds = self.sampler.rounds(world.size, self.protocol.feature_batch_size)
        done: list[SeenRound] = []
        for blocks in rounds:
            pause()
            name = f"seen-{blocks[0]:06d}-{len(blocks)}-{self.num_kept}.safetensors"
            part = parts / name if parts and len(rounds) > 1 else None
            done.append(_find(part, device, world) or self._round(method, blocks, device, world, part, seconds))
            if blocks is rounds[-1] or sum(one.waiting.nbytes for one in done) >= PIXELS_WAITING:
                pause()
                done = self._search(done, device, world, seconds)
        count, drawing = self.protocol.num_samples, sum(one.seconds for one in done)
        features = {name: torch.cat([one.features[name] for one in done]) for name in done[0].features}
        seen, labels = Seen(features, torch.cat([one.nearest for one in done])), self.sampler.labels(count)
        scores = score_seen(seen, labels, self.protocol, self.data, str(device), world, references, seconds)
        images = torch.cat([one.images for one in done])
        how = count / drawing, self.sampler.num_evaluations, done[0].trajectory
        return Samples(images, labels[: len(images)], *how), scores

    def _round(
        self, method: Method, blocks: list[int], device: torch.device, world: World, part: Path | None, seconds: Seconds
    ) -> SeenRound:
        drawn = self.sampler.draw_round(method, blocks, device, world)
        features = features_of(drawn.images, self.protocol, str(device), world, seconds)
        num_before = blocks[0] * self.sampler.evaluation.block_size
        images = drawn.images[: max(self.num_kept - num_before, 0)].clone()  # a slice would hold on to all
        waiting = drawn.images if len(self.data.train) else images[:0].clone()
        nearest = torch.empty(0, dtype=torch.float64)
        seen = SeenRound(part, images, waiting, nearest, features, drawn.seconds, drawn.trajectory)
        _write([seen], world)
        return seen

    def _search(self, done: list[SeenRound], device: torch.device, world: World, seconds: Seconds) -> list[SeenRound]:
        """The rounds, after the training set was read once for all images that wait."""
        waiting = [one for one in done if len(one.waiting)]
        if not waiting:
            return done
        with seconds.of("comparison"):
            nearest = nearest_squared([one.waiting for one in waiting], self.data.train, str(device), world)
        of_rounds = nearest.split([len(one.waiting) for one in waiting])
        nothing = waiting[0].waiting[:0].clone()  # a slice would hold on to all
        searched = [one._replace(waiting=nothing, nearest=own) for one, own in zip(waiting, of_rounds, strict=True)]
        _write(searched, world)
        in_order = iter(searched)
        return [next(in_order) if len(one.waiting) else one for one in done]


def _find(part: Path | None, device: torch.device, world: World) -> SeenRound | None:
    """What an earlier process has kept in `part`, if anything."""
    if part is None or not world.decide(part.exists(), device):
        return None
    with world.together():
        found = _read(part, world)
    num_waiting = world.of_all(len(found.waiting))
    if len(set(num_waiting)) > 1:
        raise ValueError(f"{part} has {num_waiting} images that wait, by rank: start again when its folder is the same to all")
    return found


def _write(rounds: list[SeenRound], world: World) -> None:
    """Each into its file, in place of what it holds."""
    with world.together():
        for one in rounds if world.is_main else []:
            if one.part:
                make_folder(one.part.parent)
                tensors = {FEATURES + name: features for name, features in one.features.items()} | packed(one.trajectory)
                tensors |= {"images": one.images, "seconds": torch.tensor(one.seconds, dtype=torch.float64)}
                tensors |= {"waiting": one.waiting} if len(one.waiting) else {"nearest": one.nearest}
                write_bytes_atomically(one.part, save(tensors))


def _read(part: Path, world: World) -> SeenRound:
    tensors = load_file(part)
    features = {name.removeprefix(FEATURES): tensors[name] for name in tensors if name.startswith(FEATURES) and world.is_main}
    images = tensors["images"]
    waiting = tensors.get("waiting", images[:0].clone())
    nearest = tensors.get("nearest", torch.empty(0, dtype=torch.float64))
    return SeenRound(part, images, waiting, nearest, features, float(tensors["seconds"]), unpacked(tensors))
