"""What do the tests of training share? A tiny data set, a tiny run of every method, and a way to look at all of its state."""

import json
import multiprocessing
import os
import socket
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import randomise
from torch import Tensor, nn

from bench import checkpoint, cli
from bench.config import RunConfig
from bench.data import DataSource
from bench.data.source import TensorImages
from bench.distributed import World
from bench.flops import Cost
from bench.job import build_method, make_config
from bench.randomness import Batch, draw_batch
from bench.trainer import Trainer
from methods import METHODS

RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "multi_expert": {"experts": 3},
    "dtr": {},
    "switch_dit": {},
    "dit_moe": {"experts": 4},
    "remix_dit": {"bases": 2, "experts": 3},
}
RUNS |= {name: {} for name in METHODS if name not in RUNS}
"""Every method and its options, a new one with its defaults. Three experts do not divide the 40 timesteps."""

NUM_TIMESTEPS = 40
SETTINGS = (
    "model.depth=2 model.width=16 model.num_heads=2 model.mlp_ratio=2 "
    f"diffusion.num_timesteps={NUM_TIMESTEPS} train.batch_size=8 budget.amount=96 "
    "heldout.bins=4 heldout.images_per_bin=3 heldout.points=2 system.log_every=2 system.checkpoint_every=4 "
    "system.checkpoint_every_seconds=1e9"
).split()
PATIENCE_SECONDS = 1200.0  # for what takes seconds on an idle machine: by then it hangs
UNMEASURED = Cost(0.0, 1.0, 1.0)  # for tests that do not ask what a step costs


def tiny_data(num_images: int = 20, num_heldout: int = 12) -> DataSource:
    """Random images of 2 channels, 4x4, in 3 classes."""
    source = torch.Generator().manual_seed(0)
    images = torch.rand(num_images + num_heldout, 2, 4, 4, generator=source) * 2 - 1
    labels = torch.arange(len(images)) % 3
    train = TensorImages(images[:num_images], labels[:num_images])
    return DataSource("tiny", 3, 2, 4, train, TensorImages(images[num_images:], labels[num_images:]), lambda: "tiny")


@cache
def tiny_config(method: str, *settings: str) -> RunConfig:
    """12 steps of 8 images, unless the settings say otherwise."""
    return make_config({"method": method, "options": RUNS[method]}, [*SETTINGS, *settings])


def tiny_trainer(
    method: str,
    *settings: str,
    folder: Path | None = None,
    world: World | None = None,
    experts: frozenset[int] | None = None,
    cost: Cost = UNMEASURED,
) -> Trainer:
    """A trainer of random weights (the real initialisation has many zeros, which hide errors)."""
    config, data = tiny_config(method, *settings), tiny_data()
    if folder:
        folder.mkdir(exist_ok=True)
    return Trainer(randomise(build_method(config, data)), config, data, folder, world, cost, experts)


def drawn(of: Trainer, step: int = 0, interval: int = 0) -> Batch:
    """The batch that a trainer would draw for a step of an interval."""
    return draw_batch(step, of.method.intervals[interval], of.config, of.data, 0.0)


def gradient_of(trainer: Trainer, parameter: nn.Parameter) -> Tensor | None:
    """In the last step, whole."""
    if parameter in trainer.outer:
        return torch.einsum("k,...->k...", *trainer.outer[parameter])
    return parameter.grad


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights, averages and the optimiser's state, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.method.state_dict().items()}
    tensors |= {f"objective.{name}": tensor for name, tensor in trainer.objective.module.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.state().items()}
    for name, parameter in trainer.method.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in trainer.optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names whose bytes differ, or that only one of two states has."""
    assert one and other
    return [n for n in sorted(one.keys() | other.keys()) if n not in one or n not in other or not _same(one[n], other[n])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def saved(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint: its tensors, and its counters without times."""
    found = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    untimed = {key: value for key, value in found.counters.items() if key not in ("device_seconds", "lost", "journal")}
    return found.tensors, untimed


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "device_seconds"} for line in lines if kind in (None, line["kind"])]


class Crash(Exception):
    """Stands for whatever ends a process."""


def crash_after(trainer: Trainer, num_steps: int) -> None:
    """Train, and crash after that many more steps, before anything of the last one is written."""
    step, left = trainer.step, [num_steps]

    def counted(*batches: Any) -> Any:
        losses = step(*batches)
        left[0] -= 1
        if not left[0]:
            raise Crash
        return losses

    trainer.step = counted  # type: ignore[method-assign]
    try:
        trainer.fit()
    except Crash:
        return
    raise AssertionError("the run was over before it could crash")


RESERVED: list[socket.socket] = []


def free_port() -> int:
    """One at which processes may listen. Nobody else is given it while this process lives, as it stays bound here."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    RESERVED.append(reserved)
    return int(reserved.getsockname()[1])


# Processes of their own. The server has imported everything once; each is forked from it, so it starts at once.

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bench.job", "bench.cli", "sklearn.datasets", "torchvision"])


def start_command(
    *arguments: str, environment: dict[str, str] | None = None, folder: Path | None = None
) -> multiprocessing.process.BaseProcess:
    """`tsbench` with these arguments, in a process of its own (in `folder`); its exit code is the command's."""
    process = PROCESSES.Process(target=_run_command, args=(arguments, environment or {}, folder))
    process.start()
    return process


def _run_command(arguments: tuple[str, ...], environment: dict[str, str], folder: Path | None) -> None:
    os.environ |= environment
    os.chdir(folder or os.getcwd())
    sys.exit(cli.main(list(arguments)))


def exit_codes_of(processes: list[multiprocessing.process.BaseProcess], seconds: float = PATIENCE_SECONDS) -> list[int | None]:
    """Wait for all; those that are not done after `seconds` are killed (their code is then that of the signal)."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
