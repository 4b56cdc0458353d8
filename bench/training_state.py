"""What does the next step of a training depend on?

All of it is in a checkpoint: tensors, and counters that JSON can hold. Generators have no state: they are seeded by step.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.checkpoint import Checkpoint
from bench.method import load_exactly

if TYPE_CHECKING:
    from bench.trainer import Trainer


def tensors_of(trainer: "Trainer") -> dict[str, Tensor]:
    """The weights, what the loss learns, the averages and the optimiser's state, by name; not copies."""
    names = {parameter: name for name, parameter in _named_parameters(trainer).items()}
    tensors = {f"model.{name}": tensor for name, tensor in trainer.method.state_dict().items()}
    tensors |= {f"objective.{name}": tensor for name, tensor in trainer.objective.module.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trainer.ema.state().items()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}  # type: ignore[index]
    return tensors


def counters_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything else, as JSON can hold it."""
    return {
        "steps_done": trainer.steps_done,
        "updates": trainer.updates,
        "device_seconds": trainer.device_seconds,
        "lost": trainer.lost,
        "heldout_points": trainer.heldout_points,
        "ema_images_seen": trainer.ema.images_seen,
        "journal": trainer.journal.position(),
    }


def take(trainer: "Trainer", found: Checkpoint) -> None:
    """Be where a checkpoint was made; who is only scored has its averages as weights, where there are some."""
    tensors, counters = found.tensors, found.counters
    averages = _under("ema.", tensors)
    weights = _under("model.", tensors) | (averages if trainer.only_scored else {})
    load_exactly(trainer.method, weights, f"the checkpoint in {trainer.folder}")
    trainer.objective.module.load_state_dict(_under("objective.", tensors))
    take_counters(trainer, counters)
    trainer.optimizer.state.clear()
    if trainer.only_scored:
        return
    trainer.ema.load(averages, counters["ema_images_seen"])
    named = _named_parameters(trainer)
    for key, value in _under("optimizer.", tensors).items():
        name, _, entry = key.rpartition(".")
        trainer.optimizer.state[named[name]][entry] = value.to(trainer.device)


def take_counters(trainer: "Trainer", counters: Mapping[str, Any]) -> None:
    """As `counters_of` told them."""
    trainer.ema.images_seen = dict(counters["ema_images_seen"])
    trainer.steps_done, trainer.updates = counters["steps_done"], counters["updates"]
    trainer.device_seconds, trainer.lost = counters["device_seconds"], counters["lost"]
    trainer.heldout_points = counters["heldout_points"]


def optimizer_entries(trainer: "Trainer", names: Iterable[str]) -> dict[str, Tensor]:
    """The optimiser's state of those names, empty: to be loaded in place."""
    named, entries = _named_parameters(trainer), {}
    trainer.optimizer.state.clear()
    for full_name in names:
        prefix, _, rest = full_name.partition(".")
        name, _, entry = rest.rpartition(".")
        if prefix == "optimizer" and name in named:
            parameter = named[name].detach()
            empty = torch.zeros((), device=parameter.device) if entry == "step" else torch.zeros_like(parameter)
            trainer.optimizer.state[named[name]][entry] = entries[full_name] = empty
    return entries


def _named_parameters(trainer: "Trainer") -> dict[str, nn.Parameter]:
    """The method's parameters, and what the loss itself learns."""
    of_loss = {f"loss:{name}": parameter for name, parameter in trainer.objective.module.named_parameters()}
    return dict(trainer.method.named_parameters()) | of_loss


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
