"""What do the tests of experts in jobs of their own share? Such jobs, and the run that is assembled of them."""

from pathlib import Path

from training import tiny_config, tiny_trainer

from bench import assemble, experts
from bench.distributed import World
from bench.job import prepare_folder
from bench.runs import expert_folder
from bench.trainer import Trainer

AVERAGED = ("train.lr_schedule=cosine", "train.lr_warmup_images=40", "train.ema_half_life_images=30", "train.lr=0.00003")
APART = "system.experts=separate_jobs"
NUM_EXPERTS = 3


def trainer_of(folder: Path, index: int, *settings: str, world: World | None = None) -> Trainer:
    """As an expert's job makes it, in a folder that is prepared."""
    place = expert_folder(folder, index)
    config = tiny_config("multi_expert", APART, *settings)
    if world is None or world.is_main:
        experts.begin(config, folder)
        prepare_folder(config, place)
    return tiny_trainer("multi_expert", APART, *settings, folder=place, world=world, experts=frozenset({index}))


def train_apart(folder: Path, *settings: str) -> Path:
    for index in range(NUM_EXPERTS):
        experts.train_expert(trainer_of(folder, index, *settings))
    return folder


def assembled(folder: Path, *settings: str) -> Trainer:
    """As the run's job makes it, and assembles it."""
    prepare_folder(tiny_config("multi_expert", APART, *settings), folder)
    trainer = tiny_trainer("multi_expert", APART, *settings, folder=folder)
    assemble.assemble(trainer)
    return trainer
