"""How much memory will training need? Counted on the meta device, where nothing is allocated.

Weights, gradients, AdamW's two moments and the average, 4 bytes each, and what one micro-batch keeps for its backward
pass. Temporary buffers and the allocator's rounding come on top (`peak_memory_bytes` in a run's summary is measured).
"""

import copy

import torch
from torch import Tensor

from bench.config import TrainConfig
from bench.method import Method

BYTES_PER_PARAMETER = 4 * (1 + 1 + 2 + 1)  # weight, gradient, two moments, average
PROBE = 2  # images
AUTOCAST = {"fp32": False, "bf16": True}


def training_bytes(method: Method, image_shape: tuple[int, int, int], train: TrainConfig, world_size: int = 1) -> int:
    """Of one rank, for the costliest interval."""
    twin = copy.deepcopy(method).to("meta")
    num_images = max(1, train.batch_size // (world_size * train.micro_batches))
    kept = [_kept_bytes(twin, image_shape, count, index, AUTOCAST[train.precision]) for index, count in _probes(twin)]
    per_image = max((more - less) / PROBE for less, more in zip(kept[::2], kept[1::2], strict=True))
    fixed = max(0.0, max(2 * less - more for less, more in zip(kept[::2], kept[1::2], strict=True)))
    num_parameters = sum(p.numel() for p in twin.parameters())
    buffers = sum(b.numel() * b.element_size() for b in twin.buffers())
    return int(BYTES_PER_PARAMETER * num_parameters + buffers + fixed + per_image * num_images)


def _probes(method: Method) -> list[tuple[int, int]]:
    """(interval, number of images): the first and the last interval at two batch sizes."""
    ends = sorted({0, len(method.intervals) - 1})
    return [(index, count) for index in ends for count in (PROBE, 2 * PROBE)]


def _kept_bytes(method: Method, image_shape: tuple[int, int, int], count: int, index: int, bf16: bool) -> int:
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
    x = torch.empty(count, *image_shape, device="meta")
    t = torch.full((count,), interval.start, dtype=torch.int64, device="meta")
    y = torch.zeros(count, dtype=torch.int64, device="meta")
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        prediction = method(x, t, y, interval, 0.0)
        torch.stack([prediction.output.float().square().mean(), *prediction.penalties.values()]).sum()
    return sum(kept.values())
