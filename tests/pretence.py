"""What is known of a GPU that is pretended, and of what the host did with it? See `pretend_gpu`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Pretence:
    """What is known of memory, and what was seen."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.on_gpu: dict[int, Any] = {}  # storages, kept so that no address is used again
        self.pinned: dict[int, Any] = {}
        self.makes_there = False  # what an operation makes out of nothing is on the GPU
        self.waits: Counter[str] = Counter()  # for what the host waited, and from where
        self.late: list[tuple[int, Tensor, Tensor]] = []  # copies to the host that nobody has waited for yet
        self.events, self.most = 0, 1000

    def is_there(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self.on_gpu

    def put_there(self, tensors: Any) -> Any:
        for tensor in tensors_in(tensors):
            if not tensor.is_meta:
                self.on_gpu.setdefault(storage_of(tensor), tensor.untyped_storage())
        if len(self.on_gpu) > self.most:  # let go of what nobody else holds
            self.on_gpu = {key: held for key, held in self.on_gpu.items() if torch._C._storage_Use_Count(key) > 1}
            self.most = 2 * len(self.on_gpu) + 1000
        return tensors

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    def pinned_copy(self, tensor: Tensor) -> Tensor:
        assert not self.is_there(tensor), "only memory of the host can be pinned"
        return tensor if self.is_pinned(tensor) else self.pin(tensor.clone())

    @contextmanager
    def making(self, there: bool) -> Iterator[None]:
        """Inside, what an operation makes out of nothing is on the GPU, or is not."""
        before, self.makes_there = self.makes_there, there
        try:
            yield
        finally:
            self.makes_there = before

    def is_pinned(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self.pinned

    def wait(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame and not any(folder in frame.f_code.co_filename for folder in ("/bench/", "/methods/")):
            frame = frame.f_back
        place = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}" if frame else "?"
        self.waits[f"{what} in {place}"] += 1
        self.arrive(self.events)

    def arrive(self, event: int) -> None:
        """What was copied to the host before that event is there."""
        for recorded, target, values in self.late:
            if recorded < event:
                with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
                    target.copy_(values)
        self.late = [copy for copy in self.late if copy[0] >= event]


class Event:
    def __init__(self, pretence: Pretence) -> None:
        pretence.events += 1
        self.pretence, self.number = pretence, pretence.events

    def synchronize(self) -> None:
        self.pretence.waits["an event"] += 1
        self.pretence.arrive(self.number)


def storage_of(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def tensors_in(tree: Any) -> list[Tensor]:
    """Of arguments; torch's own walk over them takes most of the time here."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for branch in tree for tensor in tensors_in(branch)]


def names_gpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value.startswith("cuda"))


def waits_of(own: Pretence, run: Callable[[], object]) -> Counter[str]:
    """What the host waited for while it ran."""
    before = own.waits.copy()
    run()
    return own.waits - before
