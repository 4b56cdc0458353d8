"""How does AdamW take a gradient that is an outer product, without the product in memory?

The gradients of K stacked parameters that a step mixes into one are multiples of the one's (`methods.bases`). Made whole, all of
them, they are K networks in memory, written once to be read once; here a piece at a time is made and used.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = {"cpu": 1 << 21, "cuda": 1 << 24}  # values of a gradient that are made at a time: on a GPU calls cost more than memory


class Outer(NamedTuple):
    """The gradient (K, ...) of a parameter that is `factors` (K,) times `shared` (...)."""

    factors: Tensor
    shared: Tensor

    def norm(self) -> Tensor:
        """Of the whole gradient (scalar)."""
        return torch.linalg.vector_norm(self.factors) * torch.linalg.vector_norm(self.shared)


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
            for parameter in group["params"]:
                if parameter in self.outer:
                    self._step_by(self.outer[parameter], parameter, group)

    def _step_by(self, gradient: Outer, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:  # as torch begins one
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        factors = gradient.factors.view(-1, *[1] * gradient.shared.dim())
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "eps", "maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad")
        for each, rows in pieces(parameter.shape, PIECE.get(parameter.device.type, PIECE["cuda"])):
            adamw(
                [parameter[each, rows]],
                [factors[each] * gradient.shared[rows]],
                [state["exp_avg"][each, rows]],
                [state["exp_avg_sq"][each, rows]],
                [],
                [state["step"].clone()],  # which it counts on
                beta1=beta1,
                beta2=beta2,
                **{name: cast(Any, group[name]) for name in names},
            )
        state["step"] += 1


def pieces(shape: torch.Size, num_values: int) -> Iterator[tuple[slice, slice]]:
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
