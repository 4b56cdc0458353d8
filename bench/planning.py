"""What would a suite run, what does each run cost, and may they be compared? Nothing is written and nothing allocated.

Of the data, no image is read. A plan that is only looked at does without latents that are not here: a network's cost depends
on their size, which the configuration gives, and on channels and classes, which are then taken to be those of ImageNet's.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from bench import job, shares, switches
from bench.budget import plan as plan_budget
from bench.config import RunConfig, SystemConfig
from bench.data import DataSource, load_data
from bench.distributed import World
from bench.flops import Cost, measure
from bench.memory import Memory, training_memory, trains_fused_attention
from bench.method import Method
from bench.pixels import EMBEDDED
from bench.protocol import pixels_to_score
from bench.published.costs import Latents
from bench.sample import make_sampler
from bench.suite import SuiteRun

EQUAL_WITHIN = 0.01


@dataclass(frozen=True)
class PlannedRun:
    """A run of a suite, and what it will take."""

    run: SuiteRun
    num_images: float  # nan where the budget is a time
    train_flops: float  # nan where the budget is a time
    device_seconds: float  # nan unless the budget is a time
    memory: Memory  # of one rank, an estimate
    stored_parameters: int
    active_parameters: int
    forward_macs_per_image: float
    missing: tuple[str, ...] = ()  # files that the run needs and that are not here

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def memory_bytes(self) -> int:
        return self.memory.total

    @property
    def label(self) -> str:
        return self.config.label or self.config.method

    def device_hours(self, teraflops: float) -> float:
        """An estimate, at that speed of one device."""
        seconds = self.train_flops / (teraflops * 1e12) if self.train_flops == self.train_flops else self.device_seconds
        return seconds / 3600


def plan_runs(runs: Iterable[SuiteRun], world_size: int = 1, only_look: bool = False) -> list[PlannedRun]:
    """In order, each once, also one that is in two groups. ValueError in one sentence for a run that is not possible, or budgets
    that are not equal.

    `only_look`: files that are not here are named in the plan, instead of being a reason to refuse it.
    """
    planned = [_plan(run, world_size, only_look) for run in runs]
    check_equal(planned)
    return list({each.config.run_id: each for each in planned}.values())


def check_equal(planned: list[PlannedRun]) -> None:
    """ValueError that names the runs, unless the budgets of each group agree within 1% in one unit."""
    groups: dict[str, list[PlannedRun]] = defaultdict(list)
    for each in planned:
        groups[each.run.group].append(each)
    for name, group in groups.items():
        one, other = min(group, key=_spent), max(group, key=_spent)
        if of_other_unit := [each for each in group if each.config.budget.unit != group[0].config.budget.unit]:
            one, other = group[0], of_other_unit[0]
        if of_other_unit or _spent(other) > _spent(one) * (1 + EQUAL_WITHIN):
            where = f"group {name}" if name else "this suite"
            raise ValueError(
                f"the budgets of {where} are not equal within 1%: {_named(one)}, {_named(other)}; "
                "give all its runs the same budget, or put them into groups of their own"
            )


def _spent(planned: PlannedRun) -> float:
    """What whole steps make of the budget, in its unit."""
    of_unit = {"images": planned.num_images, "train_flops": planned.train_flops, "device_seconds": planned.device_seconds}
    return of_unit[planned.config.budget.unit]


def _named(planned: PlannedRun) -> str:
    config = planned.config
    return f"{config.run_id} ({planned.label}) has {_spent(planned):,.0f} {config.budget.unit}"


def _plan(run: SuiteRun, world_size: int, only_look: bool) -> PlannedRun:
    config = run.config
    missing = missing_files(config) if only_look else ()
    if not missing:
        data = load_data(config.data)
        make_sampler(config.diffusion, config.evaluation, config.model, data)
        pixels_to_score(config.evaluation, data)
    batch, num_passes = config.train.batch_size, shares.num_passes(config.train, world_size)
    network = _Network.of(config)
    method, cost = _measured(network)
    shares.shares_of(config.train, method, World(0, world_size))  # so that the passes are equal
    num_steps = plan_budget(config.budget, cost, batch, num_passes).num_steps
    timed = num_steps is None
    return PlannedRun(
        run,
        float("nan") if num_steps is None else num_steps * batch,
        float("nan") if num_steps is None else num_steps * cost.train_flops(batch, num_passes),
        config.budget.amount if timed else float("nan"),
        _memory(
            network,
            batch // num_passes,
            world_size,
            config.system,
            config.train.precision,
            config.train.ema_half_life_images > 0,
            config.train.intervals_per_step == 1,
        ),
        sum(p.numel() for p in method.parameters()),
        method.num_active_parameters(),
        cost.forward_macs_per_image,
        missing,
    )


def missing_files(config: RunConfig) -> tuple[str, ...]:
    """Of the data, and of what scoring needs, what the configuration names and is not here."""
    not_given = "data.path, which is not given" if config.data.name == "latents" else ""
    scoring = config.evaluation
    images = "" if scoring.images == EMBEDDED else scoring.images
    named = (config.data.path or not_given, scoring.extractor_weights, scoring.reference, scoring.autoencoder, images)
    return tuple(path for path in named if path and not Path(path).exists())


def _data(config: RunConfig) -> DataSource | Latents:
    """The data, or what stands for latents that are not here."""
    if config.data.name == "latents" and config.data.image_size and not (config.data.path and Path(config.data.path).exists()):
        return Latents(config.data.image_size)
    return load_data(config.data)


@dataclass(frozen=True)
class _Network:
    """What a step's cost depends on: the same for runs that differ in their seed, learning rate, budget ..."""

    key: str
    config: RunConfig = field(compare=False)

    @staticmethod
    def of(config: RunConfig) -> "_Network":
        facts = (config.method, config.options, asdict(config.model), asdict(config.data), config.diffusion.num_timesteps)
        return _Network(json.dumps(facts), config)


@cache
def _measured(network: _Network) -> tuple[Method, Cost]:
    """The method on the meta device, and its cost."""
    data = _data(network.config)
    with torch.device("meta"):
        method = job.build_method(network.config, data)  # type: ignore[arg-type]  # it asks for dimensions only
    return method, measure(method, (data.channels, data.input_size, data.input_size))


@cache
def _memory(
    network: _Network, num_images: int, world_size: int, system: SystemConfig, precision: str, averaged: bool, one_interval: bool
) -> Memory:
    data = _data(network.config)
    image_shape = (data.channels, data.input_size, data.input_size)
    num_parts = world_size if system.shard == "full" else 1
    fused = trains_fused_attention(system.device, precision)
    method = _measured(network)[0]
    with switches.only_off(switches.parse(system.plain)):
        return training_memory(
            method, image_shape, num_images, num_parts, system.recompute, averaged, precision, fused, one_interval
        )
