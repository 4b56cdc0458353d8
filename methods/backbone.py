"""The DiT backbone that every method is built from.

Paper: Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748.

    section 3.2, patchify                  PatchEmbed (timm), `sincos_positions`
    section 3.2, conditioning              `TimestepEmbedding`, `LabelEmbedding`
    section 3.2, adaLN-Zero block          `Block`
    section 3.2, transformer decoder       `FinalLayer`, `DiT.unpatchify`

Deviations: none from the released code. Label dropout is drawn by the trainer (a dropped label is the null class
`num_classes`), so that the network itself has no randomness.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from bench import switches

SIZES = {  # letter: (depth, width, heads); section 3.3 and, for G, arXiv 2407.11633
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}

Linear = Callable[[Tensor], Tensor]
HAS_AMX = torch.cpu.get_capabilities().get("amx_tile", False)  # matrix products of a CPU in bfloat16
PIECE_BYTES = 24 << 20  # of a CPU: glibc hands blocks of 32 MiB and more back at once, and every new one faults in page by page


@dataclass(frozen=True)
class Shape:
    """The dimensions of a backbone. `input_size` is the height and width of what is denoised, in pixels or latents."""

    depth: int = 12
    width: int = 384
    num_heads: int = 6
    patch_size: int = 2
    input_size: int = 32
    channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads", "patch_size", "input_size", "channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be divided into {self.num_heads} heads: choose a multiple of {self.num_heads}"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the sine and cosine positions need")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input size {self.input_size} cannot be cut into patches of {self.patch_size}: "
                f"choose a patch size that divides {self.input_size}"
            )

    @property
    def out_channels(self) -> int:
        return 2 * self.channels if self.learn_sigma else self.channels

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @classmethod
    def of_size(cls, size: str, **dimensions: object) -> "Shape":
        """`"XL/2"` -> the paper's XL with patch size 2; other fields by keyword."""
        letter, _, patch = size.partition("/")
        if letter not in SIZES or not patch.isdigit():
            raise ValueError(f"size {size!r} is not known: give one of {', '.join(SIZES)}, a slash and a patch size")
        depth, width, num_heads = SIZES[letter]
        named = {"depth": depth, "width": width, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**(named | dimensions))  # type: ignore[arg-type]


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D positions (1, grid*grid, width): half the channels for the column, half for the row."""
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (D/4,)
    index = torch.arange(grid, dtype=torch.float64)
    angle = index[:, None] * frequency  # (grid, D/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D/2)
    column = one_axis.repeat(grid, 1)
    row = one_axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float().unsqueeze(0)


class TimestepEmbedding(nn.Module):
    """t (B,) -> (B, D): 256 sinusoids (cosines first), then two linears. t is an index or, continuous, in [0, 1]."""

    num_frequencies = 128
    frequencies: Tensor  # (128,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * self.num_frequencies, width)
        self.fc2 = nn.Linear(width, width)
        exponent = torch.arange(self.num_frequencies, dtype=torch.float32) / self.num_frequencies
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * exponent), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.frequencies  # (B, 128)
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], dim=-1))))


class Attention(nn.Module):
    """Multi-head self-attention. The linears are passed in, so that a method can supply its own weights."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv, self.proj, self.num_heads)


