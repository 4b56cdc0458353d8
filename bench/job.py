"""What does one run do, from its configuration to `done`? The entry point of every job, on a laptop or a cluster.

Everything that can be refused is refused before anything is written. A run that is interrupted anywhere goes on from
its last checkpoint when the same command is given again.
"""

import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import adm, checkpoint
from bench.config import RunConfig
from bench.data import DataSource, load_data
from bench.distributed import World
from bench.evaluate import EvalProtocol, protocol_of, score
from bench.files import write_json_atomically, write_text_atomically
from bench.flops import Cost
from bench.heldout import heldout_losses
from bench.journal import Diverged
from bench.method import Method, load_exactly
from bench.provenance import code_hash, provenance
from bench.run_folder import leave_cause, locked, read_back, summary_of, write_diagnostics
from bench.runs import Run, read_run
from bench.sample import Sampler, Samples, make_sampler
from bench.settings import flat_settings, resolve
from bench.trainer import Trainer
from methods import METHODS, build, option_defaults
from methods.backbone import DiT
from methods.released import read_weights

PARTS = ("model.", "ema.")  # of a checkpoint: the weights, and the averages to use in their place
OF_TRAINING, OF_SCORING = ("summary.json", "diagnostics.npz"), ("provenance.json", "samples.npz")
OPTIONS = {name: option_defaults(method) for name, method in METHODS.items()}


