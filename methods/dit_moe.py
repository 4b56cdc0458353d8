"""DiT-MoE: a mixture of experts in place of every MLP, routed by token.

Paper: Fei et al., Scaling Diffusion Transformers to 16 Billion Parameters, arXiv 2407.11633.

    eq. 3-5, token-choice top-k routing        `Router`
    section 3.2, shared expert routing         `MixtureMLP.shared`
    section 3.2, expert-level balance loss     `balance_loss`
    SwiGLU experts (released code)             `expert_mlp`

Tokens are sorted by expert and the experts run as grouped matrix products over stacked weights (E, out, in); on a CPU
one after the other.

Deviations: the paper's balance weight is 0.005; the default is the released code's 0.01. The balance statistics are
those of the whole global batch under data parallelism (`balance_scope: local` is the released code's per-rank form);
with gradient accumulation they are those of a micro-batch. `expert: gelu_mlp` (experts of the dense MLP's form, for
an exact start from a dense model) is not in the paper.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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
    timestep_index,
)
from methods.backbone import Block, DiT, Shape, init_linear
from methods.grouped import activate, combine_rows, expert_mlp, in_pieces, sort_by_expert, without_autocast

DENSE_MLP = {"fc1.weight": "weight_in", "fc1.bias": "bias_in", "fc2.weight": "weight_out", "fc2.bias": "bias_out"}


class Router(nn.Module):
    """Tokens (n, D) -> probabilities (n, E) and, for each token, the indices of its k experts and their gates (n, k)."""

    def __init__(self, width: int, experts: int, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.top_k, self.renormalise = top_k, renormalise
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(tokens.device.type):  # softmax over experts in float32: near-ties decide the routing
            probabilities = F.linear(tokens.float(), self.weight.float()).softmax(dim=-1)
        gates, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return probabilities, chosen, gates


class MixtureMLP(nn.Module):
    """Routed experts plus shared experts, tokens (B, N, D) -> (B, N, D). Weights are stacked over experts, (E, out, in)."""

    def __init__(self, shape: Shape, experts: int, top_k: int, shared_width: float, expert: str, renormalise: bool) -> None:
        super().__init__()
        D, hidden = shape.width, shape.mlp_width
        self.router = Router(D, experts, top_k, renormalise)
        self.gated = expert == "swiglu"
        self.weight_in = nn.Parameter(torch.empty(experts, 2 * hidden if self.gated else hidden, D))
        self.weight_out = nn.Parameter(torch.empty(experts, D, hidden))
        self.bias_in = None if self.gated else nn.Parameter(torch.empty(experts, hidden))
        self.bias_out = None if self.gated else nn.Parameter(torch.empty(experts, D))
        self.shared = SwiGLU(D, int(shared_width * D)) if shared_width else None

    def initialise(self) -> None:
        nn.init.kaiming_uniform_(self.router.weight, a=math.sqrt(5))
        for expert in range(len(self.weight_in)):
            for matrix in self.weight_in[expert].chunk(2) if self.gated else [self.weight_in[expert]]:
                init_linear(matrix, None)
            init_linear(self.weight_out[expert], None)
        for bias in (self.bias_in, self.bias_out):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.shared is not None:
            self.shared.initialise()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the mean router probability of each expert (E,) and the share of assignments each got (E,)."""
        rows = tokens.reshape(-1, tokens.shape[-1])  # (n, D)
        probabilities, chosen, gates = self.router(rows)
        order, inverse, ends = sort_by_expert(chosen, probabilities.shape[-1])
        mixed = expert_mlp(rows, order, inverse, ends, self.weight_in, self.weight_out, self.bias_in, self.bias_out)
        output = combine_rows(mixed, gates, order, inverse)
        if self.shared is not None:
            output = output + in_pieces(self.shared, rows, self.shared.gate_up.weight)
        share = ends.diff(prepend=ends.new_zeros(1)) / chosen.numel()
        return output.view(tokens.shape), probabilities.mean(dim=0), share


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases; gate and up are one stacked linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def initialise(self) -> None:
        for matrix in (*self.gate_up.weight.chunk(2), self.down.weight):
            init_linear(matrix, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.gate_up(x), gated=True))


