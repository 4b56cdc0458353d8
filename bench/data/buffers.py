"""In which memory does a batch lie?

The system clears a large piece of memory before it gives it out, and gets it back whole: of a batch of 100 MB that costs
more than to fill it. So such memory is kept, and used again once nothing refers to the batch that lay there.
"""

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_KEPT = 2  # batches: while one is trained on, the next is drawn
KEPT_FROM = 2**25 // 4  # values: what is smaller the C library keeps for itself (mallopt(3), M_MMAP_THRESHOLD)


class Buffers:
    """float32 memory of earlier batches. Copies to a device have left it when they return, so it is free once nobody holds it."""

    def __init__(self) -> None:
        self.kept: list[tuple[np.ndarray, weakref.ReferenceType[Any]]] = []  # memory, and what a batch in it holds

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor that shares memory with no other that is alive; its values are arbitrary."""
        size = math.prod(shape)
        if size < KEPT_FROM:
            return torch.empty(shape)
        free = [index for index, (memory, held) in enumerate(self.kept) if held() is None and len(memory) >= size]
        memory = self.kept.pop(free[-1])[0] if free else np.empty(size, np.float32)
        view = memory[:size]  # torch holds it for as long as any tensor shares this memory, views and saved ones included
        self.kept = [*self.kept[-(MOST_KEPT - 1) :], (memory, weakref.ref(view))]
        return torch.from_numpy(view).view(shape)
