"""How does AdamW take a gradient that is an outer product, without the product in memory?

The gradients of K stacked parameters that a step mixes into one are multiples of the one's (`methods.bases`). Made whole, all of
them, they are K networks in memory, written once to be read once; here a piece at a time is made and used.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bench.method import Outer

PIECE = {"cpu": 1 << 20, "cuda": 1 << 24}  # values of gradients that are made at a time: on a GPU calls cost more than memory
OPTIONS = ("lr", "weight_decay", "eps", "maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad")


class Piece(NamedTuple):
    """Of a parameter and of all that its step takes; its gradient is `factors * shared`."""

    parameter: Tensor
    factors: Tensor
    shared: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # which its step counts on


class AdamW(torch.optim.AdamW):
    """torch's, which also steps what has its gradient in `outer` in place of `.grad`: by the same numbers. Clearing gradients
    clears that, too.
    """

    def __init__(self, groups: Any, outer: dict[nn.Parameter, Outer], **options: Any) -> None:
        super().__init__(groups, **options)
        self.outer = outer

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.outer.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in self.outer]
            for some in batched(piece for parameter in parameters for piece in self._pieces(parameter, group)):
                _step(some, group)

    def _pieces(self, parameter: nn.Parameter, group: dict[str, Any]) -> Iterator[Piece]:
        state, (factors, shared) = self.state[parameter], self.outer[parameter]
        if not state:  # as torch begins one
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        factors = factors.view(-1, *[1] * shared.dim())
        places = list(cut(parameter.shape, most_values(parameter)))
        for place in places:
            exp_avg, exp_avg_sq = state["exp_avg"][place], state["exp_avg_sq"][place]
            step = state["step"] if place is places[-1] else state["step"].clone()
            yield Piece(parameter[place], factors[place[0]], shared[place[1]], exp_avg, exp_avg_sq, step)


def _step(some: list[Piece], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [piece.parameter for piece in some],
        [piece.factors * piece.shared for piece in some],
        [piece.exp_avg for piece in some],
        [piece.exp_avg_sq for piece in some],
        [],
        [piece.step for piece in some],
        beta1=beta1,
        beta2=beta2,
        **{name: cast(Any, group[name]) for name in OPTIONS},
    )


def most_values(tensor: Tensor) -> int:
    return PIECE.get(tensor.device.type, PIECE["cuda"])


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """In their order, as many as are made at a time."""
    some: list[Piece] = []
    for piece in pieces:
        if some and sum(each.parameter.numel() for each in (*some, piece)) > most_values(piece.parameter):
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def cut(shape: torch.Size, num_values: int) -> Iterator[tuple[slice, slice]]:
    """Of (K, rows, ...), all of it in the order of memory: some of the K whole, or some rows of one, of about so many values."""
    num_stacked, num_rows, *rest = shape
    values_of_row = torch.Size(rest).numel()
    num_whole = num_values // (num_rows * values_of_row)
    if num_whole:
        yield from ((slice(k, k + num_whole), slice(None)) for k in range(0, num_stacked, num_whole))
        return
    some = max(1, num_values // values_of_row)
    for k in range(num_stacked):
        yield from ((slice(k, k + 1), slice(row, row + some)) for row in range(0, num_rows, some))
