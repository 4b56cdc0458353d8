"""How is a step's batch divided between intervals, ranks and passes?

By default a step trains one interval: its batch is shared by the ranks, and each rank cuts its rows into
`train.micro_batches` passes. With `train.intervals_per_step` N above 1 the batch is first cut into N equal parts, and each
draws an interval of its own; a rank has N / ranks of the parts, each cut into passes, and the gradient is the mean over
all. With N = ranks each rank draws its own, as published code does; but what a run trains is told by N, and is the same on
any number of ranks that divides it. What ranks then send each other are the gradients of all parameters, where a common
interval may need no more than those of one network (`Method.one_step`).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.config import RunConfig, TrainConfig
from bench.data import DataSource
from bench.distributed import World
from bench.intervals import Interval, interval_at_step
from bench.method import Method
from bench.randomness import Batch, draw_batch, draw_timesteps


class Share(NamedTuple):
    """What one rank trains of one interval in every step."""

    place: int  # of the interval, among those that a step draws
    rows: slice  # of the global batch


def shares_of(train: TrainConfig, method: Method, world: World) -> list[Share]:
    """This rank's; ValueError in one sentence where the batch cannot be divided so."""
    num_intervals = train.intervals_per_step
    if num_intervals > 1 and not method.intervals_share_parameters:
        raise ValueError(
            f"train.intervals_per_step is {num_intervals}, which is for methods of several intervals that all train the same "
            f"parameters, and {type(method).__name__} is none: set it to 1"
        )
    if num_intervals > 1 and num_intervals % world.size:
        raise ValueError(
            f"train.intervals_per_step {num_intervals} cannot be shared equally by {world.size} ranks: choose a multiple of "
            f"{world.size}, or 1, an interval for all ranks together"
        )
    if num_intervals == 1 and train.batch_size % world.size:
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be shared equally by {world.size} ranks: choose a multiple of "
            f"{world.size}, or another number of ranks"
        )
    if num_intervals == 1:
        shares = [Share(0, world.slice_of(train.batch_size))]
    else:
        size = train.batch_size // num_intervals
        own = range(num_intervals)[world.slice_of(num_intervals)]
        shares = [Share(place, slice(place * size, (place + 1) * size)) for place in own]
    num_images = shares[0].rows.stop - shares[0].rows.start
    if num_images % train.micro_batches:
        place, more = (" and interval", ", or a smaller train.intervals_per_step") if num_intervals > 1 else ("", "")
        raise ValueError(
            f"{num_images} image{'s' if num_images > 1 else ''} per rank{place} cannot be cut into {train.micro_batches} "
            f"micro-batches: choose a divisor for train.micro_batches{more}"
        )
    return shares


def num_passes(train: TrainConfig, world_size: int) -> int:
    """Forward passes of a step, over all ranks."""
    return train.micro_batches * max(train.intervals_per_step, world_size)


def intervals_of(step: int, method: Method, config: RunConfig) -> tuple[Interval, ...]:
    """Those that optimiser step `step` (from 0) trains, over all ranks: the next of the cycles in which they are drawn."""
    num_intervals = config.train.intervals_per_step
    draws = range(step * num_intervals, (step + 1) * num_intervals)
    return tuple(interval_at_step(draw, method.intervals, config.seed) for draw in draws)


def draw_shares(
    step: int, intervals: tuple[Interval, ...], shares: Sequence[Share], config: RunConfig, data: DataSource, progress: float
) -> list[Batch]:
    """A rank's batches of optimiser step `step` (from 0), which trains these intervals: one of each of its shares.

    Shares lie side by side, and only timesteps follow from the interval: the rest is drawn once, for all of them.
    """
    rows = slice(shares[0].rows.start, shares[-1].rows.stop)
    drawn = draw_batch(step, intervals[shares[0].place], config, data, progress, rows)
    batches = []
    for share, part in zip(shares, drawn.cut(len(shares)), strict=True):
        interval = intervals[share.place]
        if interval != part.interval:
            part = part._replace(t=draw_timesteps(step, interval, config)[share.rows], interval=interval)
        batches.append(part._replace(intervals_of_step=intervals))
    return batches


def draw_step(
    step: int, method: Method, own: Collection[Interval], shares: Sequence[Share], config: RunConfig, data: DataSource
) -> list[Batch]:
    """As `draw_shares`, but for how far training is by then; nothing where the step trains no interval of one's `own`."""
    intervals = intervals_of(step, method, config)
    return draw_shares(step, intervals, shares, config, data, progress=0.0) if intervals[0] in own else []


def losses_of_all(own: Sequence[dict[str, Tensor]], num_intervals: int, world: World) -> list[dict[str, Tensor]]:
    """The mean losses of each interval that a step trained, on every rank, from those of this rank's shares."""
    if num_intervals == 1:
        return [world.mean(own[0])]
    table = torch.stack([torch.stack([loss.float() for loss in losses.values()]) for losses in own])  # (shares, losses)
    return [dict(zip(own[0], row.unbind(), strict=True)) for row in world.gather(table)]


def mean(losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of scalars, name by name."""
    if len(losses) == 1:
        return losses[0]
    return {name: torch.stack([each[name] for each in losses]).mean(dim=0) for name in losses[0]}
