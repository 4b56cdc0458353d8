"""What does one optimiser step, and one image, cost in floating-point operations?

Counted with `torch.utils.flop_counter` on the meta device, where nothing is computed: the count does not depend on
the machine, and attention is counted without the recomputation that fused kernels do in their backward pass. FLOPs
are 2 * multiply-accumulates of matrix products; the papers' "Gflops" are multiply-accumulates. Two batch sizes
separate what is paid once per step (weight mixing, gate tables) from what is paid per image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import switches
from bench.intervals import Interval
from bench.method import Method

BATCHES = (8, 24)
MAX_INTERVALS = 16  # measured, evenly spaced; one where the method says that all cost the same


@dataclass(frozen=True)
class Cost:
    """FLOPs of training (forward and backward, penalties included) and of one unguided network evaluation for sampling."""

    train_flops_per_pass: float  # fixed: weight mixing, gate tables
    train_flops_per_image: float
    forward_flops_per_image: float

    def train_flops(self, batch_size: int, num_passes: int = 1) -> float:
        """Of one optimiser step on `batch_size` images in `num_passes` forward passes (micro-batches times ranks)."""
        return num_passes * self.train_flops_per_pass + batch_size * self.train_flops_per_image

    @property
    def forward_macs_per_image(self) -> float:
        return self.forward_flops_per_image / 2


@switches.only_off(())  # a budget does not depend on `system.plain`, of this run or of the one before in this process
def measure(method: Method, image_shape: tuple[int, int, int]) -> Cost:
    """The cost of a method on images (C, H, W), averaged over its intervals by length."""
    twin = on_meta(method)
    per_pass, per_image = _average(twin, lambda interval: _count_training(twin, interval, image_shape))
    _, forward = _average(twin, lambda interval: _count_evaluation(twin, interval, image_shape))
    return Cost(per_pass, per_image, forward)


@switches.only_off(())
def forward_macs_per_image(method: Method, image_shape: tuple[int, int, int]) -> float:
    """Of that cost, this alone: no training step is counted for it."""
    twin = on_meta(method)
    return _average(twin, lambda interval: _count_evaluation(twin, interval, image_shape))[1] / 2


def on_meta(method: Method) -> Method:
    """The same network without its numbers. No weight is copied on the way: there may be no room for two of each."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in method.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters()}
    return copy.deepcopy(method, memo).to("meta")


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of everything `run()` computes, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return int(counter.get_total_flops())


def _average(method: Method, count: Callable[[Interval], list[int]]) -> tuple[float, float]:
    """FLOPs of a pass whatever its batch, and of each of its images; `count` gives those of an interval at both batch sizes."""
    chosen = _spread(method.intervals)
    fixed = per_image = 0.0  # times the length of the intervals: sums of whole numbers, so that equals stay equal
    counted = count(chosen[0])
    for interval in chosen:
        if interval != chosen[0] and not method.intervals_cost_alike:
            counted = count(interval)
        slope = (counted[1] - counted[0]) / (BATCHES[1] - BATCHES[0])
        fixed += interval.length * (counted[0] - slope * BATCHES[0])
        per_image += interval.length * slope
    length = sum(interval.length for interval in chosen)
    return fixed / length, per_image / length


def _count_training(method: Method, interval: Interval, image_shape: tuple[int, int, int]) -> list[int]:
    """Of a training step, at both batch sizes."""

    def step(batch: int) -> None:
        prediction = method(*_inputs(interval, image_shape, batch), interval, 0.0)
        torch.stack([prediction.output.square().mean(), *prediction.penalties.values()]).sum().backward()
        method.zero_grad(set_to_none=True)

    return [count_flops(partial(step, batch)) for batch in BATCHES]


def _count_evaluation(method: Method, interval: Interval, image_shape: tuple[int, int, int]) -> list[int]:
    """Of a specialised network's evaluation, at both batch sizes."""
    denoiser = method.specialise(interval)
    return [count_flops(partial(denoiser, *_inputs(interval, image_shape, batch))) for batch in BATCHES]


def _inputs(interval: Interval, image_shape: tuple[int, int, int], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.full((batch,), interval.start, dtype=torch.int64, device="meta")
    return torch.empty(batch, *image_shape, device="meta"), t, torch.zeros(batch, dtype=torch.int64, device="meta")


def _spread(intervals: tuple[Interval, ...]) -> list[Interval]:
    if len(intervals) <= MAX_INTERVALS:
        return list(intervals)
    return [intervals[i * len(intervals) // MAX_INTERVALS] for i in range(MAX_INTERVALS)]


def _grouped_mm_flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """PyTorch's counter has no formula for grouped products and would count them as zero.

    Rows (n, k) with matrices (E, k, m), or for the weights' gradient (k, n) with (n, m): each row meets one matrix.
    """
    return 2 * int(a_shape[0]) * int(a_shape[1]) * int(b_shape[-1])


FORMULAS = {torch.ops.aten._grouped_mm: _grouped_mm_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}
