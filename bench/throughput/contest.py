"""What is timed, and beside what? Contestants, from the words of the command line to configurations."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from bench import job
from bench.config import RunConfig

CHANNELS, INPUT_SIZE, NUM_CLASSES = 4, 32, 1000  # the latents of 256x256 ImageNet
PLAIN, FP32 = "naive", "fp32"  # baselines that are no method
PRECISIONS = ("fp32", "bf16")
NUM_SAMPLING_STEPS = 250


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
    settings = [
        f"method={name}",
        *(f"options.{option}" for option in options.split(",") if option),
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
    return job.make_config({}, [*settings, *setup.settings])


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
