"""How do sorted rows run through stacked experts without a loop or a host synchronisation?

Rows are sorted by expert; `torch.nn.functional.grouped_mm` multiplies each group with its expert's matrix. It takes
float32 (where the build has it), bfloat16 and float16 of one dtype, strides in multiples of 16 bytes and int32
offsets, and does not follow autocast.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.flop_counter import register_flop_formula

from bench import switches


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """chosen (n, k) -> the order (n*k,) of assignments sorted by expert, its inverse, and where each group ends (E,) int32."""
    by_expert, order = chosen.reshape(-1).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    experts = torch.arange(num_experts, device=chosen.device)
    return order, inverse, torch.searchsorted(by_expert, experts, right=True, out_int32=True)


class _TakeRows(Function):
    """Gather with a gather for a gradient: no atomic adds, so it is fast and repeats to the bit."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k  # type: ignore[attr-defined]
        return rows[order // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad[inverse].view(-1, ctx.top_k, grad.shape[-1]).sum(dim=1), None, None, None  # type: ignore[attr-defined]


class _Unsort(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (order,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad[order], None, None


def take_rows(rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Rows (n, D) -> (n*k, D): every row once per assignment, sorted by expert."""
    return _TakeRows.apply(rows, order, inverse, top_k)


def combine_rows(rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Sorted rows (n*k, D) and gates (n, k) -> (n, D): the gated sum over each row's experts."""
    n, k = gates.shape
    return (_Unsort.apply(rows, order, inverse).view(n, k, -1) * gates.unsqueeze(-1).to(rows.dtype)).sum(dim=1)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Rows (n, in), sorted by expert, weight (E, out, in), bias (E, out), ends (E,) -> (n, out)."""
    device = rows.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # grouped_mm does not follow autocast
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if can_group(rows, weight):
        product = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    elif rows.is_meta:  # group sizes are not known there; one expert for all rows has the loop's shapes and cost
        product = rows @ weight[0].T
    else:
        product = looped_mm(rows, weight, ends)
    if bias is None:
        return product
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device, dtype=ends.dtype), right=True)
    return product + F.one_hot(expert, len(weight)).to(bias.dtype) @ bias  # a matrix product: its gradient has no atomics


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which a computation keeps its dtype. (Autocast does not know the meta device.)"""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` exists for these operands (dtype, alignment to 16 bytes, and on a GPU one that has it) and is on."""
    if not switches.is_on("grouped") or not hasattr(F, "grouped_mm"):
        return False
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(size * rows.element_size() % 16 for size in weight.shape[1:]):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and gpu_can_group()
    return True


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator]
def gpu_can_group() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


@torch.library.custom_op("timestep_bench::looped_mm", mutates_args=())
def looped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The plain fallback: one product per expert. It needs the group sizes on the host, so it waits for the device."""
    product = rows.new_empty(len(rows), weight.shape[1])
    for expert, (start, stop) in enumerate(groups(ends)):
        torch.mm(rows[start:stop], weight[expert].T, out=product[start:stop])
    return product


@looped_mm.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("timestep_bench::looped_mm_weight_gradient", mutates_args=())
def looped_mm_weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad (n, out) and rows (n, in), sorted by expert -> (E, out, in)."""
    product = rows.new_empty(len(ends), grad.shape[1], rows.shape[1])
    for expert, (start, stop) in enumerate(groups(ends)):
        torch.mm(grad[start:stop].T, rows[start:stop], out=product[expert])
    return product


@looped_mm_weight_gradient.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


@register_flop_formula(torch.ops.timestep_bench.looped_mm)
def _(rows_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.timestep_bench.looped_mm_weight_gradient)
def _(grad_shape: torch.Size, rows_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * grad_shape[0] * grad_shape[1] * rows_shape[1]


def groups(ends: Tensor) -> Iterator[tuple[int, int]]:
    """Where each expert's rows start and stop."""
    return pairwise([0, *ends.tolist()])


def _looped_mm_backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    return looped_mm(grad, weight.transpose(1, 2), ends), looped_mm_weight_gradient(grad, rows, ends), None


def _keep_operands(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


looped_mm.register_autograd(_looped_mm_backward, setup_context=_keep_operands)
