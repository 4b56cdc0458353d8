"""How is a network trained and sampled by rectified flow?

The straight path from image to noise, z_t = (1 - t) x0 + t noise with t in (0, 1); the network predicts its velocity,
noise - x0, in its first C output channels and is given t as it is.

    rectified flow, arXiv 2209.03003           `flow_noise`, `flow_loss` (eq. 1), `euler_step` (section 2.1)
    logit-normal t, arXiv 2403.03206           `flow_times` (section 3.1)
    in a diffusion transformer, 2407.11633     unscaled t, only the first C channels

Deviations: t is kept off 0 and 1 themselves, which the draws reach with a probability of about 1e-7.
"""

import torch
from torch import Tensor

from bench.method import check_choice

FLOW_TIMES = ("logit_normal", "uniform", "stratified")


def flow_times(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` times (B,) float32 in (0, 1), on the generator's device. Draw them for the global batch, before the noise.

    kind: "logit_normal", sigmoid(N(0, 1)); "uniform"; "stratified", logit-normal with one draw in each of `count`
    equally likely strata, ascending. Raises ValueError for another kind.
    """
    check_choice("kind of flow times", kind, FLOW_TIMES)
    draw = torch.randn if kind == "logit_normal" else torch.rand
    return times_from_draws(kind, draw(count, generator=generator, device=generator.device))


def times_from_draws(kind: str, draws: Tensor) -> Tensor:
    """Times (B,) float32 in (0, 1) from standard normal draws ("logit_normal") or uniform ones in [0, 1) (otherwise)."""
    if kind == "logit_normal":
        times = torch.sigmoid(draws)
    elif kind == "uniform":
        times = draws
    else:
        stratum = torch.arange(len(draws), dtype=torch.float32, device=draws.device)
        times = torch.sigmoid(torch.special.ndtri((stratum + draws) / len(draws)))
    edge = torch.finfo(torch.float32).eps
    return times.clamp(edge, 1 - edge)


def flow_noise(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """z_t: clean images (B, C, H, W) at times t (B,) on their straight way to the noise (same shape)."""
    _check(x0, t)
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)} and the images {tuple(x0.shape)}: give them the same shape")
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


def flow_loss(output: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error (B,) of the predicted velocity; output (B, >= C, H, W)."""
    return ((noise - x0 - _velocity(output, x0)) ** 2).flatten(1).mean(dim=1)


def flow_times_to_sample(num_steps: int) -> Tensor:
    """The times (num_steps,) float32 at which Euler steps of 1/num_steps begin: 1 down to 1/num_steps."""
    if num_steps < 1:
        raise ValueError(f"{num_steps} Euler steps were asked for: choose at least 1")
    return torch.arange(num_steps, 0, -1, dtype=torch.float32) / num_steps


def euler_step(output: Tensor, x: Tensor, t: Tensor, dt: float) -> Tensor:
    """x (B, C, H, W), moved from time t (B,) to t - dt along the velocity predicted at t, and never past time 0."""
    _check(x, t)
    return x - t.clamp(max=dt).view(-1, 1, 1, 1) * _velocity(output, x)


def _velocity(output: Tensor, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    if output.ndim != 4 or output.shape[1] < C or (output.shape[0], *output.shape[2:]) != (B, H, W):
        raise ValueError(
            f"the network's output has shape {tuple(output.shape)} for images of shape {tuple(x.shape)}: "
            f"it must have at least {C} channels and the same size"
        )
    return output[:, :C].float()


def _check(x: Tensor, t: Tensor) -> None:
    if x.ndim != 4 or t.shape != (len(x),) or not t.is_floating_point():
        raise ValueError(
            f"times of shape {tuple(t.shape)} and type {t.dtype} came with images of shape {tuple(x.shape)}: "
            "give one float in (0, 1) for each image (B, C, H, W)"
        )
