"""How is an image noised, what does the network learn from it, and how is the noise taken away again?

Discrete Gaussian diffusion and guidance: the only copy in the project (`bench.flow` has the continuous alternative,
`bench.noise_schedule` the noise levels). "eps" in comments is the noise, "abar" the running product of 1 - beta.

    DDPM, arXiv 2006.11239                `add_noise` (eq. 4), `posterior_mean` (eq. 7), `ancestral_step` (algorithm 2)
    improved DDPM, arXiv 2102.09672       learned variance (eq. 15), `hybrid_loss` (eq. 16)
    DDIM, arXiv 2010.02502                `ddim_step` (eq. 12 and 16)
    guidance, arXiv 2207.12598            `guide` (eq. 6, scale = w + 1)
    Min-SNR, arXiv 2303.09556             `min_snr_weight` (section 3.4, noise prediction)
    ANT-UW, arXiv 2306.00354              `UncertaintyWeights`, `clustered_timesteps`

Images are (B, C, H, W). The network's output holds the predicted noise in its first C channels and, if it has 2C, the
variance in the others. The predicted clean image is never clipped. What a training or sampling step calls never waits
for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.intervals import partition
from bench.method import Denoiser, check_choice, check_range
from bench.noise_schedule import Schedule as Schedule
from bench.noise_schedule import make_schedule as make_schedule
from bench.noise_schedule import respace as respace

VARIANCES = ("learned", "fixed_small", "fixed_large")


class LossTerms(NamedTuple):
    """Per-image training losses; their sum is the hybrid loss."""

    mse: Tensor  # (B,) mean squared error of the predicted noise
    vb: Tensor | None  # (B,) variational term, bits per dimension; None if the variance is not learned


class Posterior(NamedTuple):
    """What the network says about the next cleaner image: each (B, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor  # the predicted clean image


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t, the clean images x0 noised to level t (B,) with the given standard normal noise."""
    _check_index(t, x0)
    _check_same_shape("noise", noise, x0)
    return schedule.sqrt_alphas_cumprod[t] * x0 + schedule.sqrt_one_minus_alphas_cumprod[t] * noise


def hybrid_loss(
    schedule: Schedule, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, learn_sigma: bool
) -> LossTerms:
    """Squared error of the noise plus, with `learn_sigma`, the variational term, whose gradient reaches the variance only.

    output (B, 2C, H, W) with `learn_sigma`, else (B, C, H, W); the term of timestep t is not multiplied by T.
    """
    _check_index(t, x_t)
    _check_same_shape("x0", x0, x_t)
    _check_same_shape("noise", noise, x_t)
    predicted_noise, raw_variance = split_output(output, x_t)
    if learn_sigma != (raw_variance is not None):
        raise ValueError(
            f"learn_sigma is {learn_sigma}, but the network gives {output.shape[1]} channels for {x_t.shape[1]}: "
            "build the network with the same learn_sigma"
        )
    mse = _mean_per_image((noise - predicted_noise) ** 2)
    if raw_variance is None:
        return LossTerms(mse, None)
    predicted_x0 = x0_from_noise(schedule, predicted_noise.detach(), x_t, t)
    predicted_mean = posterior_mean(schedule, predicted_x0, x_t, t)
    log_variance = learned_log_variance(schedule, raw_variance, t)
    divergence = gaussian_kl(
        posterior_mean(schedule, x0, x_t, t), schedule.posterior_log_variance_clipped[t], predicted_mean, log_variance
    )
    decoder = -discretised_log_likelihood(x0, predicted_mean, 0.5 * log_variance)
    nats = torch.where(t == 0, _mean_per_image(decoder), _mean_per_image(divergence))
    return LossTerms(mse, nats / math.log(2))


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean1, .) from N(mean2, .), element by element, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2) - 1)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability (nats, element by element) of the 1/127.5 wide bin around x in [-1, 1] under a Gaussian.

    The bins at the ends are open. The normal distribution function is the tanh approximation that published models
    were trained with, not erf.
    """
    inverse_scale = torch.exp(-log_scale)
    below = _normal_cdf((x - mean + 1 / 255) * inverse_scale)
    above = 1 - _normal_cdf((x - mean - 1 / 255) * inverse_scale)
    inside = below - _normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))
    return probability.clamp(min=1e-12).log()


def snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar), (B,)."""
    return schedule.snr[t].flatten()


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """min(snr, gamma) / snr, (B,) in (0, 1]: for the squared error only, never for the variational term."""
    if not gamma > 0:
        raise ValueError(f"Min-SNR's gamma is {gamma}: choose a positive number, 5 in the paper")
    return (gamma / snr(schedule, t)).clamp(max=1)


class UncertaintyWeights(nn.Module):
    """One learned log-scale for each of `num_clusters` equal clusters of timesteps; the paper's rate for them is 0.025.

    The paper's sum over clusters of 0.5 * (exp(-s) * loss_c / num_clusters + s), loss_c the mean loss of a cluster with
    an equal share of the batch, is written as a mean over images: averaged over micro-batches or ranks that hold any
    part of the batch, it stays what it is on the whole.
    """

    def __init__(self, num_timesteps: int = 1000, num_clusters: int = 8) -> None:
        super().__init__()
        starts = [cluster.start for cluster in partition(num_clusters, num_timesteps)]
        self.log_scales = nn.Parameter(torch.zeros(num_clusters))
        self.register_buffer("later_starts", torch.tensor(starts[1:], dtype=torch.int64), persistent=False)
        self.later_starts: Tensor

    def forward(self, per_sample_loss: Tensor, t: Tensor) -> Tensor:
        """Losses (B,) with the variational term, at timesteps t (B,) -> a scalar to minimise."""
        if per_sample_loss.shape != t.shape or t.ndim != 1:
            raise ValueError(
                f"losses of shape {tuple(per_sample_loss.shape)} came with timesteps of shape {tuple(t.shape)}: "
                "give one of each per image"
            )
        log_scale = self.log_scales[torch.bucketize(t, self.later_starts, right=True)]  # (B,)
        return (0.5 * torch.exp(-log_scale) * per_sample_loss).mean() + 0.5 * self.log_scales.sum()


def clustered_timesteps(count: int, num_timesteps: int, generator: torch.Generator, clusters: int = 8) -> Tensor:
    """`count` timesteps (count,) int64 on the generator's device: an equal share uniform in each cluster, in order.

    Raises ValueError unless `clusters` divides `count`.
    """
    if count < 1 or clusters < 1 or count % clusters:
        raise ValueError(
            f"a batch of {count} cannot give {clusters} clusters of timesteps equal shares: choose a multiple of {clusters}"
        )
    share = (count // clusters,)
    draws = [
        torch.randint(start, stop, share, generator=generator, device=generator.device)
        for _, start, stop in partition(clusters, num_timesteps)
    ]
    return torch.cat(draws)


def predict_posterior(schedule: Schedule, output: Tensor, x: Tensor, index: Tensor, variance: str = "learned") -> Posterior:
    """Mean and variance of the next cleaner image, from the network's output at x, which is at level `index` (B,).

    variance: "learned" needs an output of 2C channels; "fixed_small" is the true posterior's variance and "fixed_large"
    is beta, and leave a learned variance unused.
    """
    check_choice("variance", variance, VARIANCES)
    _check_index(index, x)
    predicted_noise, raw_variance = split_output(output, x)
    x0 = x0_from_noise(schedule, predicted_noise, x, index)
    mean = posterior_mean(schedule, x0, x, index)
    if variance == "learned":
        if raw_variance is None:
            raise ValueError(
                f"the network gives {output.shape[1]} channels, none for the variance: sample with fixed_small or fixed_large, "
                "or train with learn_sigma"
            )
        log_variance = learned_log_variance(schedule, raw_variance, index)
        return Posterior(mean, log_variance.exp(), log_variance, x0)
    if variance == "fixed_small":
        fixed, log_fixed = schedule.posterior_variance, schedule.posterior_log_variance_clipped
    else:
        fixed, log_fixed = schedule.large_variance, schedule.large_log_variance
    return Posterior(mean, fixed[index].expand_as(x), log_fixed[index].expand_as(x), x0)


def ancestral_step(
    schedule: Schedule, output: Tensor, x: Tensor, index: Tensor, noise: Tensor, variance: str = "learned"
) -> Tensor:
    """The next cleaner image, drawn from the predicted posterior; level 0 gives its mean, whatever the noise."""
    _check_same_shape("noise", noise, x)
    posterior = predict_posterior(schedule, output, x, index, variance)
    not_last = (index > 0).view(-1, 1, 1, 1)
    return posterior.mean + torch.where(not_last, torch.exp(0.5 * posterior.log_variance) * noise, 0.0)


def ddim_step(schedule: Schedule, output: Tensor, x: Tensor, index: Tensor, noise: Tensor | None, eta: float = 0.0) -> Tensor:
    """The next cleaner image by DDIM; eta in [0, 1] goes from deterministic (noise may be None) to ancestral."""
    check_range("DDIM's eta", eta, 0, 1)
    _check_index(index, x)
    predicted_noise, _ = split_output(output, x)
    x0 = x0_from_noise(schedule, predicted_noise, x, index)
    # sigma of eq. 16 is eta times the true posterior's standard deviation, which is known in float64
    variance = eta**2 * schedule.posterior_variance[index]
    # never below 0: sigma^2 <= 1 - abar_prev in float64, and rounding each to float32 keeps that order
    direction = (schedule.one_minus_alphas_cumprod_prev[index] - variance).sqrt()
    sample = schedule.sqrt_alphas_cumprod_prev[index] * x0 + direction * predicted_noise
    if eta == 0:
        return sample
    if noise is None:
        raise ValueError(f"DDIM with eta {eta} adds noise and was given none: pass noise, or choose eta 0")
    _check_same_shape("noise", noise, x)
    return sample + variance.sqrt() * noise  # no noise at level 0, where the posterior variance is 0


def guide(denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int) -> Tensor:
    """The denoiser's output (2B, C_out, H, W), guided: x = [z; z], t = [t; t], y = [labels; no label].

    In both halves the first `channels` channels become `null + scale * (conditional - null)`; the others, the variance
    included, keep each half's own output. scale 1 is no guidance; how many channels are guided is the table's convention.
    """
    if len(x) % 2 or len(t) != len(x) or len(y) != len(x):
        raise ValueError(
            f"guidance was given {len(x)} images, {len(t)} timesteps and {len(y)} labels: stack the batch twice, "
            "first with its labels, then without"
        )
    output = denoiser(x, t, y)
    if not 1 <= channels <= output.shape[1]:
        raise ValueError(
            f"guidance of {channels} channels was asked for, and the network gives {output.shape[1]}: "
            f"choose from 1 to {output.shape[1]}"
        )
    conditional, null = output[:, :channels].chunk(2)
    guided = null + scale * (conditional - null)
    return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)


def split_output(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Predicted noise and raw variance (None if there is none), each float32 (B, C, H, W)."""
    B, C, H, W = x.shape
    if output.shape == (B, C, H, W):
        return output.float(), None
    if output.shape != (B, 2 * C, H, W):
        raise ValueError(
            f"the network's output has shape {tuple(output.shape)} for images of shape {tuple(x.shape)}: "
            f"it must have {C} channels (noise) or {2 * C} (noise and variance) and the same size"
        )
    noise, variance = output.float().chunk(2, dim=1)
    return noise, variance


