"""What does one run do, from its configuration to `done`? The entry point of every job, on a laptop or a cluster.

Everything that can be refused is refused before anything is written. A run that is interrupted anywhere goes on from
its last checkpoint when the same command is given again.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import checkpoint, experts, sharded_run
from bench.assemble import assemble, summary_of_jobs
from bench.config import RUN, RunConfig
from bench.data import DataSource, load_data
from bench.distributed import World, choose_gpu, world_from_environment
from bench.files import write_json_atomically, write_text_atomically
from bench.finish import NOT_SCORED, REFERENCES, Finisher, is_scored_by, look_inside
from bench.finish import is_trained as is_trained
from bench.flops import Cost
from bench.method import Method, load_exactly
from bench.pixels import pixels_of
from bench.prepare import place_config as place_config
from bench.prepare import prepare_folder as prepare_folder
from bench.protocol import hashed_by_rank_0, pixels_to_score, protocol_of
from bench.provenance import code_difference, code_files, imported_methods
from bench.run_folder import held, left_cause, read_back, summary_of
from bench.run_folder import locked as locked
from bench.runs import Run, expert_folder, read_run
from bench.sample import make_sampler
from bench.settings import flat_settings, resolve
from bench.trainer import Interrupted, Trainer, never
from methods import METHODS
from methods.backbone import DiT
from methods.initial import build, option_defaults
from methods.released import read_weights

PARTS = ("model.", "ema.")  # of a checkpoint: the weights, and the averages to use in their place
OPTIONS = {name: option_defaults(method) for name, method in METHODS.items()}


def make_config(tree: dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """A resolved configuration; ValueError in one sentence for anything that is not allowed."""
    return resolve(tree, overrides or [], OPTIONS)


def read_config(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of an existing run folder; ValueError if the overrides would make it another run."""
    tree = read_run(folder).config
    config = make_config(tree)
    missing = sorted(set(flat_settings(config.scientific)) - set(flat_settings(tree)))
    if missing:  # a default in its place could be another network; of scoring, the protocol's hash would tell
        raise ValueError(
            f"{folder / 'config.yaml'} lacks {', '.join(missing[:5])}: add what the run was started with, or start it again"
        )
    changed = make_config(tree, overrides)
    if changed.run_id != config.run_id:
        raise ValueError(
            f"the settings {' '.join(overrides or [])} make another run than the one in {folder}, where only evaluation.* and "
            "system.* can change: train it on its own"
        )
    return changed


def find_device(name: str) -> torch.device:
    """Which of several GPUs is this rank's is chosen here, and that float32 is computed as such. ValueError in one sentence
    unless the device can be used.
    """
    try:
        device = torch.device(name)
        choose_gpu(device)
        torch.backends.cudnn.allow_tf32 = False  # as by default for matrix products
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"system.device is {name!r}, which cannot be used here ({reason}): choose cpu or cuda") from None
    return device


def build_method(config: RunConfig, data: DataSource) -> Method:
    """The method with its initial weights, before any training."""
    return build(
        METHODS[config.method],
        asdict(config.model),
        config.options,
        seed=config.seed,
        num_timesteps=config.diffusion.num_timesteps,
        input_size=data.input_size,
        channels=data.channels,
        num_classes=data.num_classes,
    )


def work_on(
    folder: Path, expert: int | None = None, should_stop: Callable[[], bool] = never, is_dead: Callable[[str], bool] | None = None
) -> bool:
    """What a job does: go on with the run in a folder, as one of the ranks that the environment names. Whether it came to its
    end; if not, it was asked to stop, and everything is saved.
    """
    config = read_config(folder)
    with world_from_environment(find_device(config.system.device)) as world:
        try:
            run(config, folder, world, should_stop, expert, is_dead)
        except Interrupted:
            return False
    return True


