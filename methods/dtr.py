"""DTR: Denoising Task Routing. A window of active channels slides with the timestep.

Paper: Park et al., Denoising Task Routing for Diffusion Models, arXiv 2310.07138.

    section 4.1, masked residual block         `MaskedBlock`
    section 4.2, window w = beta*D, start
      s_t = (t/(T-1))^alpha * (D - w)          `sliding_masks`
    section 5, random routing (R-TR)           `random_masks`

The mask is the same for all blocks. It zeroes the block's input channels; the whole residual block runs on them and
writes all channels, and the masked-out part of the input is carried around it. No parameters are added and no FLOPs
are saved: the LayerNorms run over all channels, zeros included.

Deviations: the window has a fixed width, as in the released code (the paper's text widens it slightly at large t).
Random routing draws one subset per timestep and block, as the released code does, but from a seed (`routing_seed`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

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
from methods.backbone import Block, DiT, Shape


class MaskedBlock(Block):
    """A backbone block that sees the active channels alone. The mask is applied inside, so that it is compiled with the block."""

    def forward(self, tokens: Tensor, condition: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """tokens (B, N, D), condition (B, D), mask (B, 1, D) of ones and zeros -> (B, N, D)."""
        return super().forward(mask * tokens, condition) + (1 - mask) * tokens


class DTR(Method):
    """The backbone with masked block inputs. beta in (0, 1]: the active part of the channels; beta = 1 is dense."""

    def __init__(
        self,
        shape: Shape,
        *,
        num_timesteps: int = 1000,
        alpha: float = 4.0,
        beta: float = 0.8,
        routing: str = "sliding",
        routing_seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("routing", routing, ("sliding", "random"))
        check_range("beta", beta, 1 / shape.width, 1)
        check_range("alpha", alpha, 0, 100)
        self.intervals = partition(1, num_timesteps)
        self.num_timesteps = num_timesteps
        self.network = DiT(shape, MaskedBlock)
        if routing == "sliding":
            masks = sliding_masks(num_timesteps, shape.width, alpha, beta).unsqueeze(0)
        else:
            masks = random_masks(shape.depth, num_timesteps, shape.width, beta, routing_seed)
        self.alpha, self.beta, self.routing = alpha, beta, routing
        self.masks: Tensor
        self.register_buffer("masks", masks)  # (1 or L, T, D) bool

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        return Prediction(self.denoise(x, t, y), {})

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, _, condition = self.network.embed(x, t, y)
        masks = self.masks[:, timestep_index(t, self.num_timesteps)].unsqueeze(2).to(tokens.dtype)  # (1 or L, B, 1, D)
        for index, block in enumerate(self.network.blocks):
            tokens = block(tokens, condition, masks[index if len(masks) > 1 else 0])
        return self.network.decode(tokens, condition)

    def specialise(self, interval: Interval) -> Denoiser:
        return self.denoise

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """The backbone's weights as they are; the outputs differ from the dense ones by the masks, unless beta is 1."""
        load_exactly(self.network, state, "the dense state")

    def diagnostics(self, probe: Probe | None = None) -> Diagnostics:
        axes = ("timestep", "channel") if self.routing == "sliding" else ("block", "timestep", "channel")
        masks = self.masks[0] if self.routing == "sliding" else self.masks
        return {"channel_mask": (axes, masks.cpu().numpy())}


def sliding_masks(num_timesteps: int, width: int, alpha: float, beta: float) -> Tensor:
    """(T, D) bool: `int(beta*D)` active channels from `round((t/(T-1))^alpha * (D - w))` on."""
    active = int(beta * width)
    relative = torch.arange(num_timesteps, dtype=torch.float64) / max(num_timesteps - 1, 1)
    start = (relative**alpha * (width - active)).round()[:, None]
    channel = torch.arange(width)
    return (channel >= start) & (channel < start + active)


def random_masks(depth: int, num_timesteps: int, width: int, beta: float, seed: int) -> Tensor:
    """(L, T, D) bool: for every block and timestep an independent random subset of `int(beta*D)` channels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(depth, num_timesteps, width, generator=generator, device="cpu").argsort(dim=-1)
    return (order < int(beta * width)).to(torch.get_default_device())
