"""What does a sharded run do that an ordinary one does not? It begins in parts, and is gathered when it is trained.

Only training is sharded. Sampling and scoring take one whole network on each device: the averages, where there are some.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from bench import sharded_checkpoint
from bench.config import RunConfig
from bench.data import DataSource
from bench.distributed import World, local
from bench.flops import Cost, measure
from bench.lease import Held
from bench.method import Method
from bench.recompute import blocks_of
from bench.sharded_start import draw_parts, make_empty
from bench.sharding import shard
from bench.trainer import Trainer

Build = Callable[[], Method]


def check(config: RunConfig, folder: Path, world: World, trained: bool) -> bool:
    """Whether the run is to be trained in parts; ValueError if it cannot, or was begun in the other way. All ranks call this,
    and have agreed on whether it is `trained`.
    """
    if trained:
        return False
    with world.together():
        sharded_checkpoint.check(config, folder, world)
    return config.system.shard == "full"


def begin(build: Build, config: RunConfig, world: World, was_trained: bool) -> Method:
    """The method that `build()` makes, with its initial weights, of which no rank has more than its part; once it is trained,
    the whole one, whose weights are to be restored.
    """
    if was_trained:
        return make_empty(build, torch.device(config.system.device))
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
    return measure(method, (data.channels, data.input_size, data.input_size))


def restore(trainer: Trainer) -> None:
    """What a trained run has come to, into a trainer that was not made in parts. Held if it was: another job has trained the
    run since this one looked. All ranks call this.
    """
    if trainer.is_sharded:
        assert trainer.folder is not None
        raise Held(f"run {trainer.folder.name} was trained meanwhile by another job: start it again to score it")
    trainer.restore()


def gathered(trainer: Trainer, build: Build) -> Trainer:
    """An ordinary trainer, only to be scored, of what a sharded one has trained, which lets go of all that it holds."""
    path = sharded_checkpoint.gather(trainer)
    trainer.optimizer.state.clear()
    trainer.ema.averages.clear()
    for parameter in trainer.method.parameters():
        local(parameter).untyped_storage().resize_(0)  # FSDP refers to it, and who called us to the method
    trainer.method.to_empty(device="meta")
    method = make_empty(build, trainer.device)
    config, world = trainer.config, trainer.world
    should_stop = trainer.should_stop
    other = Trainer(method, config, trainer.data, trainer.folder, world, trainer.cost, should_stop=should_stop, only_scored=True)
    sharded_checkpoint.take_whole(other, path)
    return other
