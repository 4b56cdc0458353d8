"""How do several processes act as one trainer?

Ranks hold the same weights and see slices of the same global batch. Everything that is decided, is decided by rank 0
for all.
"""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bench.method import Outer

FAREWELL_SECONDS = 0.2
LONGEST = 300  # characters of what one rank tells the others of its failure
PATIENCE = timedelta(hours=4)  # for what one rank does alone while the others wait: 250 GB, read at 20 MB/s to be hashed
Found = TypeVar("Found")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks; the default is a process on its own."""

    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = field(default=None, compare=False)  # in which `together` waits

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def slice_of(self, count: int) -> slice:
        """This rank's part of `count` items, a multiple of the number of ranks."""
        assert count % self.size == 0
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=group)
        return tensor

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar's mean over ranks, on every rank, in one message."""
        if self.size == 1:
            return values
        together = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(together)
        return dict(zip(values, (together / self.size).unbind(), strict=True))

    def gather(self, part: Tensor) -> Tensor:
        """The parts (n, ...) of all ranks, in their order, as one tensor (size * n, ...) on every rank."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def decide(self, value: bool, device: torch.device) -> bool:
        """Rank 0's answer, on every rank."""
        if self.size == 1:
            return value
        answer = torch.tensor(int(value), device=device)
        dist.broadcast(answer, src=0)
        return bool(answer)

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether it is true on any rank, on every rank."""
        return bool(self.sum(torch.tensor(int(value), device=device)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ranks do here, each on its own and without messages, is done by all or by none: where one rank fails, all leave
        with an error (the others a ValueError that says why the first one failed), so that none waits for one that has given up.
        One may take as long as `PATIENCE` while the others wait; that a process has died is noticed at once.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if not int(self.sum(torch.tensor(int(failure is not None)), self.patient)):
            return
        causes = self.of_all(None if failure is None else _in_one_line(failure), self.patient)
        if failure is not None:
            raise failure
        first, cause = next((rank, cause) for rank, cause in enumerate(causes) if cause is not None)
        raise ValueError(f"rank {self.rank} stops because rank {first} failed: {cause}")

    def agree(self, number: float, device: torch.device) -> float:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return number
        answer = torch.tensor(number, dtype=torch.float64, device=device)
        dist.broadcast(answer, src=0)
        return float(answer)

    def of_all(self, value: Found, group: dist.ProcessGroup | None = None) -> list[Found]:
        """What each rank has given (any object that can be pickled), by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group)
        return values

    def share_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        answer = [text]
        if self.size > 1:
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        return answer[0]

    def barrier(self) -> None:
        """Nobody goes on before everybody is here."""
        if self.size > 1:
            dist.barrier()

    def share_block(self, block: Tensor, owner: int) -> Tensor:
        """A tensor that rank `owner` computed, on every rank; the others pass an empty one of the same shape."""
        if self.size > 1:
            dist.broadcast(block, src=owner)
        return block


def _in_one_line(failure: Exception) -> str:
    text = str(failure) if isinstance(failure, ValueError) else f"{type(failure).__name__}: {failure}"
    return " ".join(text.split())[:LONGEST]


def gradient_norm(parameters: list[torch.nn.Parameter], outer: Collection[Outer] = ()) -> Tensor:
    """The norm (scalar) of all gradients together, of which a rank may hold its part alone; on every rank. `outer`: those that
    are no parameter's `.grad`.
    """
    if outer:
        factors, shared = (torch.stack(torch._foreach_norm(tensors)) for tensors in zip(*outer, strict=True))
        return torch.hypot(gradient_norm(parameters), torch.linalg.vector_norm(factors * shared))
    gradients = [p.grad for p in parameters if p.grad is not None]
    cut = [g for g in gradients if isinstance(g, DTensor)]
    if not cut:
        return torch.nn.utils.get_total_norm(gradients)
    rest = [g for g in gradients if not isinstance(g, DTensor)]
    of_cut = whole(torch.nn.utils.get_total_norm(cut))
    return torch.hypot(of_cut, torch.nn.utils.get_total_norm(rest)) if rest else of_cut  # of none it is on the CPU: a GPU waits


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other, as it is. Writing into it writes into the tensor."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered from all ranks, which all must ask for it; any other, as it is."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


class Agreement:
    """Has any rank asked for something? Each call posts this rank's answer and returns what all said at the call before,
    the same on every rank: nobody waits for a message, nor for a device.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.posted: tuple[Tensor, dist.Work] | None = None

    def ask(self, own: bool) -> bool:
        """Whether any rank's `own` was true at the call before; alone, whether it is now."""
        if self.world.size == 1:
            return own
        before = self.settle()
        answers = torch.tensor(int(own))  # on the CPU: gloo carries it, also where nccl carries the gradients
        self.posted = answers, dist.all_reduce(answers, async_op=True)
        return before

    def settle(self) -> bool:
        """Wait for the last message, so that none is under way at the end; what it said."""
        if self.posted is None:
            return False
        answers, work = self.posted
        work.wait()
        self.posted = None
        return bool(answers)


def choose_gpu(device: torch.device) -> None:
    """Make this rank's GPU the current one; called before anything is put on one, as that takes memory there for good. By the
    rank's number on its node, if the device has none; a task that sees one GPU alone has that.
    """
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device.index)
    elif device.type == "cuda" and rank is not None and torch.cuda.device_count():
        torch.cuda.set_device(int(rank) % torch.cuda.device_count())


@contextmanager
def world_from_environment(device: torch.device) -> Iterator[World]:
    """Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name (gloo on CPU, nccl on GPU; what is on the CPU
    goes by gloo there, too), and leave them at the end; without WORLD_SIZE, a process on its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    choose_gpu(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        # Apart from the group of all other messages: who waits for a rank that never comes, or for a step, is not that patient.
        patient = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        yield World(dist.get_rank(), size, patient)
    finally:
        dist.destroy_process_group()
        # PyTorch remembers the mesh of sharded tensors, and so keeps the group's threads. They need the interpreter once more, to
        # let go of the last message: were it ending by then, they would abort the process.
        time.sleep(FAREWELL_SECONDS)
