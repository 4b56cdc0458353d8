"""What must a method provide to be trained, sampled and compared?

A method is one class in one file of `methods/`. Trainer, sampler and evaluator know only this contract.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.intervals import Interval

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x (B, C, H, W), t (B,), y (B,)) -> (B, C_out, H, W)`, without guidance."""

Diagnostics = dict[str, tuple[tuple[str, ...], np.ndarray]]
"""Name -> (axis names, array): what a figure can show of a method, without knowing which method it is."""


class Prediction(NamedTuple):
    """What a training forward pass returns."""

    output: Tensor  # (B, C_out, H, W)
    penalties: dict[str, Tensor]  # weighted scalars: added to the loss and logged by name


class Outer(NamedTuple):
    """The gradient (K, ...) of a parameter that is `factors` (K,) times `shared` (...); neither changes before the step."""

    factors: Tensor
    shared: Tensor


class Probe(NamedTuple):
    """Noised held-out images, at timesteps over the whole schedule, on which routing can be looked at."""

    x: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) int64, or float in (0, 1)
    y: Tensor  # (B,) int64


class Method(nn.Module):
    """A network, or a family of networks, that covers the whole noise schedule.

    A subclass takes `(shape, *, num_timesteps=1000, **options)`; its keyword options, with their annotations and
    defaults, are the method's configuration. It sets `intervals` and overrides `forward` and `specialise`.
    """

    intervals: tuple[Interval, ...]
    independent_experts: bool = False  # whether no two intervals share a parameter: they can be trained apart
    intervals_share_parameters: bool = False  # whether each of several trains all parameters: then one step can train several
    outer_gradients: dict[nn.Parameter, Outer] | None = None  # where a dict, `one_step` may leave gradients there (`offered`)
    intervals_cost_alike: bool = False  # whether all intervals cost the same, penalties included: then one is measured for all

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        """Training pass. x (B, C, H, W) float; t (B,), all in `interval`; y (B,) int64, `num_classes` = no label;
        progress in [0, 1]: the part of the budget that is spent (for penalties that are annealed).
        """
        raise NotImplementedError

    def specialise(self, interval: Interval) -> Denoiser:
        """The cheapest callable that equals `forward(...).output` on `interval`; for sampling, without penalties."""
        raise NotImplementedError

    @contextmanager
    def one_step(self, interval: Interval) -> Iterator[list[nn.Parameter]]:
        """Around all training passes of one optimiser step on `interval`: what they share can be computed once. Yields what
        gradients arrive at in each of these passes, about in the order in which the passes use it, to be averaged over ranks
        inside if all are on this interval (`bench.averaging`: what gets none delays the others' messages, and the last in use
        go first); afterwards every trained parameter has its own, added to what it had before, or has it in `outer_gradients`.
        """
        yield [p for p in self.parameters() if p.requires_grad]

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups (`params`, `lr`) that cover every trainable parameter once."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Start from a trained backbone with nothing added, given as its state dict.

        Raises ValueError if the state does not fit, or if this method cannot start from such a network.
        """
        raise ValueError(f"{type(self).__name__} cannot start from a plain backbone: start it from random weights")

    def units(self) -> list[nn.Module]:
        """Where a run is sharded, the modules whose parameters are gathered when the module is called, and then let go; inner
        ones first. What is in none of them is there for a whole pass. By default every member of an nn.ModuleList.
        """
        lists = [module for module in self.modules() if isinstance(module, nn.ModuleList)]
        return [member for each in reversed(lists) for member in each]

    def num_active_parameters(self) -> int:
        """Parameters that one image passes through at one timestep."""
        return sum(p.numel() for p in self.parameters())

    def diagnostics(self, probe: Probe | None = None) -> Diagnostics:
        """What there is to see inside: `mixing_coefficients` (expert, basis), `expert_usage` (block, expert),
        `routing` (block, timestep, expert), `routing_by_position` (block, position, expert), `routing_by_class` (block, class,
        expert), `channel_mask` (timestep, channel) ... Without a probe, only what needs no data.
        """
        return {}


@contextmanager
def offered(method: Method, outer: dict[nn.Parameter, Outer] | None) -> Iterator[None]:
    """Inside, `one_step` may leave the gradient of a parameter there, in place of its `.grad`, if it is an outer product."""
    method.outer_gradients = outer
    try:
        yield
    finally:
        method.outer_gradients = None


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`; one ValueError that lists every unknown, missing or misshaped tensor of `source`."""
    present = module.state_dict()
    unfit = {
        "unknown": [name for name in state if name not in present],
        "missing": [name for name in present if name not in state],
        "misshaped": [
            f"{name} {tuple(state[name].shape)} where {tuple(tensor.shape)} is expected"
            for name, tensor in present.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(unfit.values()):
        problems = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in unfit.items() if names)
        raise ValueError(f"{source} does not fit the network ({problems}): give one of the same sizes")
    module.load_state_dict(dict(state))


def timestep_index(t: Tensor, num_timesteps: int) -> Tensor:
    """The index 0..T-1 of integer timesteps (as they are) or of continuous ones in [0, 1] (`floor(t*T)`)."""
    if not t.is_floating_point():
        return t
    return (t * num_timesteps).long().clamp(0, num_timesteps - 1)


def check_timesteps(t: Tensor, interval: Interval, num_timesteps: int) -> None:
    """Refuse a batch that leaves `interval`: a ValueError on CPU; on accelerators an assertion that does not synchronise.

    Averaging over intervals would silently compute the wrong network.
    """
    if t.is_meta or torch.compiler.is_compiling():
        return
    index = timestep_index(t, num_timesteps)
    inside = ((index >= interval.start) & (index < interval.stop)).all()
    if t.device.type != "cpu":
        torch._assert_async(inside)
    elif not inside:
        raise ValueError(
            f"a batch of timesteps {int(index.min())}..{int(index.max())} was given to the interval "
            f"{interval.start} <= t < {interval.stop}: all timesteps of one forward pass must lie in one interval; "
            "split the batch by interval"
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: choose a value from {low} to {high}")
