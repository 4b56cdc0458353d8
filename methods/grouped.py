"""How do sorted rows run through stacked experts, without a loop or a host synchronisation on a GPU?

Rows are sorted by expert; `torch.nn.functional.grouped_mm` multiplies each group with its expert's matrix. It takes
float32 (where the build has it), bfloat16 and float16 of one dtype, strides in multiples of 16 bytes and int32
offsets, and does not follow autocast.

On a CPU group sizes can be looked at for nothing, and new memory is what is slow: there `run_in_pieces` takes one expert
after the other through its whole MLP.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.flop_counter import register_flop_formula

from bench import switches
from methods.backbone import PIECE_BYTES


def build_groups(dtype: torch.dtype) -> bool:
    """Whether this PyTorch can, also where it only traces shapes (2.11 takes bfloat16 alone there, 2.15 float32 too)."""
    rows, weight = torch.empty(8, 8, dtype=dtype, device="meta"), torch.empty(1, 8, 8, dtype=dtype, device="meta")
    try:
        F.grouped_mm(rows, weight, offs=torch.empty(1, dtype=torch.int32, device="meta"))
    except RuntimeError:
        return False
    return True


GROUPED_DTYPES = frozenset(filter(build_groups, (torch.float32, torch.bfloat16, torch.float16)))
OUTSIDE_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)  # of an operation that waits for numbers: CUDA graphs are recorded around it


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
        return sum_rows(grad, inverse.view(-1, ctx.top_k)), None, None, None  # type: ignore[attr-defined]


class _CombineRows(Function):
    """A gated sum whose gradient gathers too, and keeps no copy of the rows in the order of the tokens."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, order, inverse)
        return sum_rows(rows, inverse.view(gates.shape), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        rows, gates, order, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        of_assignments = grad[order // gates.shape[1]]  # (n*k, D)
        of_gates = (of_assignments * rows).sum(dim=-1)[inverse].view(gates.shape)
        return of_assignments * gates.reshape(-1)[order].unsqueeze(-1), of_gates, None, None


def take_rows(rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Rows (n, D) -> (n*k, D): every row once per assignment, sorted by expert."""
    return _TakeRows.apply(rows, order, inverse, top_k)


def combine_rows(rows: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Sorted rows (n*k, D) and gates (n, k) -> (n, D): the gated sum over each row's experts."""
    return _CombineRows.apply(rows, gates.to(rows.dtype), order, inverse)


def expert_mlp(
    tokens: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
) -> Tensor:
    """Tokens (n, D) and how they are sorted -> (n*k, D), sorted: SwiGLU without biases, GELU with them."""
    if runs_in_pieces(tokens):
        return run_in_pieces(tokens, order, inverse, ends, (weight_in, weight_out, bias_in, bias_out))
    rows = take_rows(tokens, order, inverse, len(order) // len(tokens))
    hidden = activate(grouped_linear(rows, weight_in, bias_in, ends), gated=bias_in is None)
    return grouped_linear(hidden, weight_out, bias_out, ends)


def one_expert(rows: Tensor, weight_in: Tensor, weight_out: Tensor, bias_in: Tensor | None, bias_out: Tensor | None) -> Tensor:
    """Rows (m, D) of one expert -> (m, D), with its matrices (out, in) and biases (out,)."""
    return F.linear(activate(F.linear(rows, weight_in, bias_in), gated=bias_in is None), weight_out, bias_out)


def activate(hidden: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def sum_rows(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows (m, D), index and weights (n, k) -> (n, D): for each index the sum of its k rows, with their weights."""
    if runs_in_pieces(rows):
        return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")  # one pass, without k copies
    gathered = rows[index]  # (n, k, D)
    return (gathered if weights is None else gathered * weights.unsqueeze(-1)).sum(dim=1)


def runs_in_pieces(rows: Tensor) -> bool:
    """Whether group sizes may be looked at: on a CPU, and not in a graph that serves them all."""
    on = switches.is_on("grouped") and switches.is_on("pieces")
    return on and rows.device.type == "cpu" and not torch.compiler.is_compiling()


def run_in_pieces(tokens: Tensor, order: Tensor, inverse: Tensor, ends: Tensor, stacked: Sequence[Tensor | None]) -> Tensor:
    """As `expert_mlp`: expert after expert, each on so many of its rows at a time that their hidden layer is a piece."""
    tokens, top_k = in_autocast(tokens), len(order) // len(tokens)
    experts = list(zip(*([None] * len(ends) if each is None else in_autocast(each).unbind() for each in stacked), strict=True))
    most, lengths, of_pieces = rows_in_a_piece(tokens, experts[0][0]), [], []
    for (start, stop), expert in zip(groups(ends), experts, strict=True):
        for row in range(start, stop, most):
            lengths.append(min(most, stop - row))
            of_pieces.append(expert)
    if torch.is_grad_enabled():  # all rows are taken at once: so is their gradient
        taken = take_rows(tokens, order, inverse, top_k).split(lengths)
        return torch.cat([one_expert(rows, *expert) for rows, expert in zip(taken, of_pieces, strict=True)])
    output = tokens.new_empty(len(order), tokens.shape[1])
    for part, source, expert in zip(output.split(lengths), (order // top_k).split(lengths), of_pieces, strict=True):
        part.copy_(one_expert(tokens[source], *expert))
    return output


def in_pieces(run: Callable[[Tensor], Tensor], rows: Tensor, weight: Tensor) -> Tensor:
    """`run(rows)`, whose hidden layer is that of `weight` (hidden, in); without gradients on a CPU piece after piece."""
    if torch.is_grad_enabled() or not runs_in_pieces(rows):
        return run(rows)
    return torch.cat([run(piece) for piece in rows.split(rows_in_a_piece(in_autocast(rows[:1]), weight))])


def rows_in_a_piece(rows: Tensor, weight: Tensor) -> int:
    return max(1, PIECE_BYTES // (len(weight) * rows.element_size()))


def in_autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast, where it is on, has for matrix products."""
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # which does not know the meta device
    return tensor.to(torch.get_autocast_dtype(device)) if autocast else tensor


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Rows (n, in), sorted by expert, weight (E, out, in), bias (E, out), ends (E,) -> (n, out)."""
    rows, weight = in_autocast(rows), in_autocast(weight)
    bias = None if bias is None else in_autocast(bias)
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
    """A context in which a computation keeps its dtype. (Autocast does not know the meta device: there `bench.memory` asks for
    the CPU's.)
    """
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` exists for these operands (dtype, alignment to 16 bytes, and on a GPU one that has it) and is on."""
    if not switches.is_on("grouped"):
        return False
    if rows.dtype not in GROUPED_DTYPES:
        return False
    if any(size * rows.element_size() % 16 for size in weight.shape[1:]):
        return False
    if rows.device.type == "cuda":
        return rows.dtype == torch.bfloat16 and gpu_can_group()
    return True


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator]
def gpu_can_group() -> bool:
    """Whether PyTorch has a kernel for this GPU: for capability 9 (H100) and 10 (B200). On others, an A100 too, its own
    `grouped_mm` copies the offsets to the host and loops, which a CUDA graph does not survive: there `looped_mm` does so.
    """
    return torch.cuda.get_device_capability()[0] in (9, 10)


@torch.library.custom_op("timestep_bench::looped_mm", mutates_args=(), tags=OUTSIDE_CUDA_GRAPHS)
def looped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The plain fallback: one product per expert. It needs the group sizes on the host, so it waits for the device."""
    product = rows.new_empty(len(rows), weight.shape[1])
    for expert, (start, stop) in enumerate(groups(ends)):
        torch.mm(rows[start:stop], weight[expert].T, out=product[start:stop])
    return product


@looped_mm.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("timestep_bench::looped_mm_weight_gradient", mutates_args=(), tags=OUTSIDE_CUDA_GRAPHS)
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