class MixtureBlock(Block):
    """A backbone block whose MLP is a mixture; returns the tokens and the mixture's routing statistics."""

    def __init__(self, shape: Shape, *mixture: object) -> None:
        self.mixture = mixture
        super().__init__(shape)

    def make_mlp(self, shape: Shape) -> nn.Module:
        return MixtureMLP(shape, *self.mixture)  # type: ignore[arg-type]

    def initialise(self) -> None:
        super().initialise()
        self.mlp.initialise()

    def forward(self, tokens: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        statistics = []

        def mlp(x: Tensor) -> Tensor:
            output, *of_block = self.mlp(x)
            statistics.extend(of_block)
            return output

        tokens = self.apply_branches(tokens, condition, self.attn, mlp)
        return tokens, statistics[0], statistics[1]


class DiTMoE(Method):
    """The backbone with `experts` token-routed experts per block, `top_k` for each token, and shared experts of hidden
    width `shared_width` * D (0: none).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        num_timesteps: int = 1000,
        experts: int = 8,
        top_k: int = 2,
        shared_width: float = 2.0,
        balance_weight: float = 0.01,
        balance_scope: str = "global",
        expert: str = "swiglu",
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        check_range("experts", experts, 1, 1024)
        check_range("top_k", top_k, 1, experts)
        check_range("shared_width", shared_width, 0, 64)
        check_range("balance_weight", balance_weight, 0, 1e6)
        check_choice("balance_scope", balance_scope, ("global", "local"))
        check_choice("expert", expert, ("swiglu", "gelu_mlp"))
        self.intervals = partition(1, num_timesteps)
        self.num_timesteps = num_timesteps
        self.experts, self.top_k = experts, top_k
        self.upcycles_exactly = expert == "gelu_mlp" and renormalise and not shared_width
        self.balance_weight, self.balance_scope = balance_weight, balance_scope
        self.network = DiT(shape, lambda shape: MixtureBlock(shape, experts, top_k, shared_width, expert, renormalise))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        output, mean_probability, share = self.denoise_and_route(x, t, y)
        if self.balance_weight == 0:
            return Prediction(output, {})
        if self.balance_scope == "global":
            share = mean_over_ranks(share)
        return Prediction(output, {"balance": self.balance_weight * balance_loss(mean_probability, share)})

    def denoise_and_route(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, C_out, H, W); per block and expert, the mean router probability and the share of assignments (L, E)."""
        tokens, _, condition = self.network.embed(x, t, y)
        statistics = []
        for block in self.network.blocks:
            tokens, *of_block = block(tokens, condition)
            statistics.append(of_block)
        mean_probability, share = (torch.stack(list(of_blocks)) for of_blocks in zip(*statistics, strict=True))
        return self.network.decode(tokens, condition), mean_probability, share

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: self.denoise_and_route(x, t, y)[0]

    @torch.no_grad()
    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Every expert starts as a copy of the dense MLP and the router as N(0, 0.02): outputs then equal the dense ones."""
        if not self.upcycles_exactly:
            raise ValueError(
                "DiT-MoE cannot start from this dense network: SwiGLU experts, shared experts or gates that do not sum to 1 "
                "cannot reproduce its MLP; set expert: gelu_mlp, shared_width: 0 and renormalise: true"
            )
        mixture = {}
        for name, tensor in state.items():
            block, is_mlp, part = name.partition(".mlp.")
            if is_mlp and part in DENSE_MLP:
                mixture[f"{block}.mlp.{DENSE_MLP[part]}"] = tensor.expand(self.experts, *tensor.shape)
            else:
                mixture[name] = tensor
        for name, tensor in self.network.state_dict().items():
            if name.endswith("router.weight"):
                mixture[name] = torch.randn_like(tensor) * 0.02
        load_exactly(self.network, mixture, "the dense state")

    def num_active_parameters(self) -> int:
        idle = (self.experts - self.top_k) / self.experts
        routed = sum(
            p.numel() for block in self.network.blocks for name, p in block.mlp.named_parameters(recurse=False) if p is not None
        )
        return super().num_active_parameters() - round(idle * routed)

    @torch.no_grad()
    def diagnostics(self, probe: Probe | None = None) -> Diagnostics:
        """Routing is by token, so it is seen on the probe: each expert's share of the assignments in each of 20 groups of
        timesteps, at each position (in raster order) and in each class; NaN where the probe has no image."""
        if probe is None:
            return {}
        num_groups, num_classes = min(20, self.num_timesteps), self.network.shape.num_classes
        group = timestep_index(probe.t, self.num_timesteps) * num_groups // self.num_timesteps
        routing = probe.x.new_full((len(self.network.blocks), num_groups, self.experts), float("nan"))
        by_position, by_class = [], probe.x.new_zeros((len(self.network.blocks), num_classes + 1, self.experts))
        for g in group.unique().tolist():  # a group without an image stays NaN
            inside = group == g
            with self.assignments() as of_blocks:
                routing[:, g] = self.denoise_and_route(probe.x[inside], probe.t[inside], probe.y[inside])[2]
            counts = torch.stack(of_blocks).view(len(of_blocks), int(inside.sum()), -1, self.experts)  # (L, B, N, E)
            by_position.append(counts.sum(dim=1))
            by_class.index_add_(1, probe.y[inside], counts.sum(dim=2).to(by_class))
        at_position = torch.stack(by_position).sum(dim=0)
        return {
            "routing": (("block", "timestep", "expert"), routing.cpu().numpy()),
            "routing_by_position": (("block", "position", "expert"), shares(at_position).cpu().numpy()),
            "routing_by_class": (("block", "class", "expert"), shares(by_class[:, :num_classes]).cpu().numpy()),
            "expert_usage": (("block", "expert"), routing.nanmean(dim=1).cpu().numpy()),
        }

    @contextmanager
    def assignments(self) -> Iterator[list[Tensor]]:
        """Filled, for each block that runs inside, with how often each token (image by image) went to each expert (B*N, E)."""
        of_blocks: list[Tensor] = []

        def keep(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            of_blocks.append(F.one_hot(output[1], self.experts).sum(dim=1))

        hooks = [block.mlp.router.register_forward_hook(keep) for block in self.network.blocks]
        try:
            yield of_blocks
        finally:
            for hook in hooks:
                hook.remove()


def shares(counts: Tensor) -> Tensor:
    """Assignments (..., E) as shares of their sum over experts; NaN where there are none."""
    return counts / counts.sum(dim=-1, keepdim=True)


def balance_loss(mean_probability: Tensor, share: Tensor) -> Tensor:
    """Sum over blocks of `sum_i f_i P_i`, f_i = E * the share of assignments that went to expert i; both (L, E)."""
    return (share.shape[-1] * share * mean_probability).sum()


def mean_over_ranks(share: Tensor) -> Tensor:
    """The global batch's shares. They carry no gradient and the loss is linear in P, so averaging the
    ranks' gradients then gives exactly the gradient of the global batch's balance loss."""
    if dist.is_available() and dist.is_initialized():
        share = share.detach().clone()
        dist.all_reduce(share)
        share = share / dist.get_world_size()
    return share