def make_config(tree: dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """A resolved configuration; ValueError in one sentence for anything that is not allowed."""
    return resolve(tree, overrides or [], OPTIONS)


def read_config(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of an existing run folder; ValueError if the overrides would make it another run."""
    tree = read_run(folder).config
    config = make_config(tree)
    missing = sorted(set(flat_settings(asdict(config))) - set(flat_settings(tree)))
    if missing:  # a default in its place could be another network
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
    """ValueError in one sentence unless the device can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"system.device is {name!r}, which cannot be used here ({reason}): choose cpu or cuda") from None
    return device


def build_method(config: RunConfig, data: DataSource) -> Method:
    """The method with its initial weights, before any training."""
    return build(
        config.method,
        asdict(config.model),
        config.options,
        seed=config.seed,
        num_timesteps=config.diffusion.num_timesteps,
        input_size=data.input_size,
        channels=data.channels,
        num_classes=data.num_classes,
    )


def run(config: RunConfig, folder: Path, world: World | None = None) -> None:
    """Train, look inside, sample and score one run, as far as it is not done already. Raises ValueError for user errors and
    Diverged for a loss that is not finite; both leave the folder so that it can be understood and resumed.
    """
    world = world or World()
    device = find_device(config.system.device)
    data = load_data(config.data)
    method, initial_flops = _initial_method(config, data)
    protocol = protocol_of(config.evaluation, data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    if world.decide(_is_scored(folder, protocol), device):
        return
    trainer = Trainer(method, config, data, folder, world)
    with ExitStack() as held:
        refusal = _begin(config, folder, world, held) if world.is_main else None
        if not world.decide(refusal is None, device):  # no rank waits for one that has given up
            raise refusal or ValueError(f"rank 0 cannot begin run {folder.name}: see its message")
        trained = _is_trained(folder)
        if not world.is_main:  # takes its part in what the ranks do together; rank 0 writes
            trainer.restore() if trained else trainer.fit()
            with trainer.ema.applied():
                _sample(trainer, sampler)
            return
        try:
            if trained:
                trainer.restore()
            else:
                trainer.fit()
                write_json_atomically(folder / "summary.json", summary_of(trainer, initial_flops))
            with trainer.ema.applied():
                if not trained:
                    write_diagnostics(trainer, folder)
                samples, heldout_loss = _sample(trainer, sampler)
            adm.write_samples(folder / "samples.npz", samples.images)
            _score(folder, samples, heldout_loss, protocol, data, config.system.device)
            read_back(folder)
            write_text_atomically(folder / "done", "")
        except Diverged as error:
            leave_cause(folder, "diverged", str(error))
            raise
        except Exception as error:
            known = isinstance(error, ValueError)  # its message says it all
            leave_cause(folder, "failed", str(error) if known else f"{type(error).__name__}: {error}")
            raise


def _begin(config: RunConfig, folder: Path, world: World, held: ExitStack) -> ValueError | None:
    """Hold and prepare the run folder until `held` ends; what stands in the way, if anything."""
    try:
        held.enter_context(locked(folder))
        prepare_folder(config, folder, world.size)
        (folder / "failure.json").unlink(missing_ok=True)
    except ValueError as error:
        return error
    return None


def check(config: RunConfig) -> Cost:
    """What training costs; ValueError in one sentence for what cannot be run here. Writes nothing."""
    find_device(config.system.device)
    data = load_data(config.data)
    protocol_of(config.evaluation, data)
    make_sampler(config.diffusion, config.evaluation, config.model, data)
    return Trainer(_initial_method(config, data)[0], config, data).cost


def is_scored(config: RunConfig, folder: Path) -> bool:
    """Whether nothing is left to do for a run."""
    return _is_scored(folder, protocol_of(config.evaluation, load_data(config.data)))


def _is_scored(folder: Path, protocol: EvalProtocol) -> bool:
    hashes = [record["protocol_hash"] for record in Run(folder).evaluations]
    return _is_trained(folder) and protocol.hash in hashes and all((folder / name).exists() for name in OF_SCORING)


def _is_trained(folder: Path) -> bool:
    """Trained to the end. What was damaged and therefore deleted is made anew."""
    return all((folder / name).exists() for name in ("done", *OF_TRAINING))


def prepare_folder(config: RunConfig, folder: Path, world_size: int = 1) -> None:
    """Create the run folder with its configuration; ValueError if it cannot be written or holds another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.yaml").exists():
            there = read_config(folder)
            if there.run_id != config.run_id:
                raise ValueError(f"{folder} holds another run ({there.run_id}, not {config.run_id}): choose another folder")
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_text_atomically(folder / "config.yaml", config.to_yaml())
        if not ((folder / "done").exists() and (folder / "provenance.json").exists()):
            write_json_atomically(folder / "provenance.json", _add_session(folder, config, world_size))
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None


def _add_session(folder: Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """The provenance of this process, with all sessions whose work the run's checkpoints hold."""
    now = provenance(config.system.device, config.train.threads, world_size)
    begun = any((folder / "checkpoints").glob("step-*"))
    before = Run(folder).provenance.get("sessions", []) if begun else []
    session = {key: now[key] for key in ("started", "commit", "dirty", "code_hash", "host", "device", "world_size", "command")}
    hashes = list(dict.fromkeys(each["code_hash"] for each in [*before, session]))
    if len(hashes) > 1:
        others = ", ".join(hashes[:-1])
        warnings.warn(f"run {folder.name} was begun by other code ({others}) and goes on with {hashes[-1]}", stacklevel=2)
    return {**now, "code_hash": "+".join(hashes), "sessions": [*before, session]}


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


def evaluate_again(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Sample and score a trained run under changed `evaluation` settings; the record is added to its `eval.json`."""
    config = read_config(folder, overrides)
    find_device(config.system.device)
    if not _is_trained(folder):
        raise ValueError(f"run {folder} is not trained to its end: go on with `tsbench train {folder}`")
    data = load_data(config.data)
    protocol = protocol_of(config.evaluation, data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    _ = Run(folder).evaluations  # can be read and added to: found out before anything is computed
    with locked(folder):
        trainer = Trainer(build_method(config, data), config, data, folder)
        trainer.restore()
        with trainer.ema.applied():
            samples, heldout_loss = _sample(trainer, sampler)
        return _score(folder, samples, heldout_loss, protocol, data, config.system.device)


def draw_samples(folder: Path, overrides: list[str]) -> Samples:
    """Images from a trained run under changed `evaluation` settings."""
    config, data, method = load_trained(folder, overrides)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    return sampler.draw(method, torch.device(config.system.device))


def _initial_method(config: RunConfig, data: DataSource) -> tuple[Method, float]:
    """The method as training begins, and the FLOPs that its initial weights cost elsewhere."""
    method = build_method(config, data)
    if not config.train.init_from:
        return method, 0.0
    source = Path(config.train.init_from)
    if not source.is_dir():
        method.load_dense(read_weights(source))
        return method, float("nan")
    _, _, trained = load_trained(source)
    network = getattr(trained, "network", None)
    if not isinstance(network, DiT):
        raise ValueError(f"train.init_from is {source}, whose method has no plain backbone: give a run of one or a weights file")
    method.load_dense(network.state_dict())
    return method, float(read_run(source).summary.get("train_flops", float("nan")))


def _sample(trainer: Trainer, sampler: Sampler) -> tuple[Samples, float]:
    """Images, and the mean held-out loss, of the weights as they are; every rank takes part."""
    samples = sampler.draw(trainer.method, trainer.device, trainer.world)
    losses = heldout_losses(trainer.method, trainer.objective, trainer.heldout, trainer.world, trainer.device)
    return samples, sum(losses) / len(losses)


def _score(
    folder: Path, samples: Samples, heldout_loss: float, protocol: EvalProtocol, data: DataSource, device: str
) -> dict[str, Any]:
    """Score, and put the record into `eval.json` in place of one under the same protocol."""
    record = {
        "protocol_hash": protocol.hash,
        "protocol": protocol.content,
        "n": len(samples.images),
        "metrics": score(samples.images, samples.labels, protocol, data, device),
        "sample_images_per_second": samples.images_per_second,
        "network_evaluations_per_sample": samples.network_evaluations_per_sample,
        "heldout_loss": heldout_loss,
        "code_hash": code_hash(),
        "scored": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    others = [other for other in Run(folder).evaluations if other["protocol_hash"] != protocol.hash]
    write_json_atomically(folder / "eval.json", [*others, record])
    return record
