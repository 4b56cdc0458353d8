"""How much memory will training need? Counted on the meta device, where nothing is allocated.

Weights, gradients (of bases those of one mixed network, where AdamW takes them so), its two moments and the average, 4 bytes
each, and what one micro-batch keeps for its backward pass in fp32 (in bf16 activations are less: the estimate is then too
high). In bf16 it keeps a copy, 2 bytes each, of every weight that is multiplied too: of the whole network, also where a rank
holds a part of it; with `recompute` of one block at a time. Of a sharded run a rank's part of each, and what is gathered at a
time. Temporary buffers and the allocator's rounding come on top; `peak_memory_bytes` in a run's summary is measured.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench import switches
from bench.method import Method, Outer, offered
from bench.recompute import blocks_of
from bench.sharding import part_of


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int  # with the buffers
    gradients: int
    moments: int
    averages: int
    activations: int  # kept for the backward pass of one micro-batch, with copies of weights in bf16
    gathered: int = 0  # of a sharded run, on top of its part: weights and gradients of what is computed just now

    @property
    def total(self) -> int:
        return sum(astuple(self))


class FusedAttention(TorchFunctionMode):
    """As a fused kernel has it. What the meta device takes instead keeps all weights (B, heads, N, N), as plain code does."""

    def __torch_function__(self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and len(arguments) == 3 and not options:  # no mask, no dropout
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*arguments)[0]
        return function(*arguments, **(options or {}))


def trains_fused_attention(device: str, precision: str) -> bool:
    """In bf16 on a CPU attention trains in pieces: `methods.backbone.attention` says why."""
    return device != "cpu" or precision != "bf16"


def training_memory(
    method: Method,
    image_shape: tuple[int, int, int],
    num_images: int,
    num_parts: int = 1,
    recompute: bool = False,
    averaged: bool = True,
    precision: str = "fp32",
    fused_attention: bool = True,
    one_interval: bool = True,
) -> Memory:
    """Of one rank, with micro-batches of `num_images` (C, H, W), for the costlier of the first and the last interval.
    `num_parts`: ranks that a sharded run is cut into. `fused_attention`: where its switch is on; else it keeps its weights.
    `one_interval`: whether a step trains no more than one, and so need not make gradients whole that are outer products.
    """
    twin = copy.deepcopy(method).to("meta")
    own = 4 * sum(part_of(p.shape, 0, num_parts).of(p).numel() if num_parts > 1 else p.numel() for p in twin.parameters())
    buffers = sum(b.numel() * b.element_size() for b in twin.buffers())
    bf16, ends = precision == "bf16", {0, len(twin.intervals) - 1}
    with FusedAttention() if fused_attention else nullcontext():
        kept = max(_kept_bytes(twin, image_shape, num_images, index, recompute, bf16) for index in ends)
    gathered = _gathered_bytes(twin) if num_parts > 1 else 0
    gradients = own if num_parts > 1 else own - _spared_bytes(twin, one_interval)
    return Memory(own + buffers, gradients, 2 * own, own if averaged else 0, kept, gathered)


def _spared_bytes(method: Method, one_interval: bool) -> int:
    """Of gradients that AdamW takes as outer products."""
    if not (one_interval and switches.is_on("outer")):
        return 0
    outer: dict[nn.Parameter, Outer] = {}
    with offered(method, outer), method.one_step(method.intervals[0]) as leaves:
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf)
    return sum(parameter.nbytes - gradient.shared.nbytes for parameter, gradient in outer.items())


def _gathered_bytes(method: Method) -> int:
    """What is in no unit, or around the blocks of a network, is there for a whole pass, with its gradients; of blocks two (the
    next is fetched while one computes), and the gradients of one.
    """
    taken: set[int] = set()
    around, alone = [0], [0]
    for unit in method.units():
        new = {id(p): p.numel() for p in unit.parameters() if id(p) not in taken}
        taken |= new.keys()
        (around if any(isinstance(module, nn.ModuleList) for module in unit.modules()) else alone).append(sum(new.values()))
    rest = sum(p.numel() for p in method.parameters() if id(p) not in taken)
    return 4 * (2 * (rest + max(around)) + 3 * max(alone))


def _kept_bytes(
    method: Method, image_shape: tuple[int, int, int], num_images: int, index: int, recompute: bool, bf16: bool
) -> int:
    """What a forward pass keeps for its backward pass, each storage once; of parameters the copies that autocast makes. With
    `recompute` of blocks only what they are given, and of one at a time what is inside.
    """
    own = {p.untyped_storage()._cdata for p in (*method.parameters(), *method.buffers())}
    weights = {p.untyped_storage()._cdata for p in method.parameters()}
    kept: dict[int, int] = {}
    inside: list[dict[int, int]] = [kept]  # of each block; the last is what is filled now
    alive: list[Tensor] = []  # so that no storage's address is used again

    def keep(tensor: Tensor, where: dict[int, int] | None = None) -> Tensor:
        storage = tensor.untyped_storage()
        filled = inside[-1] if where is None else where
        if storage._cdata not in own:
            filled[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        elif storage._cdata in weights and torch.is_autocast_enabled("cpu"):
            filled[storage._cdata] = storage.nbytes() // 2
        return tensor

    def enter(block: nn.Module, inputs: Any) -> None:
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                keep(tensor, kept)
        inside.append({})

    def leave(block: nn.Module, inputs: Any, output: Any) -> None:
        inside.append(kept)

    hooks = []
    for block in blocks_of(method) if recompute else ():
        hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    interval = method.intervals[index]
    x = torch.empty(num_images, *image_shape, device="meta")
    t = torch.full((num_images,), interval.start, dtype=torch.int64, device="meta")
    y = torch.zeros(num_images, dtype=torch.int64, device="meta")
    copying = torch.autocast("cpu", enabled=bf16)  # does nothing on the meta device, but says where copies are made
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), copying:
        prediction = method(x, t, y, interval, 0.0)
        torch.stack([prediction.output.square().mean(), *prediction.penalties.values()]).sum()
    for hook in hooks:
        hook.remove()
    return sum(kept.values()) + max(sum(size for key, size in each.items() if key not in kept) for each in inside)
