"""What is each method in plain code, to measure and to test ours against?

Nothing here is fast and nothing is clever: attention is softmax(QK^T)V, experts run one after the other behind boolean
masks, and bases are mixed by multiplying each with its coefficient and summing the copies. Each class takes from its
method what holds the weights, the options and the intervals, so weights load from one into the other, and computes
everything else itself. The plain optimiser and average are in `methods.naive_updates`. No run can choose any of it:
`METHODS` does not hold them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bench.intervals import Interval
from bench.method import Denoiser, Method, Prediction, timestep_index
from methods.backbone import DiT, Linear
from methods.dense import Dense
from methods.dit_moe import DiTMoE
from methods.dtr import DTR
from methods.multi_expert import MultiExpert
from methods.remix_dit import RemixDiT
from methods.switch_dit import LOG_EPS, SwitchDiT

Run = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]
"""`(index, block, tokens (B, N, D), condition (B, D), time (B, D)) -> (B, N, D)`"""

# The backbone


def run_network(dit: DiT, x: Tensor, t: Tensor, y: Tensor, run: Run) -> Tensor:
    tokens, time, condition = dit.embed(x, t, y)
    for index, block in enumerate(dit.blocks):
        tokens = run(index, block, tokens, condition, time)
    return dit.decode(tokens, condition)


def run_dense(dit: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return run_network(dit, x, t, y, lambda index, block, tokens, condition, time: dense_block(block, tokens, condition))


def dense_block(block: Any, tokens: Tensor, condition: Tensor) -> Tensor:
    def mlp(x: Tensor) -> Tensor:
        return block.mlp.fc2(F.gelu(block.mlp.fc1(x), approximate="tanh"))

    return adaln(block, tokens, condition, lambda x: attention(x, block.attn.qkv, block.attn.proj, block.attn.num_heads), mlp)


def adaln(block: Any, tokens: Tensor, condition: Tensor, attend: Linear, mlp: Linear) -> Tensor:
    """The adaLN-Zero block with these two branches."""
    modulation = block.modulation(F.silu(condition)).unsqueeze(1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
    tokens = tokens + gate_a * attend(block.norm1(tokens) * (1 + scale_a) + shift_a)
    return tokens + gate_m * mlp(block.norm2(tokens) * (1 + scale_m) + shift_m)


def attention(x: Tensor, qkv: Linear, proj: Linear, num_heads: int) -> Tensor:
    """softmax(QK^T / sqrt(d)) V, with all weights (B, heads, N, N) in memory."""
    B, N, D = x.shape
    q, k, v = qkv(x).reshape(B, N, 3, num_heads, D // num_heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(D // num_heads)).softmax(dim=-1)
    return proj((weights @ v).transpose(1, 2).reshape(B, N, D))


# The methods


class Naive(Method):
    """Shares nothing between the passes of a step."""

    one_step = Method.one_step


class NaiveDense(Naive, Dense):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        return Prediction(run_dense(self.network, x, t, y), {})

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: run_dense(self.network, x, t, y)


class NaiveMultiExpert(Naive, MultiExpert):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        return Prediction(self.specialise(interval)(x, t, y), {})

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: run_dense(self.networks[interval.index], x, t, y)  # type: ignore[arg-type]


class NaiveDTR(Naive, DTR):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        return Prediction(self.specialise(interval)(x, t, y), {})

    def specialise(self, interval: Interval) -> Denoiser:
        def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            masks = self.pass_masks(t)

            def run(index: int, block: Any, tokens: Tensor, condition: Tensor, time: Tensor) -> Tensor:
                mask = masks[index if len(masks) > 1 else 0].to(tokens.dtype)
                return dense_block(block, tokens * mask, condition) + tokens * (1 - mask)

            return run_network(self.network, x, t, y, run)

        return denoise

    def pass_masks(self, t: Tensor) -> Tensor:
        """(1 or L, B, 1, D): a window for each sample, the same in all blocks; of random routing, the subsets that were drawn for
        its timestep.
        """
        timestep = timestep_index(t, self.num_timesteps)
        if self.routing == "random":
            return self.masks[:, timestep].unsqueeze(2)
        width = self.network.shape.width
        active = int(self.beta * width)
        relative = timestep.double() / max(self.num_timesteps - 1, 1)
        start = (relative**self.alpha * (width - active)).round().view(-1, 1, 1)
        channel = torch.arange(width, device=t.device)
        return ((channel >= start) & (channel < start + active)).unsqueeze(0)


class NaiveSwitchDiT(Naive, SwitchDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        output = self.specialise(interval)(x, t, y)
        return Prediction(output, {"diffusion_prior": self.prior_weight * self.prior_loss(t)} if self.prior_weight else {})

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: run_network(self.network, x, t, y, self.run_block)

    def run_block(self, index: int, block: Any, tokens: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Expert after expert, each on the samples that chose it; then the block behind the mask."""
        probabilities = self.probabilities(block, time)
        chosen = self.choose(probabilities)
        mask = torch.ones_like(tokens)
        for expert in range(self.experts):
            samples = chosen[:, expert]
            gate = probabilities[samples, expert].view(-1, 1, 1).to(tokens.dtype)
            output = tokens[samples] @ block.expert_weight[expert] + block.expert_bias[expert]
            mask[samples] += (gate * output).to(tokens.dtype)
        return dense_block(block.block, mask * tokens, condition) + (1 - mask) * tokens

    def probabilities(self, block: Any, time: Tensor) -> Tensor:
        return block.gate.linear(F.silu(time)).float().softmax(dim=-1)  # (B, M)

    def choose(self, probabilities: Tensor) -> Tensor:
        """(B, M) bool: the k largest."""
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        return chosen.scatter(-1, probabilities.topk(self.top_k, dim=-1).indices, True)

    def prior_loss(self, t: Tensor) -> Tensor:
        """Jensen-Shannon divergence between the gates of all blocks and the target map."""
        time = self.network.time_embedding(t)
        p = torch.cat([self.probabilities(block, time) for block in self.network.blocks], dim=1) / len(self.network.blocks)
        target = self.assigned_target(t.is_floating_point())[timestep_index(t, self.num_timesteps)]
        q = target / target.sum(dim=-1, keepdim=True)
        middle = ((p + q) / 2 + LOG_EPS).log()
        divergence = p * ((p + LOG_EPS).log() - middle) + q * ((q + LOG_EPS).log() - middle)
        return divergence.sum(dim=-1).mean() / 2

    @torch.no_grad()
    def assigned_target(self, continuous: bool) -> Tensor:
        """(T, L*M): the target's columns, each at the slot whose use over all timesteps is nearest to it in L1."""
        index = torch.arange(self.num_timesteps, device=self.target.device)
        with torch.autocast(self.target.device.type, enabled=False):
            time = self.network.time_embedding((index + 0.5) / self.num_timesteps if continuous else index)
            used = torch.cat([self.choose(self.probabilities(block, time)) for block in self.network.blocks], dim=1)
        cost = torch.stack([(slot.unsqueeze(1) != self.target).sum(dim=0) for slot in used.T])  # (slots, slots)
        columns = linear_sum_assignment(cost.cpu().numpy())[1]
        return self.target[:, torch.from_numpy(columns).to(self.target.device)].float()