def attend(x: Tensor, qkv: Linear, proj: Linear, num_heads: int) -> Tensor:
    """Self-attention over tokens (B, N, D) with the given linears; no mask, no dropout, no qk-norm."""
    B, N, D = x.shape
    q, k, v = qkv(x).reshape(B, N, 3, num_heads, D // num_heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
    return proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each (B, heads, N, D/heads), and so is what comes out."""
    if not switches.is_on("attention"):
        return weigh(q, k, v)
    # of a CPU's fused kernel in bfloat16 the backward pass is slow, and the forward pass too without AMX
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and (torch.is_grad_enabled() or not HAS_AMX):
        num_images = max(1, PIECE_BYTES // (q.shape[1] * q.shape[2] ** 2 * q.element_size()))  # by its weights, (heads, N, N)
        return torch.cat([weigh(*part) for part in zip(*(x.split(num_images) for x in (q, k, v)), strict=True)])
    return F.scaled_dot_product_attention(q, k, v)


def weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values, weighed by the softmax of the scaled products: attention in plain code."""
    return (q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class MLP(nn.Module):
    """D -> mlp_width -> D with a GELU (tanh)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """adaLN-Zero transformer block: tokens (B, N, D), condition (B, D) -> (B, N, D)."""

    attn: Any  # modules whose classes a method may choose
    mlp: Any

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, elementwise_affine=False, eps=1e-6)
        self.attn = self.make_attention(shape)
        self.norm2 = nn.LayerNorm(shape.width, elementwise_affine=False, eps=1e-6)
        self.mlp = self.make_mlp(shape)
        self.modulation = nn.Linear(shape.width, 6 * shape.width)

    def make_attention(self, shape: Shape) -> nn.Module:
        return Attention(shape.width, shape.num_heads)

    def make_mlp(self, shape: Shape) -> nn.Module:
        return MLP(shape.width, shape.mlp_width)

    def initialise(self) -> None:
        """Xavier-uniform linears with zero bias; the modulation starts at zero, so the block is the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module.weight, module.bias)
        init_zero(self.modulation)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.apply_branches(tokens, condition, self.attn, self.mlp)

    def apply_branches(self, tokens: Tensor, condition: Tensor, attention: Linear, mlp: Linear) -> Tensor:
        """The block's computation with the given branches, each (B, N, D) -> (B, N, D)."""
        modulation = self.modulation(F.silu(condition)).unsqueeze(1)  # (B, 1, 6D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        tokens = tokens + gate_a * attention(modulate(self.norm1(tokens), shift_a, scale_a))
        return tokens + gate_m * mlp(modulate(self.norm2(tokens), shift_m, scale_m))


class FinalLayer(nn.Module):
    """tokens (B, N, D), condition (B, D) -> (B, N, p*p*C_out)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(shape.width, shape.patch_size**2 * shape.out_channels)
        self.modulation = nn.Linear(shape.width, 2 * shape.width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(tokens), shift, scale))


def init_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Xavier-uniform, zero bias. Give the slices of a stacked weight one by one: the fan is that of one linear."""
    nn.init.xavier_uniform_(weight)
    if bias is not None:
        nn.init.zeros_(bias)


def init_zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class DiT(nn.Module):
    """The dense network: x (B, C, H, W), t (B,), y (B,) -> (B, C_out, H, W). `block` is the class of its blocks."""

    positions: Tensor  # (1, N, D)
    blocks: Any  # nn.ModuleList of that class

    def __init__(self, shape: Shape, block: Callable[[Shape], Block] = Block) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embedding = PatchEmbed(shape.input_size, shape.patch_size, shape.channels, shape.width)
        self.register_buffer("positions", sincos_positions(shape.width, shape.input_size // shape.patch_size))
        self.time_embedding = TimestepEmbedding(shape.width)
        self.label_embedding = nn.Embedding(shape.num_classes + 1, shape.width)  # the last row: no label
        self.blocks = nn.ModuleList([block(shape) for _ in range(shape.depth)])
        self.final = FinalLayer(shape)
        self.initialise()

    def initialise(self) -> None:
        init_linear(self.patch_embedding.proj.weight.view(self.shape.width, -1), self.patch_embedding.proj.bias)
        for linear in (self.time_embedding.fc1, self.time_embedding.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        for block in self.blocks:
            block.initialise()
        init_zero(self.final.linear)
        init_zero(self.final.modulation)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D), the timestep's embedding (B, D) and the condition (B, D), its sum with the label's."""
        tokens = (self.patch_embedding(x) + self.positions).contiguous()  # channels last, else every block's norms copy them
        time = self.time_embedding(t)
        return tokens, time, time + self.label_embedding(y)

    def decode(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, C_out, H, W)."""
        return self.unpatchify(self.final(tokens, condition))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, p*p*C_out) -> (B, C_out, H, W): token (h, w) holds (p, q, C_out), pixel (h*p + a, w*p + b)."""
        p, grid, C = self.shape.patch_size, self.shape.input_size // self.shape.patch_size, self.shape.out_channels
        x = tokens.reshape(-1, grid, grid, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, grid * p, grid * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, _, condition = self.embed(x, t, y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.decode(tokens, condition)