def run(
    config: RunConfig,
    folder: Path,
    world: World | None = None,
    should_stop: Callable[[], bool] = never,
    expert: int | None = None,
    is_dead: Callable[[str], bool] | None = None,
) -> None:
    """Train, look inside, sample and score one run, as far as it is not done already. Raises ValueError for user errors,
    Diverged for a loss that is not finite, and Interrupted when `should_stop` said so: the same call goes on from there.

    `expert`: where experts train in jobs of their own, only this one; the last job puts the run together. `is_dead`: whether
    a job of the cluster that seems to hold the run is known to have ended.
    """
    world = world or World()
    device = find_device(config.system.device)
    with world.together():  # a folder or a library may be missing on one machine
        data = load_data(config.data)
        pixels = pixels_to_score(config.evaluation, data)
        experts.check_folder(config, folder)
        sampler = make_sampler(config.diffusion, config.evaluation, config.model, data, config.system.compile_sampling)
    pixels = pixels and hashed_by_rank_0(pixels, world, folder.parent / REFERENCES)
    build_whole = partial(build_method, config, data)
    if config.system.compile != "none" or config.system.compile_sampling:
        torch.compiler.reset()  # what an earlier run of this process has compiled would count towards the limit on recompiling
    was_trained = world.decide(is_trained(folder), device)
    sharded = sharded_run.check(config, folder, world, was_trained)
    with nullcontext() if sharded else world.together():  # sharded, ranks send messages meanwhile
        method, initial_flops = _initial_method(config, data, folder.parent, world, was_trained)
    apart = _are_apart(config, method, expert)
    if _nothing_is_left(config, pixels, folder, world):
        return
    if apart and not was_trained:
        for index in range(len(method.intervals)) if expert is None else [expert]:
            if not world.decide(experts.is_trained(folder, index), device):
                _train_expert(config, data, folder, world, index, should_stop, is_dead)
        if not world.decide(experts.all_done(folder, len(method.intervals)), device):
            return
    cost = sharded_run.cost_of(build_whole, data) if sharded else None
    trainer = Trainer(method, config, data, folder, world, cost, should_stop=should_stop, only_scored=was_trained)
    with held(trainer, folder, is_dead), left_cause(folder, world):
        if _nothing_is_left(config, pixels, folder, world):  # meanwhile, by the job of another expert
            return
        trained = world.decide(is_trained(folder), device)
        if trained:
            sharded_run.restore(trainer)
        if not (trained and trainer.finished()):  # its last checkpoint may be damaged: the one before is not what is scored
            trainer.prepare_to_train()
            assemble(trainer) if apart else trainer.fit()
            with world.together():
                if world.is_main:
                    summary = summary_of_jobs if apart else summary_of
                    write_json_atomically(folder / "summary.json", summary(trainer, initial_flops))
            if sharded:
                trainer = sharded_run.gathered(trainer, build_whole)
        if pixels:
            Finisher(trainer, sampler, protocol_of(config.evaluation, pixels), pixels, trainer.should_stop).finish()
        else:
            look_inside(trainer)
        with world.together():
            if world.is_main:
                read_back(folder, scored=pixels is not None)
                write_text_atomically(folder / "done", "")
                if not pixels:
                    print(f"run {folder.name} is {NOT_SCORED}", file=sys.stderr, flush=True)


def _are_apart(config: RunConfig, method: Method, expert: int | None) -> bool:
    """Whether experts train in jobs of their own; ValueError if they cannot, or `expert` is none of them."""
    apart = config.system.experts == "separate_jobs"
    if apart:
        experts.check(config, method)
    if expert is not None and not (apart and 0 <= expert < len(method.intervals)):
        allowed = f"choose one of 0 to {len(method.intervals) - 1}" if apart else "only with system.experts=separate_jobs"
        raise ValueError(f"expert {expert} cannot be trained on its own: {allowed}")
    return apart


def _train_expert(
    config: RunConfig,
    data: DataSource,
    folder: Path,
    world: World,
    index: int,
    should_stop: Callable[[], bool],
    is_dead: Callable[[str], bool] | None,
) -> None:
    """In a folder inside the run's."""
    method, _ = _initial_method(config, data, folder.parent, world)
    place = expert_folder(folder, index)
    trainer = Trainer(method, config, data, place, world, experts=frozenset({index}), should_stop=should_stop)
    with world.together():
        if world.is_main:
            experts.begin(config, folder)
    with held(trainer, place, is_dead), left_cause(place, world):
        experts.train_expert(trainer)