class NaiveDiTMoE(Naive, DiTMoE):
    """The balance loss is that of this process's batch, whatever `balance_scope`."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        output, balance = self.denoise_and_balance(x, t, y)
        return Prediction(output, {"balance": self.balance_weight * balance} if self.balance_weight else {})

    def specialise(self, interval: Interval) -> Denoiser:
        return lambda x, t, y: self.denoise_and_balance(x, t, y)[0]

    def denoise_and_balance(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        balances = []

        def run(index: int, block: Any, tokens: Tensor, condition: Tensor, time: Tensor) -> Tensor:
            def mlp(x: Tensor) -> Tensor:
                output, balance = mixture(block.mlp, x)
                balances.append(balance)
                return output

            own = block.attn
            return adaln(block, tokens, condition, lambda x: attention(x, own.qkv, own.proj, own.num_heads), mlp)

        return run_network(self.network, x, t, y, run), torch.stack(balances).sum()


def mixture(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture's output (B, N, D), expert after expert behind boolean masks, and its balance loss (scalar)."""
    rows = tokens.reshape(-1, tokens.shape[-1])  # (n, D)
    with torch.autocast(rows.device.type, enabled=False):
        probabilities = (rows.float() @ layer.router.weight.float().T).softmax(dim=-1)
    gates, chosen = probabilities.topk(layer.router.top_k, dim=-1)  # (n, k)
    if layer.router.renormalise:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    output, balance = torch.zeros_like(rows), torch.zeros_like(probabilities[0, 0])
    num_experts = len(layer.weight_in)
    for expert in range(num_experts):
        is_chosen = chosen == expert  # (n, k) bool, at most one in a row
        mine = is_chosen.any(dim=-1)
        gate = (gates * is_chosen).sum(dim=-1)[mine].unsqueeze(-1).to(rows.dtype)
        output[mine] += (gate * expert_mlp(layer, expert, rows[mine])).to(rows.dtype)
        balance = balance + num_experts * is_chosen.sum() / chosen.numel() * probabilities[:, expert].mean()
    output = output.view(tokens.shape)
    if layer.shared is not None:
        gate, up = layer.shared.gate_up(tokens).chunk(2, dim=-1)
        output = output + layer.shared.down(F.silu(gate) * up)
    return output, balance


