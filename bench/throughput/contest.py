"""What is timed, and beside what? Contestants, from the words of the command line to configurations."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import NamedTuple

import torch

from bench import job
from bench.compiled import check_device
from bench.config import RunConfig
from bench.settings import flat_settings

CHANNELS, INPUT_SIZE, NUM_CLASSES = 4, 32, 1000  # the latents of 256x256 ImageNet
PLAIN, FP32 = "naive", "fp32"  # baselines that are no method
PRECISIONS = ("fp32", "bf16")
NUM_SAMPLING_STEPS = 250
FIXED = {  # what a row says of its contestant, by setting (or part of the settings) -> the flag that says it
    "method": "--methods",
    "options": "--methods",
    "model": "--size",
    "train.batch_size": "--batch",
    "train.precision": "--precision",
    "train.threads": "--threads",
    "evaluation.steps": "",
    "evaluation.block_size": "--batch",
    "evaluation.guidance_scale": "--guidance",
    "evaluation.precision": "--precision",
    "system.device": "--device",
    "system.compile": "--compile",
    "system.compile_sampling": "--compile",
}


@dataclass(frozen=True)
class Contestant:
    """A method in one setting. `method` is its name and, after a colon, its options: NAME:OPTION=VALUE,OPTION=VALUE."""

    method: str
    size: str
    batch_size: int
    precision: str = "fp32"
    compiled: str = "none"  # as system.compile
    plain: bool = False

    @property
    def label(self) -> str:
        words = [self.method, self.size, f"batch {self.batch_size}", self.precision]
        return " ".join([*words, *[f"compiled ({self.compiled})"] * (self.compiled != "none"), *["naive"] * self.plain])


@dataclass(frozen=True)
class Setup:
    """What all contestants share."""

    device: str = "cpu"
    threads: int = 1
    guidance_scale: float = 1.5
    settings: tuple[str, ...] = ()  # key=value


def contestants(
    methods: Sequence[str], sizes: Sequence[str], batches: Sequence[int], precisions: Sequence[str], compiled: str
) -> list[Contestant]:
    """All combinations, those of one size and batch size together. ValueError for words that are not allowed."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"--precision is {precision!r}: choose from {', '.join(PRECISIONS)}")
    for batch in batches:
        if batch < 1:
            raise ValueError(f"--batch is {batch}: give at least 1")
    every = [Contestant(m, s, b, p, compiled) for s, b, m, p in product(sizes, batches, methods or job.OPTIONS, precisions)]
    return list(dict.fromkeys(every))


def baseline_of(contestant: Contestant, against: str) -> Contestant | None:
    """What a contestant is compared with; None if it is that itself. A baseline in plain code is never compiled."""
    if against == PLAIN:
        baseline = replace(contestant, plain=True, compiled="none")
    elif against == FP32:
        baseline = replace(contestant, precision=FP32)
    else:
        baseline = replace(contestant, method=against)
    return None if baseline == contestant or (contestant.plain and against != FP32) else baseline


def with_baselines(chosen: Sequence[Contestant], against: Iterable[str]) -> list[Contestant]:
    """Each once: by method in the order given, then precision, plain code before ours."""
    beside = {baseline_of(contestant, name) for contestant in chosen for name in against} - {None}
    every = list(dict.fromkeys([*chosen, *sorted((each for each in beside if each), key=lambda each: each.label)]))
    methods = list(dict.fromkeys(each.method for each in every))
    return sorted(every, key=lambda e: (methods.index(e.method), PRECISIONS.index(e.precision), not e.plain))


def config_of(contestant: Contestant, setup: Setup) -> RunConfig:
    """The run that would train it. ValueError in one sentence for what is not allowed."""
    name, _, options = contestant.method.partition(":")
    chosen = [f"options.{option}" for option in options.split(",") if option]
    settings = [
        f"method={name}",
        *chosen,
        *model_settings(contestant.size),
        "diffusion.schedule=linear",
        f"train.batch_size={contestant.batch_size}",
        "train.lr=1e-4",
        "train.ema_half_life_images=500000",
        f"train.precision={contestant.precision}",
        f"train.threads={setup.threads}",
        *("heldout.bins=1", "heldout.images_per_bin=1"),
        f"evaluation.steps={NUM_SAMPLING_STEPS}",
        f"evaluation.block_size={contestant.batch_size}",
        f"evaluation.guidance_scale={setup.guidance_scale}",
        f"evaluation.precision={contestant.precision}",
        f"system.device={setup.device}",
        *([f"system.compile={contestant.compiled}", "system.compile_sampling=true"] if contestant.compiled != "none" else []),
    ]
    config = job.make_config({}, [*settings, *setup.settings])
    check_fixed(job.make_config({}, settings), config, {option.partition("=")[0] for option in chosen})
    check_device(config.system.compile, torch.device(setup.device))
    if config.evaluation.sampler == "dpm_solver":
        raise ValueError("evaluation.sampler is dpm_solver, whose steps need those before and are not timed alone: leave it out")
    return config


def check_fixed(wanted: RunConfig, config: RunConfig, chosen: Collection[str]) -> None:
    """ValueError for free settings that change what a row says. Of options they may change what was not `chosen`."""
    before, after = flat_settings(asdict(wanted)), flat_settings(asdict(config))
    for name, flag in FIXED.items():
        for key in (key for key in before if key == name or key.startswith(f"{name}.")):
            if before[key] != after.get(key) and (name != "options" or key in chosen):
                raise ValueError(
                    f"{key} is what {flag} says: give that" if flag else f"{key} is {before[key]} here: leave it out"
                )


def model_settings(size: str) -> list[str]:
    """`XL/2`, or `DEPTHxWIDTHxHEADS/PATCH` for a network that has no name."""
    dimensions = re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)", size)
    if dimensions is None:
        return [f"model.size={size}"]
    names = ("depth", "width", "num_heads", "patch_size")
    return [f"model.{name}={value}" for name, value in zip(names, dimensions.groups(), strict=True)]


class Group(NamedTuple):
    """What is timed in turns, and in memory at the same time."""

    beside: str  # the method that the others stand beside; "" where all are together
    contestants: list[Contestant]


def groups_of(chosen: Iterable[Contestant], against: Sequence[str], together: bool) -> list[Group]:
    """By size and batch size; each method with its baselines, or all together."""
    groups: dict[tuple[str, int, str], list[Contestant]] = {}
    for each in chosen:
        groups.setdefault((each.size, each.batch_size, "" if together else each.method), []).append(each)
    return [Group(beside, with_baselines(group, against)) for (_, _, beside), group in groups.items()]
