"""How much memory will training need? Counted on the meta device, where nothing is allocated.

Weights, gradients, AdamW's two moments and the average, 4 bytes each, and what one micro-batch keeps for its backward
pass in fp32 (in bf16 that is less: the estimate is then too high). Temporary buffers and the allocator's rounding come on
top; `peak_memory_bytes` in a run's summary is measured.
"""

import copy

import torch
from torch import Tensor

from bench.method import Method

BYTES_PER_PARAMETER = 4 * (1 + 1 + 2 + 1)  # weight, gradient, two moments, average


def training_bytes(method: Method, image_shape: tuple[int, int, int], num_images: int) -> int:
    """Of one rank, with micro-batches of `num_images` (C, H, W), for the costlier of the first and the last interval."""
    twin = copy.deepcopy(method).to("meta")
    num_parameters = sum(p.numel() for p in twin.parameters())
    buffers = sum(b.numel() * b.element_size() for b in twin.buffers())
    kept = max(_kept_bytes(twin, image_shape, num_images, index) for index in {0, len(twin.intervals) - 1})
    return BYTES_PER_PARAMETER * num_parameters + buffers + kept


def _kept_bytes(method: Method, image_shape: tuple[int, int, int], num_images: int, index: int) -> int:
    """What a forward pass keeps for its backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage()._cdata for p in (*method.parameters(), *method.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's address is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    interval = method.intervals[index]
    x = torch.empty(num_images, *image_shape, device="meta")
    t = torch.full((num_images,), interval.start, dtype=torch.int64, device="meta")
    y = torch.zeros(num_images, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = method(x, t, y, interval, 0.0)
        torch.stack([prediction.output.square().mean(), *prediction.penalties.values()]).sum()
    return sum(kept.values())
