"""How do K stacked linears become one, and how do its gradients become theirs?

Mixing is a matrix product over the stack. The gradients of the K are of rank one, `dL/dW_k = alpha_k G` with G that of the
mixed weight, and `dL/dalpha_k = <W_k, G>`: what one optimiser step does with the mixed linear gathers in G, from which
theirs follow at its end (`Bases.spread`). AdamW takes alpha and G as they are (`bench.adamw`); K copies are made for whoever
wants a parameter's `.grad`.
"""

import math

import torch
from torch import Tensor, nn

from bench import switches
from bench.method import Outer
from methods.backbone import init_linear
from methods.grouped import without_autocast

MOST_PIECES = 16  # of a linear's rows; for no more than so many threads of a CPU
LEAST_VALUES = 1 << 17  # of a linear that is cut: a smaller one lies in a core's cache


class Kept:
    """Memory that every step fills anew: for a new one a CPU would have the system clear page after page, which takes longer than
    what is computed into it. It is in no state dict, and copies of whoever holds it begin without.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

    def like(self, name: str, wanted: Tensor) -> Tensor:
        """The tensor of that name, with anything in it: another one if shape, dtype or device are no longer as wanted."""
        kept = self.tensors.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (wanted.shape, wanted.dtype, wanted.device):
            kept = self.tensors[name] = torch.empty_like(wanted, requires_grad=False)
        return kept


class Bases(nn.Module):
    """K stacked linears: weight (K, out, in), bias (K, out)."""

    def __init__(self, bases: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(bases, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(bases, out_features))
        self.kept = Kept()

    def initialise(self) -> None:
        for weight, bias in zip(self.weight, self.bias, strict=True):
            init_linear(weight, bias)

    def mix(self, mixing: Tensor) -> tuple[Tensor, Tensor]:
        """mixing (K,) -> the expert's weight (out, in) and bias (out,), in float32 also under autocast."""
        with without_autocast(self.weight.device.type):
            return mix(mixing, self.weight), mix(mixing, self.bias)

    @torch.no_grad()
    def mix_for_step(self, mixing: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """As `mix`, but leaves, for the gradients to gather at, and at the same addresses in every step: a CUDA graph goes on
        reading from where it was recorded. What they hold, the next call overwrites.
        """
        weight, bias = self.kept.like("weight", self.weight[0]), self.kept.like("bias", self.bias[0])
        with without_autocast(self.weight.device.type):
            for mixed, stacked in ((weight, self.weight), (bias, self.bias)):
                pieces = cut(stacked)
                torch.bmm(mixing.expand(len(pieces), 1, -1), pieces, out=mixed.view(len(pieces), 1, -1))
        return nn.Parameter(weight), nn.Parameter(bias)

    @torch.no_grad()
    def spread(
        self, mixing: Tensor, weight: nn.Parameter, bias: nn.Parameter, outer: dict[nn.Parameter, Outer] | None = None
    ) -> Tensor:
        """Add to the bases' gradients what follows from those of the mixed weight and bias; returns that of `mixing` (K,).
        With `outer` none is made: they are put there.

        On a CPU a gradient that begins here is in memory that is kept: it holds until the next one begins.
        """
        of_mixing = torch.zeros_like(mixing)
        with without_autocast(self.weight.device.type):
            for name, stacked, mixed in (("weight", self.weight, weight), ("bias", self.bias, bias)):
                assert mixed.grad is not None
                factors = mixing.view(-1, *[1] * mixed.dim())
                if outer is not None:
                    assert stacked.grad is None and stacked not in outer
                    outer[stacked] = Outer(mixing, mixed.grad)
                elif stacked.grad is None:
                    out = self.kept.like(f"gradient of {name}", stacked) if stacked.device.type == "cpu" else None
                    stacked.grad = torch.mul(factors, mixed.grad, out=out)
                else:
                    stacked.grad.addcmul_(factors, mixed.grad)
                of_mixing += inner(stacked, mixed.grad)
        return of_mixing


def mix(mixing: Tensor, stacked: Tensor) -> Tensor:
    """(K,) and (K, ...) -> (...): one matrix product over the stack."""
    if switches.is_on("mixing"):
        return (mixing @ stacked.flatten(1)).view(stacked.shape[1:])
    return (mixing.view(-1, *[1] * (stacked.dim() - 1)) * stacked).sum(dim=0)


def cut(stacked: Tensor) -> Tensor:
    """(K, ...) -> (P, K, n), a view: on a CPU, pieces for its threads to share. Of one matrix with few rows and many columns the
    threads get one row each (`inner`) or leave all to one (mixing).
    """
    is_large = stacked.device.type == "cpu" and stacked[0].numel() >= LEAST_VALUES
    num_pieces = math.gcd(stacked.shape[1], MOST_PIECES) if is_large else 1
    return stacked.view(len(stacked), num_pieces, -1).transpose(0, 1)


def inner(stacked: Tensor, other: Tensor) -> Tensor:
    """(K, ...) and (...) -> (K,): of each of the K, the sum of its products with the other."""
    if stacked.is_cuda and stacked.dim() > 2:  # row by row: of a matrix of K long rows a GPU gives each to one of its processors
        return (stacked.transpose(0, 1) @ other.unsqueeze(-1)).sum(dim=(0, 2))
    pieces = cut(stacked)
    return torch.bmm(other.reshape(len(pieces), 1, -1), pieces.transpose(1, 2)).sum(dim=(0, 1))
