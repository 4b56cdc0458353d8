"""Remix-DiT: E experts mixed from K basis networks by learned coefficients.

Paper: Fang et al., Remix-DiT, arXiv 2412.05628.

    eq. 5-6, expert = sum_k alpha_k W_k            `methods.bases`
    section 3.3, learnable mixing coefficients     `RemixDiT.coefficients`
    section 3.3, prior coefficients                `RemixDiT.prior_basis`, `draw_logits`
    section 3.3, regularisation to the prior       `RemixDiT.prior_loss`
    section 3.4, precomputed experts               `RemixDiT.specialise`

The bases are K sets of the four linears of each block; adaLN, embedders and final layer are shared by all experts.
Weights are mixed once per optimiser step, then the plain backbone's computation runs. The bases' gradients are of rank
one, `dL/dW_k = alpha_k G` with G that of the mixed weight, and `dL/dalpha_k = <W_k, G>`: passes and ranks add up G, the
gradient of one network, and AdamW takes alpha and G at the end of a step (`RemixDiT.one_step`, `bench.adamw`). A step that
trains several experts (`train.intervals_per_step`) does this for each, makes K copies of every G, and adds them up.

Deviations: the prior weight is annealed linearly from `prior_weight` to 0, as in the paper; `prior_annealing:
released` is the released code's 2e-4 to 1e-4 (a sign slip), scaled by `prior_weight`. Batches across intervals are
refused; the released code averages their coefficients. A step draws one expert for all ranks; the released code's
draw by each rank is `train.intervals_per_step` of as many as ranks, here out of shuffled cycles. `coefficients:
local` (per block) starts all blocks from the same drawn logits. With `mixer: raw` the table starts at the softmax
of the drawn logits, so that all mixers start alike; the prior loss is for `mixer: softmax` only. With `mixer:
one_hot` all bases are one stacked parameter, so AdamW's momentum also moves the bases that a step does not use.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench import switches
from bench.intervals import Interval, partition
from bench.method import (
    Denoiser,
    Diagnostics,
    Method,
    Prediction,
    Probe,
    check_choice,
    check_range,
    check_timesteps,
    load_exactly,
)
from methods.backbone import Block, DiT, Shape, attend
from methods.bases import Bases


class BasisAttention(nn.Module):
    def __init__(self, shape: Shape, bases: int) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = Bases(bases, shape.width, 3 * shape.width)
        self.proj = Bases(bases, shape.width, shape.width)


class BasisMLP(nn.Module):
    def __init__(self, shape: Shape, bases: int) -> None:
        super().__init__()
        self.fc1 = Bases(bases, shape.width, shape.mlp_width)
        self.fc2 = Bases(bases, shape.mlp_width, shape.width)


class RemixBlock(Block):
    """A backbone block whose four linears are mixed from K bases."""

    def __init__(self, shape: Shape, bases: int) -> None:
        self.num_bases = bases
        super().__init__(shape)

    def make_attention(self, shape: Shape) -> nn.Module:
        return BasisAttention(shape, self.num_bases)

    def make_mlp(self, shape: Shape) -> nn.Module:
        return BasisMLP(shape, self.num_bases)

    def initialise(self) -> None:
        super().initialise()
        for linear in self.bases().values():
            linear.initialise()

    def bases(self) -> dict[str, Bases]:
        return {"attn.qkv": self.attn.qkv, "attn.proj": self.attn.proj, "mlp.fc1": self.mlp.fc1, "mlp.fc2": self.mlp.fc2}

    def forward(  # type: ignore[override]
        self, tokens: Tensor, condition: Tensor, mixing: Tensor, mixed: Sequence[tuple[Tensor, ...]] = ()
    ) -> Tensor:
        """tokens (B, N, D), condition (B, D), mixing (K,); `mixed`: the four weights and biases, where they are mixed already."""
        mixed = mixed or [linear.mix(mixing) for linear in self.bases().values()]
        qkv, proj, fc1, fc2 = (partial(F.linear, weight=weight, bias=bias) for weight, bias in mixed)
        return self.apply_branches(
            tokens,
            condition,
            lambda x: attend(x, qkv, proj, self.attn.num_heads),
            lambda x: fc2(F.gelu(fc1(x), approximate="tanh")),
        )


class RemixDiT(Method):
    """`experts` networks mixed from `bases` sets of block weights; expert e has the e-th of as many intervals."""

    intervals_share_parameters = True
    intervals_cost_alike = True

    def __init__(
        self,
        shape: Shape,
        *,
        num_timesteps: int = 1000,
        bases: int = 4,
        experts: int = 8,
        mixer: str = "softmax",
        coefficients: str = "global",
        coefficient_lr: float = 1e-2,
        prior_weight: float = 1e-4,
        prior_annealing: str = "linear",
    ) -> None:
        super().__init__()
        check_range("bases", bases, 1, 1024)
        check_choice("mixer", mixer, ("softmax", "raw", "one_hot"))
        check_choice("coefficients", coefficients, ("global", "local"))
        check_choice("prior_annealing", prior_annealing, ("linear", "constant", "released"))
        check_range("coefficient_lr", coefficient_lr, 0, 1e3)
        check_range("prior_weight", prior_weight, 0, 1e6)
        self.intervals = partition(experts, num_timesteps)
        self.num_timesteps = num_timesteps
        self.mixer, self.coefficient_lr = mixer, coefficient_lr
        self.prior_weight, self.prior_annealing = prior_weight, prior_annealing
        self.network = DiT(shape, lambda shape: RemixBlock(shape, bases))
        prior_basis = torch.arange(experts) * bases // experts
        self.prior_basis: Tensor  # (E,) int64: the basis that an expert starts from
        self.register_buffer("prior_basis", prior_basis, persistent=False)
        logits = draw_logits(prior_basis, bases)
        if mixer == "raw":
            logits = logits.softmax(dim=-1)
        if coefficients == "local":
            logits = logits.unsqueeze(1).repeat(1, shape.depth, 1)
        self.mixed: list[list[tuple[nn.Parameter, ...]]] = []  # inside `one_step`: of each block, its four weights and biases
        self.logits = nn.Parameter(logits, requires_grad=mixer != "one_hot")  # (E, K) or, local, (E, L, K)

    def coefficients(self) -> Tensor:
        """(E, K) or, local, (E, L, K): the weight of each basis in each expert."""
        if self.mixer == "softmax":
            return self.logits.softmax(dim=-1)
        if self.mixer == "raw":
            return self.logits
        chosen = F.one_hot(self.prior_basis, self.logits.shape[-1]).to(self.logits.dtype)  # (E, K)
        return chosen if self.logits.dim() == 2 else chosen.unsqueeze(1).expand_as(self.logits)

    def block_coefficients(self, interval: Interval) -> Tensor:
        """(L, K): the mixing of one expert, block by block."""
        mixing = self.coefficients()[interval.index]
        return mixing.expand(self.network.shape.depth, -1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        tokens, _, condition = self.network.embed(x, t, y)
        mixed = self.mixed or [[]] * len(self.network.blocks)
        for block, mixing, weights in zip(self.network.blocks, self.block_coefficients(interval), mixed, strict=True):
            tokens = block(tokens, condition, mixing, weights)
        output = self.network.decode(tokens, condition)
        if self.mixer != "softmax" or self.prior_weight == 0:
            return Prediction(output, {})
        return Prediction(output, {"mixing_prior": self.annealed_prior_weight(progress) * self.prior_loss()})

    @contextmanager
    def one_step(self, interval: Interval) -> Iterator[list[nn.Parameter]]:
        """Mixed here, once; passes and ranks then share the gradient of one network, from which that of the bases follows."""
        stacked = {id(p) for block in self.network.blocks for linear in block.bases().values() for p in linear.parameters()}
        if not switches.is_on("mixing") or any(isinstance(p, DTensor) for p in self.parameters()):
            with super().one_step(interval) as leaves:
                yield leaves
            return
        coefficients = self.block_coefficients(interval)  # (L, K)
        with torch.no_grad():
            self.mixed = [
                [linear.mix_for_step(mixing) for linear in block.bases().values()]
                for block, mixing in zip(self.network.blocks, coefficients, strict=True)
            ]
        try:
            yield self._leaves(stacked)
            mixing = coefficients.detach().clone()  # raw ones are a parameter, which the optimiser may move before it takes them
            gradient = torch.zeros_like(coefficients)
            for index, block in enumerate(self.network.blocks):
                for linear, pair in zip(block.bases().values(), self.mixed[index], strict=True):
                    gradient[index] += linear.spread(mixing[index], *pair, self.outer_gradients)
            if coefficients.requires_grad:
                coefficients.backward(gradient)
        finally:
            self.mixed = []

    def _leaves(self, stacked: set[int]) -> list[nn.Parameter]:
        """Inside `one_step`, in the order of use: the mixed weights of a block go with its own, in the place of the `stacked`."""
        parts = (*self.network.blocks, self.network.final)
        own = [[p for p in part.parameters() if p.requires_grad and id(p) not in stacked] for part in parts]
        later = stacked.union(id(p) for part in own for p in part)
        first = [p for p in self.parameters() if p.requires_grad and id(p) not in later]
        mixed = [[p for pair in of_block for p in pair] for of_block in (*self.mixed, ())]
        return first + [p for part in zip(own, mixed, strict=True) for leaves in part for p in leaves]

    def prior_loss(self) -> Tensor:
        """Mean over all experts of the cross-entropy of their logits to their prior basis (scalar, unweighted)."""
        logits = self.logits if self.logits.dim() == 2 else self.logits.flatten(0, 1)
        target = self.prior_basis.repeat_interleave(len(logits) // len(self.prior_basis))
        return F.cross_entropy(logits, target)

    def annealed_prior_weight(self, progress: float) -> float:
        if self.prior_annealing == "constant":
            return self.prior_weight
        if self.prior_annealing == "released":
            return self.prior_weight * (2 - progress)
        return self.prior_weight * (1 - progress)

    @torch.no_grad()
    def specialise(self, interval: Interval) -> Denoiser:
        """A plain backbone with the expert's weights, mixed once: sampling costs what the dense model costs."""
        with torch.device("meta"):
            expert = DiT(self.network.shape)
        state = {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        coefficients = self.block_coefficients(interval)
        for index, block in enumerate(self.network.blocks):
            for name, linear in block.bases().items():
                weight, bias = linear.mix(coefficients[index])
                state[f"blocks.{index}.{name}.weight"], state[f"blocks.{index}.{name}.bias"] = weight, bias
        expert.load_state_dict(state, assign=True)
        expert.time_embedding.frequencies = self.network.time_embedding.frequencies  # not in a state dict
        return expert.eval()  # not without gradients: autocast casts weights once, not in every step, only if they require them

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Every basis starts as a copy, so every expert whose coefficients sum to 1 equals the dense network."""
        stacked = dict(state)
        for index, block in enumerate(self.network.blocks):
            for name, linear in block.bases().items():
                for key in (f"blocks.{index}.{name}.weight", f"blocks.{index}.{name}.bias"):
                    if key in state:
                        stacked[key] = state[key].expand(len(linear.weight), *state[key].shape)
        load_exactly(self.network, stacked, "the dense state")

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters()), "lr": lr}]
        if self.logits.requires_grad:
            groups.append({"params": [self.logits], "lr": self.coefficient_lr})
        return groups

    def num_active_parameters(self) -> int:
        stacked = sum(p.numel() for block in self.network.blocks for b in block.bases().values() for p in b.parameters())
        num_bases = self.logits.shape[-1]
        shared = sum(p.numel() for p in self.network.parameters()) - stacked
        return shared + stacked // num_bases

    def diagnostics(self, probe: Probe | None = None) -> Diagnostics:
        axes = ("expert", "basis") if self.logits.dim() == 2 else ("expert", "block", "basis")
        return {"mixing_coefficients": (axes, self.coefficients().detach().cpu().numpy())}


def draw_logits(prior_basis: Tensor, bases: int) -> Tensor:
    """(E, K): N(0, 1) + 3 * std * one-hot(prior), std that of the drawn logits themselves (unbiased)."""
    logits = torch.randn(len(prior_basis), bases)
    spread = logits.std() if logits.numel() > 1 else torch.ones(())
    return logits + 3 * spread * F.one_hot(prior_basis, bases)
