"""How does a deep network train without keeping what is inside its blocks?

Activation checkpointing: a block keeps only its inputs and is computed again in the backward pass, about a third more
computation for a fraction of the memory. The gradients are the same bits, and a budget in FLOPs does not count what is
computed a second time.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.method import Method


def recompute_blocks(method: Method) -> None:
    """From now on. ValueError for a method without blocks."""
    blocks = blocks_of(method)
    if not blocks:
        raise ValueError(
            f"system.recompute is true, but {type(method).__name__} has no list of blocks to compute again: set it to false"
        )
    for block in blocks:  # networks draw no random numbers, so none have to be repeated
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign, assignment]


def blocks_of(method: Method) -> list[nn.Module]:
    """The members of every nn.ModuleList that has no other inside."""
    lists = [module for module in method.modules() if isinstance(module, nn.ModuleList)]
    return [member for each in lists if not _holds_a_list(each) for member in each]


def _holds_a_list(outer: nn.ModuleList) -> bool:
    return any(isinstance(module, nn.ModuleList) for member in outer for module in member.modules())
