"""How do sorted rows run through stacked experts without a loop or a host synchronisation?

Rows are sorted by expert; `torch.nn.functional.grouped_mm` multiplies each group with its expert's matrix. It takes
float32 (where the build has it), bfloat16 and float16 of one dtype, strides in multiples of 16 bytes and int32
offsets, and does not follow autocast.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable


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
    """Whether `grouped_mm` exists for these operands: dtype, alignment to 16 bytes, and on a GPU one that has it."""
    if not hasattr(F, "grouped_mm") or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(size * rows.element_size() % 16 for size in weight.shape[1:]):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    return True


def looped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The plain fallback: one product per expert. It needs the group sizes on the host, so it waits for the device."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).cpu().numpy()
    return torch.cat([part @ matrix.T for part, matrix in zip(rows.split([int(s) for s in sizes]), weight, strict=True)])
