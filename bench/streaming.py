"""How are samples scored as they are drawn, so that only some of them are ever kept?

A round of blocks is drawn and looked at, and its features take its place: memory and disk hold the features of all
samples, but the images of one round alone. The scores are those of samples that are all kept, to the bit.
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
from bench.distributed import World
from bench.evaluate import Seconds, Seen, look_at, prepare, score_seen
from bench.files import make_folder, write_bytes_atomically
from bench.method import Method
from bench.protocol import EvalProtocol
from bench.sample import Sampler, Samples
from bench.trajectory import packed, unpacked

FEATURES = "features/"  # before the names of features in a file


class SeenRound(NamedTuple):
    """What is kept of a round."""

    images: Tensor  # (k, C, H, W) uint8: those that are kept
    seen: Seen
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
        """The images that are kept, and the scores of all. Rounds are kept in `parts` and found there, as by `Sampler.draw`."""
        seconds = Seconds() if seconds is None else seconds
        prepare(self.protocol, self.data, str(device), world)
        rounds = self.sampler.rounds(world.size, self.protocol.feature_batch_size)
        done: list[SeenRound] = []
        for blocks in rounds:
            pause()
            name = f"seen-{blocks[0]:06d}-{len(blocks)}-{self.num_kept}.safetensors"
            part = parts / name if parts and len(rounds) > 1 else None
            found = _read(part, world) if part and world.decide(part.exists(), device) else None
            done.append(found or self._round(method, blocks, device, world, part, seconds))
        count, drawing = self.protocol.num_samples, sum(one.seconds for one in done)
        seen = _joined([one.seen for one in done])
        labels = self.sampler.labels(count)
        scores = score_seen(seen, labels, self.protocol, self.data, str(device), world, references, seconds)
        images = torch.cat([one.images for one in done])
        how = count / drawing, self.sampler.num_evaluations, done[0].trajectory
        return Samples(images, labels[: len(images)], *how), scores

    def _round(
        self, method: Method, blocks: list[int], device: torch.device, world: World, part: Path | None, seconds: Seconds
    ) -> SeenRound:
        drawn = self.sampler.draw_round(method, blocks, device, world)
        seen = look_at(drawn.images, self.protocol, self.data, str(device), world, seconds)
        num_before = blocks[0] * self.sampler.evaluation.block_size
        images = drawn.images[: max(self.num_kept - num_before, 0)].clone()  # a slice would hold on to all
        if part and world.is_main:
            make_folder(part.parent)
            tensors = {FEATURES + name: features for name, features in seen.features.items()}
            tensors |= {"nearest": seen.nearest, "images": images, "seconds": torch.tensor(drawn.seconds, dtype=torch.float64)}
            write_bytes_atomically(part, save(tensors | packed(drawn.trajectory)))
        return SeenRound(images, seen, drawn.seconds, drawn.trajectory)


def _read(part: Path, world: World) -> SeenRound:
    tensors = load_file(part)
    features = {name.removeprefix(FEATURES): tensors[name] for name in tensors if name.startswith(FEATURES) and world.is_main}
    seen = Seen(features, tensors["nearest"])
    return SeenRound(tensors["images"], seen, float(tensors["seconds"]), unpacked(tensors))


def _joined(parts: list[Seen]) -> Seen:
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    return Seen(features, torch.cat([part.nearest for part in parts]))
