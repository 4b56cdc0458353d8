"""What does a sharded run do that an ordinary one does not? It begins in parts, and is gathered when it is trained.

Only training is sharded. Sampling and scoring take one copy of the weights and one of the averages on each device.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from bench import sharded_checkpoint
from bench.config import RunConfig
from bench.data import DataSource
from bench.distributed import World
from bench.flops import Cost, measure
from bench.method import Method
from bench.recompute import blocks_of
from bench.sharded_start import draw_parts, make_empty
from bench.sharding import shard
from bench.trainer import Trainer

Build = Callable[[], Method]


def check(config: RunConfig, folder: Path, world: World, trained: bool) -> bool:
    """Whether the run is to be trained in parts, on all ranks; ValueError if it cannot, or was begun in the other way."""
    device = torch.device(config.system.device)
    if world.decide(trained, device):
        return False
    with world.together():
        sharded_checkpoint.check(config, folder, world)
    return config.system.shard == "full"


def begin(build: Build, config: RunConfig, world: World) -> Method:
    """The method that `build()` makes, with its initial weights, of which no rank has more than its part."""
    method, parts = draw_parts(build, world.rank, world.size)
    check_compiled(config, method)
    return shard(method, torch.device(config.system.device), parts)


def check_compiled(config: RunConfig, method: Method) -> None:
    """ValueError in one sentence where `system.compile` does not go with sharding."""
    if config.system.compile == "cuda_graphs":
        raise ValueError(
            "system.shard is full, and system.compile=cuda_graphs replays fixed memory, which gathered weights do not have: "
            "set it to blocks or none"
        )
    units = set(method.units())
    nested = any(module in units for block in blocks_of(method) for module in block.modules() if module is not block)
    if config.system.compile != "none" and nested:
        raise ValueError(
            f"system.shard is full, and the blocks of {type(method).__name__} gather some of their weights apart, so that none "
            "is one graph to compile: set system.compile=none"
        )


def cost_of(build: Build, data: DataSource) -> Cost:
    """As `bench.flops.measure`, without weights."""
    with torch.device("meta"):
        method = build()
    return measure(method, (data.channels, data.input_size, data.input_size), data.num_classes)


def gathered(trainer: Trainer, build: Build) -> Trainer:
    """An ordinary trainer, to sample and score what a sharded one has trained, which lets go of all that it holds."""
    path = sharded_checkpoint.gather(trainer)
    trainer.optimizer.state.clear()
    trainer.ema.averages.clear()
    trainer.method.to_empty(device="meta")
    method = make_empty(build, trainer.device)
    config, world = trainer.config, trainer.world
    other = Trainer(method, config, trainer.data, trainer.folder, world, trainer.cost, should_stop=trainer.should_stop)
    sharded_checkpoint.take_whole(other, path)
    return other