def x0_from_noise(schedule: Schedule, predicted_noise: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The clean image that, noised with the predicted noise, gives x; not clipped."""
    return schedule.sqrt_recip_alphas_cumprod[index] * x - schedule.sqrt_recipm1_alphas_cumprod[index] * predicted_noise


def posterior_mean(schedule: Schedule, x0: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Mean of the next cleaner image, given x at level `index` and the clean image."""
    return schedule.posterior_mean_coef1[index] * x0 + schedule.posterior_mean_coef2[index] * x


def learned_log_variance(schedule: Schedule, raw_variance: Tensor, index: Tensor) -> Tensor:
    """Log-variance between the true posterior's (raw -1) and beta (raw 1)."""
    share = (raw_variance + 1) / 2
    return share * schedule.log_betas[index] + (1 - share) * schedule.posterior_log_variance_clipped[index]


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _mean_per_image(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def _check_index(index: Tensor, x: Tensor) -> None:
    if x.ndim != 4 or index.shape != (len(x),) or index.dtype != torch.int64:
        raise ValueError(
            f"timesteps of shape {tuple(index.shape)} and type {index.dtype} came with images of shape {tuple(x.shape)}: "
            "give one int64 index for each image (B, C, H, W)"
        )


def _check_same_shape(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and the images {tuple(x.shape)}: give them the same shape")
