"""How do ranks average their gradients, while the backward pass still goes on?

In buckets, cut from the end of the list of leaves, which the backward pass reaches first: in their order, each is sent once
its gradients are there and the one before is sent. What goes together and in which order follows from the list alone, never
from timing, so that sums are the same bits in every run, and without the switch `overlap`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench import switches
from bench.distributed import World

BUCKET_BYTES = 25 * 2**20  # as by default in torch's DistributedDataParallel


@contextmanager
def averaging(leaves: Sequence[nn.Parameter], world: World, num_passes: int = 1) -> Iterator[None]:
    """Around the backward passes of a step, `num_passes` of them: afterwards the gradients of these leaves are means over ranks.

    All ranks give the same leaves, and the same ones have gradients everywhere: others keep none, and neither optimiser nor
    average touches them. One that lacks its gradient of any pass holds back all that come before it in the list until the
    end. Of sharded parameters the backward pass has already averaged them.
    """
    buckets = Buckets(leaves, world.size)
    hooks = buckets.watch(num_passes) if switches.is_on("overlap") else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    buckets.finish()


def average(parameters: Sequence[nn.Parameter], world: World) -> None:
    """As `averaging`, when all backward passes are over."""
    Buckets(parameters, world.size).finish()


class Buckets:
    """One step's, and how far their messages are. A rank alone has none."""

    def __init__(self, leaves: Sequence[nn.Parameter], num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.buckets = cut(leaves) if num_ranks > 1 else []
        self.num_missing: list[int] = []  # of each bucket the gradients that are still to come, where that is watched
        self.num_sent = 0
        self.messages: list[tuple[Tensor, dist.Work]] = []

    def watch(self, num_passes: int) -> list[torch.utils.hooks.RemovableHandle]:
        """The hooks by which each bucket is sent in the last backward pass; each leaf's gradient comes once in every pass."""
        self.num_missing = [len(bucket) * num_passes for bucket in self.buckets]
        return [
            leaf.register_post_accumulate_grad_hook(partial(self._count, index))
            for index, bucket in enumerate(self.buckets)
            for leaf in bucket
        ]

    def _count(self, index: int, leaf: Tensor) -> None:
        """On a GPU autograd's own thread says it, while the main one waits in `backward`."""
        self.num_missing[index] -= 1
        while self.num_sent < len(self.buckets) and not self.num_missing[self.num_sent]:
            self._send()

    def _send(self) -> None:
        """The next bucket's gradients, which from here on are views of the message: their sums arrive in it."""
        members = [(leaf, leaf.grad.reshape(-1)) for leaf in self.buckets[self.num_sent] if leaf.grad is not None]
        self.num_sent += 1
        if not members:
            return
        flat = torch.cat([gradient for _, gradient in members])
        for (leaf, _), part in zip(members, flat.split([leaf.numel() for leaf, _ in members]), strict=True):
            leaf.grad = part.view_as(leaf)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.messages.append((flat, work))

    def finish(self) -> None:
        """Send the rest, wait for all, and divide."""
        while self.num_sent < len(self.buckets):
            self._send()
        for flat, work in self.messages:
            work.wait()
            flat /= self.num_ranks


def cut(leaves: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The leaves, the last first, in buckets of one dtype and of at most `BUCKET_BYTES`, or of one leaf; without DTensors."""
    buckets: list[list[nn.Parameter]] = []
    filled: dict[torch.dtype, tuple[list[nn.Parameter], int]] = {}  # of each dtype the last bucket, and its bytes
    for leaf in reversed(leaves):
        if isinstance(leaf, DTensor):
            continue
        bucket, num_bytes = filled.get(leaf.dtype, ([], 0))
        if bucket and num_bytes + leaf.nbytes > BUCKET_BYTES:
            bucket, num_bytes = [], 0
        if not bucket:
            buckets.append(bucket)
        bucket.append(leaf)
        filled[leaf.dtype] = bucket, num_bytes + leaf.nbytes
    return buckets