def expert_mlp(layer: Any, expert: int, rows: Tensor) -> Tensor:
    """One expert on rows (m, D)."""
    weight_in, weight_out = layer.weight_in[expert], layer.weight_out[expert]
    if layer.gated:
        gate, up = F.linear(rows, weight_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weight_out)
    hidden = F.gelu(F.linear(rows, weight_in, layer.bias_in[expert]), approximate="tanh")
    return F.linear(hidden, weight_out, layer.bias_out[expert])


class NaiveRemixDiT(Naive, RemixDiT):
    """Mixes at every evaluation, in sampling too."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        output = self.specialise(interval)(x, t, y)
        if self.mixer != "softmax" or self.prior_weight == 0:
            return Prediction(output, {})
        logits = self.logits if self.logits.dim() == 2 else self.logits.transpose(1, 2)  # (E, K) or (E, K, L)
        prior = self.prior_basis if self.logits.dim() == 2 else self.prior_basis[:, None].expand(-1, logits.shape[-1])
        return Prediction(output, {"mixing_prior": self.annealed_prior_weight(progress) * F.cross_entropy(logits, prior)})

    def specialise(self, interval: Interval) -> Denoiser:
        def run(index: int, block: Any, tokens: Tensor, condition: Tensor, time: Tensor) -> Tensor:
            mixing = self.block_coefficients(interval)[index]
            qkv, proj, fc1, fc2 = (
                mixed_linear(part, mixing) for part in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            )
            return adaln(
                block,
                tokens,
                condition,
                lambda x: attention(x, qkv, proj, block.attn.num_heads),
                lambda x: fc2(F.gelu(fc1(x), approximate="tanh")),
            )

        return lambda x, t, y: run_network(self.network, x, t, y, run)


def mixed_linear(bases: Any, mixing: Tensor) -> Linear:
    weight, bias = mix(bases.weight, mixing), mix(bases.bias, mixing)
    return lambda x: F.linear(x, weight, bias)


def mix(stacked: Tensor, mixing: Tensor) -> Tensor:
    """(K, ...) and (K,) -> (...): all K weighted copies are made, then summed."""
    return (stacked * mixing.view(-1, *[1] * (stacked.dim() - 1))).sum(dim=0)


NAIVE: dict[str, type[Method]] = {
    "dense": NaiveDense,
    "multi_expert": NaiveMultiExpert,
    "dtr": NaiveDTR,
    "switch_dit": NaiveSwitchDiT,
    "dit_moe": NaiveDiTMoE,
    "remix_dit": NaiveRemixDiT,
}


def make_plain(method: Method) -> Method:
    """The same method, weights and options included, that computes in plain code from now on."""
    method.__class__ = next(plain for plain in NAIVE.values() if issubclass(plain, type(method)))
    return method
