"""How well does a run denoise images that it has not seen, timestep by timestep?

Training losses of methods with different intervals or penalties cannot be compared. This is the plain squared error
on the same held-out images, timesteps and noise for every method, seed and point in training, in the same bins of
timesteps.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.config import HeldoutConfig
from bench.data import DataSource
from bench.distributed import World
from bench.intervals import Interval, partition
from bench.method import Method, Probe
from bench.objective import Objective
from bench.randomness import Batch, generator

BLOCK = 64  # images evaluated together; fixed, so that the numbers do not depend on the number of ranks


class HeldoutSet(NamedTuple):
    """Fixed images, noise and times: `images_per_bin` of each bin, timesteps spread evenly over it."""

    bins: tuple[Interval, ...]
    x0: Tensor  # (n, C, H, W)
    noise: Tensor  # (n, C, H, W)
    timestep: Tensor  # (n,) int64, for bins and intervals
    t: Tensor  # (n,) what the network gets: the index or, for rectified flow, the middle of its cell in (0, 1)
    y: Tensor  # (n,)


def make_heldout_set(config: HeldoutConfig, data: DataSource, num_timesteps: int, continuous: bool) -> HeldoutSet:
    """ValueError if there are more bins than timesteps."""
    if config.bins > num_timesteps:
        raise ValueError(f"heldout.bins is {config.bins}, more than the {num_timesteps} timesteps: choose fewer")
    bins = partition(config.bins, num_timesteps)
    per_bin = torch.arange(config.images_per_bin)
    index = torch.cat([b.start + per_bin * b.length // config.images_per_bin for b in bins])
    x0, y = data.heldout.batch(torch.arange(len(index)) % len(data.heldout))
    noise = torch.randn(x0.shape, generator=generator(0, "held-out noise"))
    return HeldoutSet(bins, x0, noise, index, (index + 0.5) / num_timesteps if continuous else index, y)


def heldout_losses(method: Method, objective: Objective, held: HeldoutSet, world: World, device: torch.device) -> list[float]:
    """The mean squared error of each bin."""
    return bin_means(held, item_losses(method, objective, held, world, device, method.intervals))


@torch.no_grad()
def item_losses(
    method: Method, objective: Objective, held: HeldoutSet, world: World, device: torch.device, intervals: Iterable[Interval]
) -> Tensor:
    """(n,) float64: the squared error of each image whose timestep lies in one of `intervals`, and nought for the others."""
    losses = torch.zeros(len(held.timestep), dtype=torch.float64)
    block_number = 0
    for interval in intervals:
        rows = items_of(held, interval)
        mine = []
        for block in rows.split(BLOCK):
            if block_number % world.size == world.rank and len(block):
                mine.append(block)
            block_number += 1
        if not mine:
            continue
        denoiser = method.specialise(interval)
        for block in mine:
            batch = Batch(held.x0[block], held.noise[block], held.t[block], held.y[block], interval).to(device)
            x_t = objective.noised(batch.x0, batch.t, batch.noise)
            terms = objective.terms(denoiser(x_t, batch.t, batch.y), x_t, batch)
            losses[block] = next(iter(terms.values())).double().cpu()
        del denoiser  # before the next one is made
    return world.sum(losses.to(device)).cpu()


def items_of(held: HeldoutSet, interval: Interval) -> Tensor:
    """(k,): which images of the set have their timestep in an interval."""
    return torch.nonzero((held.timestep >= interval.start) & (held.timestep < interval.stop)).squeeze(1)


def bin_means(held: HeldoutSet, losses: Tensor) -> list[float]:
    return [float(losses[items_of(held, place)].mean()) for place in held.bins]


def bin_rows(held: HeldoutSet, losses: Tensor) -> list[dict[str, Any]]:
    """What `metrics.jsonl` tells of the losses (n,), one line per bin."""
    return [
        {"bin": place.index, "start": place.start, "stop": place.stop, "loss": loss, "n": len(items_of(held, place))}
        for place, loss in zip(held.bins, bin_means(held, losses), strict=True)
    ]


def item_row(held: HeldoutSet, losses: Tensor, intervals: Iterable[Interval]) -> dict[str, Any]:
    """What a job that trains only these intervals tells of the losses (n,): for `joined_items`."""
    items = torch.cat([items_of(held, interval) for interval in intervals])
    return {"items": items.tolist(), "losses": losses[items].tolist()}


def joined_items(held: HeldoutSet, rows: Iterable[Mapping[str, Any]]) -> Tensor:
    """(n,) float64: the losses that jobs have told of, each of its intervals; ValueError unless they are all there."""
    losses = torch.full((len(held.timestep),), torch.nan, dtype=torch.float64)
    told: list[int] = []
    for row in rows:
        losses[torch.tensor(row["items"], dtype=torch.int64)] = torch.tensor(row["losses"], dtype=torch.float64)
        told += row["items"]
    if sorted(told) != list(range(len(losses))):
        raise ValueError(
            f"the experts have told of {len(told)} held-out losses where there are {len(losses)}, each once: "
            "delete the run folder to train again"
        )
    return losses


def probe_of(held: HeldoutSet, objective: Objective, device: torch.device) -> Probe:
    """The held-out set, noised: what routing is looked at on."""
    x_t = objective.noised(held.x0, held.t, held.noise)
    return Probe(x_t.to(device), held.t.to(device), held.y.to(device))