def check(config: RunConfig) -> Cost:
    """What training costs; ValueError in one sentence for what cannot be run here. Writes nothing."""
    find_device(config.system.device)
    data = load_data(config.data)
    pixels_to_score(config.evaluation, data)
    make_sampler(config.diffusion, config.evaluation, config.model, data)
    return Trainer(build_method(config, data), config, data).cost


def is_scored(config: RunConfig, folder: Path) -> bool:
    """Whether nothing is left to do for a run."""
    pixels = pixels_of(config.evaluation, load_data(config.data))
    return _nothing_is_left(config, pixels and hashed_by_rank_0(pixels, World(), folder.parent / REFERENCES), folder, World())


def _nothing_is_left(config: RunConfig, pixels: DataSource | None, folder: Path, world: World) -> bool:
    """On every rank. Only for a run that is trained, the images are hashed for it."""
    device = torch.device(config.system.device)
    if not world.decide(is_trained(folder) and (folder / "provenance.json").exists(), device):
        return False
    return pixels is None or world.decide(is_scored_by(folder, protocol_of(config.evaluation, pixels)), device)


def load_trained(folder: Path, overrides: list[str] | None = None) -> tuple[RunConfig, DataSource, Method]:
    """A run's configuration, data and method with its averaged weights; ValueError if there is no sound checkpoint."""
    config = read_config(folder, overrides)
    device = find_device(config.system.device)
    data = load_data(config.data)
    method = build_method(config, data)
    found = checkpoint.load_latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"run {folder} has no checkpoint yet: train it first with `tsbench train {folder}`")
    parts = {part: {n.removeprefix(part): tensor for n, tensor in found.tensors.items() if n.startswith(part)} for part in PARTS}
    load_exactly(method, parts["model."] | parts["ema."], f"the checkpoint in {folder}")
    return config, data, method.to(device)


def num_separate_experts(config: RunConfig) -> int:
    """How many experts of a run are trained in jobs of their own; 0: one job trains all."""
    if config.system.experts != "separate_jobs":
        return 0
    data = load_data(config.data)
    with torch.device("meta"):
        method = build_method(config, data)
    experts.check(config, method)
    return len(method.intervals)


def difference_of(run: Run) -> list[str]:
    """The files that can change a run's numbers and are not what they were when it was made; empty for one not begun.

    Of methods, its own file and what that imports: another method may be added or mended.
    """
    before = run.provenance.get("code_files")
    if before is None:
        return []
    changed = code_difference(before, code_files())
    method = METHODS.get(str(run.config["method"]))
    if method is None:
        return changed
    concerns = {f"{module.replace('.', '/')}.py" for module in ("methods.initial", *imported_methods(method.__module__))}
    return [what for what in changed if not what.startswith("methods/") or what.split()[0] in concerns]


def _initial_method(
    config: RunConfig, data: DataSource, runs_folder: Path, world: World, was_trained: bool = False
) -> tuple[Method, float]:
    """The method as training begins, and the FLOPs that its initial weights cost elsewhere. `run:ID` is a run in that folder.
    What ranks train in parts, none of them draws as a whole.
    """
    given = config.train.init_from
    if config.system.shard == "full":
        build_whole = partial(build_method, config, data)
        return sharded_run.begin(build_whole, config, world, was_trained), 0.0
    method = build_method(config, data)
    if not given:
        return method, 0.0
    source = runs_folder / given.removeprefix(RUN) if given.startswith(RUN) else Path(given)
    if given.startswith(RUN) and not (source / "done").exists():
        raise ValueError(f"train.init_from is {given}, a run that is not done in {runs_folder}: train it first")
    if not source.is_dir():
        method.load_dense(read_weights(source))
        return method, float("nan")
    _, _, trained = load_trained(source)
    network = getattr(trained, "network", None)
    if not isinstance(network, DiT):
        raise ValueError(f"train.init_from is {given}, whose method has no plain backbone: give a run of one or a weights file")
    method.load_dense(network.state_dict())
    return method, float(read_run(source).summary.get("train_flops", float("nan")))
