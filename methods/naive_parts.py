"""Which parts of the methods are timed alone, ours beside the plain code, on the same weights and inputs?

For `tsbench throughput --parts`.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.adamw import AdamW
from bench.ema import EMA
from bench.method import Outer, offered
from bench.throughput.clock import Call, Part
from methods.backbone import SIZES, DiT, Shape
from methods.bases import Bases
from methods.dit_moe import MixtureMLP
from methods.naive import mix, mixture
from methods.naive_updates import LoopedAdamW, LoopedEMA
from methods.remix_dit import RemixDiT

NUM_BASES = 4
HALF_LIFE_IMAGES = 500_000


def mixing_forward(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """All weights of one expert from K bases, as a training step mixes them; the batch size does not matter."""
    method = remix(size, device)
    mixing = torch.randn(NUM_BASES, device=device).softmax(dim=-1)
    return (
        torch.no_grad()(lambda: [linear.mix_for_step(mixing) for linear in bases_of(method)]),
        torch.no_grad()(lambda: mixed_plainly(method, [mixing] * len(method.network.blocks))),
    )


def mixing_forward_and_backward(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """Mixing, and from the gradients of the mixed weights those of bases and coefficients, as AdamW takes them: what that makes
    of ours is in the next part.
    """
    return _mixing(size, device, lambda optimizer: None)


def mixing_and_adamw(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """The same and the step of the bases, by the fused kernel on both sides."""
    return _mixing(size, device, lambda optimizer: optimizer.step())


def _mixing(size: str, device: torch.device, use: Callable[[torch.optim.Optimizer], object]) -> tuple[Call, Call]:
    method = remix(size, device)
    interval = method.intervals[0]
    upstream = [torch.randn_like(tensor) for tensor in mixed_plainly(method, method.block_coefficients(interval))]
    own = {id(parameter) for parameter in method.parameters()}
    outer: dict[nn.Parameter, Outer] = {}
    stacked = [parameter for linear in bases_of(method) for parameter in linear.parameters()]
    optimizer = AdamW([*stacked, method.logits], outer, lr=1e-4, fused=True)

    def ours() -> None:
        optimizer.zero_grad()
        with offered(method, outer), method.one_step(interval) as leaves:
            for mixed, gradient in zip([leaf for leaf in leaves if id(leaf) not in own], upstream, strict=True):
                mixed.grad = gradient
        use(optimizer)

    def plain() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(mixed_plainly(method, method.block_coefficients(interval)), upstream)
        use(optimizer)

    return ours, plain


def remix(size: str, device: torch.device) -> RemixDiT:
    with device:
        return RemixDiT(shape_of(size), bases=NUM_BASES)


def bases_of(method: RemixDiT) -> list[Bases]:
    return [linear for block in method.network.blocks for linear in block.bases().values()]


def mixed_plainly(method: RemixDiT, coefficients: Iterable[Tensor]) -> list[Tensor]:
    """All mixed weights and biases, given the mixing (K,) of each block."""
    blocks = zip(method.network.blocks, coefficients, strict=True)
    return [mix(s, mixing) for block, mixing in blocks for linear in block.bases().values() for s in (linear.weight, linear.bias)]


def mixture_layer(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """One layer of 8 experts, 2 for each token, forward and backward."""
    return mixtures(shape_of(size), 8, 2, batch_size, device)


def mixture_layer_of_small_experts(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """One layer of 32 experts of a quarter of the width, 8 for each token: the same arithmetic."""
    shape = shape_of(size)
    return mixtures(replace(shape, mlp_ratio=shape.mlp_ratio / 4), 32, 8, batch_size, device)


def mixtures(shape: Shape, experts: int, top_k: int, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    with device:
        layer = MixtureMLP(shape, experts, top_k, 0.0, "swiglu", False)
        layer.initialise()
    tokens = torch.randn(batch_size, shape.num_tokens, shape.width, device=device, requires_grad=True)
    upstream = torch.randn_like(tokens)
    learned = [tokens, *layer.parameters()]

    def ours() -> object:
        output = layer(tokens)[0]
        return torch.autograd.grad(output, learned, upstream.to(output.dtype))

    def plain() -> object:
        output = mixture(layer, tokens)[0]
        return torch.autograd.grad(output, learned, upstream.to(output.dtype))

    return ours, plain


def optimiser_and_average(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
    """AdamW and the average over all parameters of a dense network; the batch size counts in the average alone."""
    with device:
        network: nn.Module = DiT(shape_of(size))
    twin = copy.deepcopy(network)
    for module in (network, twin):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
    ours = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    plain = LoopedAdamW(twin.parameters(), 1e-4, (0.9, 0.999), 0.0)
    average, looped = EMA(network, HALF_LIFE_IMAGES, 0.05), LoopedEMA(twin, HALF_LIFE_IMAGES, 0.05)

    def update(optimizer: torch.optim.Optimizer, ema: EMA) -> Call:
        def run() -> None:
            optimizer.step()
            ema.update(batch_size)

        return run

    return update(ours, average), update(plain, looped)


def shape_of(size: str) -> Shape:
    """`XL/2`, or `DEPTHxWIDTHxHEADS/PATCH`."""
    dimensions, _, patch = size.partition("/")
    if dimensions in SIZES:
        return Shape.of_size(size)
    depth, width, num_heads = (int(value) for value in dimensions.split("x"))
    return Shape(depth, width, num_heads, int(patch))


PARTS: dict[str, Part] = {
    "mixing, forward": mixing_forward,
    "mixing, forward and backward": mixing_forward_and_backward,
    "mixing and AdamW": mixing_and_adamw,
    "mixture of 8 experts": mixture_layer,
    "mixture of 32 small experts": mixture_layer_of_small_experts,
    "optimiser and average": optimiser_and_average,
}
