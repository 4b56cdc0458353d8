"""Switch-DiT: small experts per block, gated by the timestep.

Paper: Park et al., Switch Diffusion Transformer, arXiv 2403.09176.

    eq. 4, timestep gate, top-k              `TimestepGate`
    eq. 5-6, gated mask, then the block      `SwitchBlock`
    section 4.3, target map over L*M slots   `target_slots`
    section 4.3, assignment                  `match_columns`
    section 4.3, diffusion-prior loss        `jensen_shannon`, `SwitchDiT.prior`

An expert is one linear, so the mask of a sample, `m = 1 + sum_k g_k E_k(x)`, is a single linear whose weights are
mixed from its experts: mixing costs M*D^2 a sample instead of k*N*D^2, and nothing is dispatched.

Deviations: where the optimal assignment is not unique, the released code picks one at random; here it is the one that
scipy's solver finds, the same every time. The gate over all timesteps that the assignment needs is computed without
gradient, as its result is a constant.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from bench import switches
from bench.intervals import Interval, partition
from bench.method import (
    Denoiser,
    Diagnostics,
    Method,
    Prediction,
    Probe,
    check_range,
    check_timesteps,
    load_exactly,
    timestep_index,
)
from methods.backbone import Block, DiT, Shape, init_linear
from methods.grouped import OUTSIDE_CUDA_GRAPHS, in_autocast, without_autocast

LOG_EPS = 1e-6  # inside the logarithms of the Jensen-Shannon divergence, as released


class TimestepGate(nn.Module):
    """Timestep embedding (B, D) -> probabilities over M experts and, zero outside the top k, gates; both (B, M).

    The kept probabilities are not renormalised.
    """

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.linear = nn.Linear(width, experts)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.linear(F.silu(time)).float().softmax(dim=-1)
        return probabilities, probabilities * self.chosen(probabilities)

    def chosen(self, probabilities: Tensor) -> Tensor:
        """(B, M): 1 at the k largest, else 0."""
        return torch.zeros_like(probabilities).scatter(-1, probabilities.topk(self.top_k, dim=-1).indices, 1.0)


class SwitchBlock(nn.Module):
    """A backbone block behind a mask that the timestep's experts compute from its input tokens."""

    def __init__(self, shape: Shape, experts: int, top_k: int) -> None:
        super().__init__()
        self.block = Block(shape)
        self.gate = TimestepGate(shape.width, experts, top_k)
        self.expert_weight = nn.Parameter(torch.zeros(experts, shape.width, shape.width))  # (M, in, out)
        self.expert_bias = nn.Parameter(torch.zeros(experts, shape.width))

    def initialise(self) -> None:
        self.block.initialise()
        init_linear(self.gate.linear.weight, self.gate.linear.bias)
        nn.init.zeros_(self.expert_weight)
        nn.init.zeros_(self.expert_bias)

    def forward(self, tokens: Tensor, condition: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, N, D), condition and time (B, D) -> tokens and the gate's probabilities (B, M)."""
        probabilities, gates = self.gate(time)
        change = self.deviation(tokens, gates) * tokens  # the mask times the tokens, less the tokens
        return self.block(tokens + change, condition) - change, probabilities

    def deviation(self, tokens: Tensor, gates: Tensor) -> Tensor:
        """(B, N, D): the mask less one, that is the gated sum of the experts, as one linear per sample.

        The one is left out because bfloat16 knows no number between 1 and 1.0078: a mask that has just begun to learn would be 1.
        """
        width = tokens.shape[-1]
        if not switches.is_on("masks"):
            of_experts = [tokens @ w.to(tokens.dtype) + b for w, b in zip(self.expert_weight, self.expert_bias, strict=True)]
            return (torch.stack(of_experts, dim=-1) * gates[:, None, None, :].to(tokens.dtype)).sum(dim=-1)
        weight = (gates @ self.expert_weight.flatten(1)).view(-1, width, width)  # (B, in, out)
        bias = gates @ self.expert_bias  # (B, D)
        return torch.baddbmm(bias.unsqueeze(1), in_autocast(tokens), weight)  # all as autocast has them: nothing is widened


