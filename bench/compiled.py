"""How are a network's blocks compiled?

By torch.compile, each block as one graph: what a block is given are tensors, and which expert or interval they belong
to has been chosen outside, so that nothing is compiled anew for another one. Blocks of one form share their code. Only
training passes are compiled; held-out batches, which come in other sizes, take the plain ones.

`cuda_graphs` also records the kernels of each block once and replays them, for small networks, whose kernels take less
time than it takes to ask for them. (Not tried yet: written where there was no GPU.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.method import Method
from bench.recompute import blocks_of

MODES = {"blocks": "default", "cuda_graphs": "reduce-overhead"}  # setting: the compiler's word


def compile_blocks(method: Method, setting: str, device: torch.device, backend: str = "inductor") -> None:
    """From now on, as `system.compile` says. ValueError where it cannot be done."""
    if setting == "none":
        return
    check_device(setting, device)
    if not blocks_of(method):
        raise ValueError(
            f"system.compile is {setting}, but {type(method).__name__} has no list of blocks to be compiled: set it to none"
        )
    mode = MODES[setting] if backend == "inductor" else None
    for block in blocks_of(method):
        fast = torch.compile(block.forward, fullgraph=True, backend=backend, mode=mode)
        block.forward = _in_training(block, fast)  # type: ignore[method-assign]


def check_device(setting: str, device: torch.device) -> None:
    """ValueError where the setting needs another."""
    if setting == "cuda_graphs" and device.type != "cuda":
        raise ValueError(f"system.compile is cuda_graphs, which need a GPU, and system.device is {device}: choose blocks or none")


def begin_step(setting: str) -> None:
    """What replayed graphs have left in their memory, gradients included, may be overwritten from here on."""
    if setting == "cuda_graphs":
        torch.compiler.cudagraph_mark_step_begin()


def _in_training(block: nn.Module, fast: Callable[..., Any]) -> Callable[..., Any]:
    plain = block.forward

    def forward(*inputs: Any) -> Any:
        return fast(*inputs) if torch.is_grad_enabled() else plain(*inputs)

    return forward
