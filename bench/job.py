"""What does one run do, from its configuration to `done`? The entry point of every job, on a laptop or a cluster.

Everything that can be refused is refused before anything is written. A run that is interrupted anywhere goes on from
its last checkpoint when the same command is given again.
"""

import fcntl
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import adm, checkpoint
from bench.config import RunConfig, read_yaml, resolve
from bench.data import DataSource, load_data
from bench.distributed import World
from bench.evaluate import EvalProtocol, protocol_of, score
from bench.files import read_json, write_json_atomically, write_text_atomically
from bench.heldout import heldout_losses, probe_of
from bench.journal import Diverged
from bench.method import Method
from bench.provenance import provenance
from bench.runs import read_diagnostics, read_run, read_samples
from bench.sample import Sampler, Samples, make_sampler
from bench.trainer import Trainer
from methods import METHODS, build, option_defaults
from methods.backbone import DiT
from methods.released import read_weights

OPTIONS = {name: option_defaults(method) for name, method in METHODS.items()}


def make_config(tree: dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """A resolved configuration; ValueError in one sentence for anything that is not allowed."""
    return resolve(tree, overrides or [], OPTIONS)


def read_config(folder: Path) -> RunConfig:
    """The configuration of an existing run folder."""
    return make_config(read_yaml(folder / "config.yaml"))


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
    data = load_data(config.data)
    method, initial_flops = _initial_method(config, data)
    protocol = protocol_of(config.evaluation, data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    trainer = Trainer(method, config, data, folder, world)
    if not world.is_main:  # takes its part in what the ranks do together; rank 0 writes
        trainer.fit()
        with trainer.ema.applied():
            _sample(trainer, sampler)
        return
    with locked(folder):
        trained = (folder / "done").exists()
        if trained and any(record["protocol_hash"] == protocol.hash for record in read_json(folder / "eval.json", list)):
            return
        prepare_folder(config, folder)
        (folder / "failure.json").unlink(missing_ok=True)
        try:
            if trained:
                trainer.restore()
            else:
                trainer.fit()
                write_json_atomically(folder / "summary.json", _summary(trainer, initial_flops))
            with trainer.ema.applied():
                if not trained:
                    _look_inside(trainer, folder)
                samples, heldout_loss = _sample(trainer, sampler)
            adm.write_samples(folder / "samples.npz", samples.images)
            _score(folder, samples, heldout_loss, protocol, data, config.system.device)
        except Diverged as error:
            write_json_atomically(folder / "failure.json", {"state": "diverged", "cause": str(error)})
            raise
        except Exception as error:
            write_json_atomically(folder / "failure.json", {"state": "failed", "cause": f"{type(error).__name__}: {error}"})
            raise
        _read_back(folder)
        write_text_atomically(folder / "done", "")


def prepare_folder(config: RunConfig, folder: Path) -> None:
    """Create the run folder with its configuration; ValueError if it cannot be written or holds another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.yaml").exists():
            there = read_config(folder)
            if there.run_id != config.run_id:
                raise ValueError(f"{folder} holds another run ({there.run_id}, not {config.run_id}): choose another folder")
        write_text_atomically(folder / "config.yaml", config.to_yaml())
        where = provenance(config.system.device, config.train.threads, world_size=1)
        write_json_atomically(folder / "provenance.json", where)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; ValueError if another process on this machine holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115  (held until the end of the block)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run {folder.name} is being worked on by another process: wait for it or stop it first") from None
        yield


def load_trained(folder: Path) -> tuple[RunConfig, DataSource, Method]:
    """A run's configuration, data and method with its averaged weights; ValueError if there is no sound checkpoint."""
    config = read_config(folder)
    data = load_data(config.data)
    method = build_method(config, data)
    found = checkpoint.load_latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"run {folder} has no checkpoint yet: train it first with `tsbench train {folder}`")
    _load_averaged(method, found)
    return config, data, method.to(config.system.device)


def evaluate_again(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Sample and score a trained run under changed `evaluation` settings; the record is added to its `eval.json`."""
    config, data, _ = load_trained(folder)
    config = make_config(asdict(config), overrides)
    if read_config(folder).run_id != config.run_id:
        raise ValueError("only evaluation.* and system.* can be changed for a trained run: start a new run for anything else")
    protocol = protocol_of(config.evaluation, data)
    sampler = make_sampler(config.diffusion, config.evaluation, config.model, data)
    with locked(folder):
        trainer = Trainer(build_method(config, data), config, data, folder)
        trainer.restore()
        with trainer.ema.applied():
            samples, heldout_loss = _sample(trainer, sampler)
        return _score(folder, samples, heldout_loss, protocol, data, config.system.device)


def draw_samples(folder: Path, overrides: list[str]) -> Samples:
    """Images from a trained run under changed `evaluation` settings."""
    config, data, method = load_trained(folder)
    evaluation = make_config(asdict(config), overrides).evaluation
    return make_sampler(config.diffusion, evaluation, config.model, data).draw(method, torch.device(config.system.device))


def _initial_method(config: RunConfig, data: DataSource) -> tuple[Method, float]:
    """The method as training begins, and the FLOPs that its initial weights cost elsewhere."""
    method = build_method(config, data)
    if not config.train.init_from:
        return method, 0.0
    source = Path(config.train.init_from)
    if not source.is_dir():
        method.load_dense(read_weights(source))
        return method, float("nan")
    _, _, dense = load_trained(source)
    network = getattr(dense, "network", None)
    if not isinstance(network, DiT):
        raise ValueError(f"train.init_from is {source}, which is no run of one dense network: give a dense run or a weights file")
    method.load_dense(network.state_dict())
    return method, float(read_run(source).summary.get("train_flops", float("nan")))


def _load_averaged(method: Method, found: checkpoint.Checkpoint) -> None:
    model = {name.removeprefix("model."): tensor for name, tensor in found.tensors.items() if name.startswith("model.")}
    averages = {name.removeprefix("ema."): tensor for name, tensor in found.tensors.items() if name.startswith("ema.")}
    method.load_state_dict(model | averages)


def _summary(trainer: Trainer, initial_flops: float) -> dict[str, Any]:
    seconds = trainer.device_seconds / trainer.world.size
    on_gpu = trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    batch = trainer.config.train.batch_size
    return {
        "stored_parameters": sum(p.numel() for p in trainer.method.parameters()),
        "active_parameters": trainer.method.num_active_parameters(),
        "forward_macs_per_image": trainer.cost.forward_macs_per_image,
        "train_flops": trainer.train_flops,
        "images_seen": trainer.images_seen,
        "num_steps": trainer.steps_done,
        "updates_per_parameter_set": sorted({images // batch for images in trainer.ema.images_seen.values()}),
        "train_images_per_second": trainer.images_seen / seconds if seconds else None,
        "device_seconds": trainer.device_seconds,
        "lost_images": trainer.lost["images"],
        "lost_device_seconds": trainer.lost["device_seconds"],
        "peak_memory_bytes": peak,
        "initial_flops": None if initial_flops != initial_flops else initial_flops,
        "num_intervals": len(trainer.method.intervals),
    }


def _look_inside(trainer: Trainer, folder: Path) -> None:
    """`diagnostics.npz`: what the trained method shows of itself, and what it showed over training."""
    shown = trainer.method.diagnostics(probe_of(trainer.heldout, trainer.objective, trainer.device))
    intervals = np.array([[i.start, i.stop] for i in trainer.method.intervals])
    shown["intervals"] = (("interval", "edge"), intervals)
    arrays: dict[str, np.ndarray] = {}
    snapshots = trainer.journal.snapshots()
    for name, (axes, array) in shown.items():
        arrays[name] = array
        arrays[f"{name}/axes"] = np.array(axes)
        history = [of_point[name] for of_point in snapshots.values() if name in of_point]
        if len(history) == len(snapshots) > 0 and not all(np.array_equal(point, array) for point in history):
            arrays[f"{name}/history"] = np.stack(history)
    arrays["history/images_seen"] = np.array(list(snapshots))
    temporary = folder / "diagnostics.tmp.npz"
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(folder / "diagnostics.npz")


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
        "scored": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    others = [other for other in read_json(folder / "eval.json", list) if other["protocol_hash"] != protocol.hash]
    write_json_atomically(folder / "eval.json", [*others, record])
    return record


def _read_back(folder: Path) -> None:
    """Every artefact can be read; only then is a run done."""
    run = read_run(folder)
    assert run.summary and run.evaluations and run.provenance and len(run.metrics) and read_diagnostics(folder)
    assert read_samples(folder) is not None
    for path in checkpoint.list_checkpoints(folder / "checkpoints"):
        checkpoint.load(path)