class SwitchDiT(Method):
    """The backbone with `experts` timestep-gated linears per block, `top_k` of them active."""

    def __init__(
        self, shape: Shape, *, num_timesteps: int = 1000, experts: int = 3, top_k: int = 2, prior_weight: float = 1.0
    ) -> None:
        super().__init__()
        check_range("experts", experts, 1, 1024)
        check_range("top_k", top_k, 1, experts)
        check_range("prior_weight", prior_weight, 0, 1e6)
        self.intervals = partition(1, num_timesteps)
        self.num_timesteps = num_timesteps
        self.experts, self.top_k, self.prior_weight = experts, top_k, prior_weight
        self.network = DiT(shape, lambda shape: SwitchBlock(shape, experts, top_k))  # type: ignore[arg-type, return-value]
        self.in_step = False  # see `one_step`
        self.matching: Matching | None = None
        self.target: Tensor  # (T, L*M) bool
        target = target_slots(num_timesteps, shape.depth * experts, shape.depth * top_k)
        self.register_buffer("target", target, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        if self.prior_weight and switches.is_on("matching"):
            self.begin_matching(t.is_floating_point())  # before the network: the host solves it while the device computes
        output, probabilities = self.denoise_and_route(x, t, y)
        if self.prior_weight == 0:
            return Prediction(output, {})
        return Prediction(output, {"diffusion_prior": self.prior_weight * self.prior(probabilities, t)})

    @contextmanager
    def one_step(self, interval: Interval) -> Iterator[list[nn.Parameter]]:
        """The gates are those of the step's beginning, so one assignment serves all its passes."""
        self.in_step, self.matching = True, None
        try:
            with super().one_step(interval) as leaves:
                yield leaves
        finally:
            self.in_step, self.matching = False, None

    def denoise_and_route(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, C_out, H, W) and the gates' probabilities of all blocks (B, L, M)."""
        tokens, time, condition = self.network.embed(x, t, y)
        probabilities = []
        for block in self.network.blocks:
            tokens, of_block = block(tokens, condition, time)
            probabilities.append(of_block)
        return self.network.decode(tokens, condition), torch.stack(probabilities, dim=1)

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: self.denoise_and_route(x, t, y)[0]

    def prior(self, probabilities: Tensor, t: Tensor) -> Tensor:
        """The unweighted prior loss (scalar) of probabilities (B, L, M) at timesteps t (B,): the gradient flows through
        the probabilities only.
        """
        matched = self.matched_target(t.is_floating_point())  # (T, L*M)
        matched = matched[timestep_index(t, self.num_timesteps)]  # (B, L*M)
        target = matched / matched.sum(dim=-1, keepdim=True)
        return jensen_shannon(probabilities.flatten(1) / probabilities.shape[1], target)

    @torch.no_grad()
    def matched_target(self, continuous: bool = False) -> Tensor:
        """(T, L*M): the target map with its columns assigned to the slots whose present use is nearest in L1.

        In float32 under autocast too: bfloat16 does not hold counts up to T, nor near-ties between experts.
        """
        matching = self.matching or self.begin_matching(continuous)
        if not (self.in_step and switches.is_on("matching")):
            self.matching = None  # the gates may be others the next time
        return self.target.float()[:, matching.columns()]

    @torch.no_grad()
    def begin_matching(self, continuous: bool) -> "Matching":
        """Under way, unless it already is."""
        if self.matching is None:
            with without_autocast(self.target.device.type):
                chosen = self.all_chosen(continuous).flatten(1)
                self.matching = Matching(match_cost(chosen, self.target.float()))
        return self.matching

    @torch.no_grad()
    def all_probabilities(self, continuous: bool = False) -> Tensor:
        """(T, L, M): the gates at every timestep; with continuous time in (0, 1), at the middles of T equal cells."""
        index = torch.arange(self.num_timesteps, device=self.network.positions.device)
        time = self.network.time_embedding((index + 0.5) / self.num_timesteps if continuous else index)
        return torch.stack([block.gate(time)[0] for block in self.network.blocks], dim=1)

    @torch.no_grad()
    def all_chosen(self, continuous: bool = False) -> Tensor:
        """(T, L, M): 1 where an expert is among the top k of its block, else 0."""
        return self.network.blocks[0].gate.chosen(self.all_probabilities(continuous))

    @torch.no_grad()
    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """The dense blocks, with experts at zero: the outputs then equal the dense ones. Gates keep their values."""
        inner = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.block.", name): tensor for name, tensor in state.items()}
        own = {name: tensor for name, tensor in self.network.state_dict().items() if ".block." not in name and "blocks." in name}
        load_exactly(self.network, own | inner, "the dense state")
        for block in self.network.blocks:
            block.expert_weight.zero_()
            block.expert_bias.zero_()

    def units(self) -> list[nn.Module]:
        """Each gate on its own, too: the prior asks them at all timesteps, outside their blocks."""
        return [*(block.gate for block in self.network.blocks), *super().units()]

    def num_active_parameters(self) -> int:
        idle = (self.experts - self.top_k) / self.experts
        experts = sum(block.expert_weight.numel() + block.expert_bias.numel() for block in self.network.blocks)
        return super().num_active_parameters() - round(idle * experts)

    def diagnostics(self, probe: Probe | None = None) -> Diagnostics:
        continuous = probe is not None and probe.t.is_floating_point()
        chosen = self.all_chosen(continuous)
        gates = self.all_probabilities(continuous) * chosen
        return {
            "routing": (("block", "timestep", "expert"), gates.transpose(0, 1).cpu().numpy()),
            "expert_usage": (("block", "expert"), chosen.mean(dim=0).cpu().numpy() / self.top_k),
        }


def target_slots(num_timesteps: int, num_slots: int, num_active: int) -> Tensor:
    """(T, slots) bool: a DTR map (alpha = 4) over the expert slots, `num_active` of them at every timestep."""
    relative = torch.arange(num_timesteps, dtype=torch.float64) / max(num_timesteps - 1, 1)
    start = (relative**4 * (num_slots - num_active)).round()[:, None]
    slot = torch.arange(num_slots)
    return (slot >= start) & (slot < start + num_active)


def match_cost(chosen: Tensor, target: Tensor) -> Tensor:
    """(slots, slots): L1 distance over all timesteps between the columns of two 0/1 maps (T, slots)."""
    return chosen.sum(dim=0)[:, None] + target.sum(dim=0)[None, :] - 2 * chosen.T @ target


@torch.library.custom_op("timestep_bench::match_columns", mutates_args=(), tags=OUTSIDE_CUDA_GRAPHS)
def match_columns(cost: Tensor) -> Tensor:
    """cost (n, n) -> the column assigned to each row (n,) int64 at the least total cost."""
    columns = linear_sum_assignment(cost.double().cpu().numpy())[1]
    return torch.from_numpy(columns).to(cost.device)


@match_columns.register_fake
def _(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[0], dtype=torch.int64)


class Matching:
    """An assignment under way. On a GPU the costs travel to the host while the device goes on, and `columns` waits for
    no more than them: whoever asks after the network has been queued keeps the device busy.
    """

    def __init__(self, cost: Tensor) -> None:
        self.device, self.cost = cost.device, cost
        self.found: Tensor | None = None
        if cost.is_cuda:
            self.cost = torch.empty(cost.shape, dtype=cost.dtype, pin_memory=True).copy_(cost, non_blocking=True)
            self.arrived = torch.cuda.current_stream(cost.device).record_event()  # which need not be the current device

    def columns(self) -> Tensor:
        """Those of `match_columns`."""
        if self.found is None:
            if self.device.type == "cuda":
                self.arrived.synchronize()
                self.found = match_columns(self.cost).pin_memory().to(self.device, non_blocking=True)
            else:
                self.found = match_columns(self.cost)
        return self.found


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Mean over the batch of the Jensen-Shannon divergence (natural logarithms) between rows of p and q, (B, n)."""
    middle = ((p + q) / 2 + LOG_EPS).log()
    of_p = (p * ((p + LOG_EPS).log() - middle)).sum(dim=-1)
    of_q = (q * ((q + LOG_EPS).log() - middle)).sum(dim=-1)
    return (of_p / 2 + of_q / 2).mean()
