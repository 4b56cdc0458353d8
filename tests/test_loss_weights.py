"""Do weighted losses agree with the released ones, and does what is learned settle where it must?"""

import math

import helpers
import pytest
import torch
from diffusing import close, fake_network
from torch import Tensor

from bench.diffusion import (
    Schedule,
    UncertaintyWeights,
    add_noise,
    clustered_timesteps,
    hybrid_loss,
    make_schedule,
    min_snr_weight,
    snr,
)


@pytest.fixture(scope="module")
def weights_golden() -> dict[str, Tensor]:
    return helpers.golden("loss_weights")[0]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [1, 5])
def test_min_snr_agrees_with_the_released_one(weights_golden: dict[str, Tensor], name: str, gamma: int) -> None:
    schedule, t = make_schedule(name), weights_golden["t"]
    close(schedule.snr.values[t], weights_golden[f"{name}.snr"], atol=0, rtol=1e-12)
    close(snr(schedule, t), weights_golden[f"{name}.snr"].float(), atol=0, rtol=1e-6)
    weight = min_snr_weight(schedule, t, gamma)
    close(weight, weights_golden[f"{name}.min_snr_{gamma}.weight"], atol=0, rtol=2e-6)
    x0, noise = weights_golden["x0"], weights_golden["noise"]
    x_t = add_noise(schedule, x0, t, noise)
    mse, vb = hybrid_loss(schedule, fake_network(x_t, t), x0, x_t, t, noise, True)
    assert vb is not None
    close(mse, weights_golden[f"{name}.constant.mse"], atol=1e-6)
    close(weight * mse, weights_golden[f"{name}.min_snr_{gamma}.mse"], atol=1e-6)
    close(weight * mse + vb, weights_golden[f"{name}.min_snr_{gamma}.loss"], atol=1e-6)


def test_min_snr_needs_a_positive_gamma(linear: Schedule) -> None:
    with pytest.raises(ValueError, match="choose a positive number"):
        min_snr_weight(linear, torch.tensor([0]), 0)


def uncertainty_weights(golden: dict[str, Tensor]) -> UncertaintyWeights:
    weights = UncertaintyWeights()
    weights.load_state_dict({"log_scales": golden["uw.loss_scale"]})
    return weights


def test_uncertainty_weights_agree_with_the_released_ones(weights_golden: dict[str, Tensor], linear: Schedule) -> None:
    t, x0, noise = (weights_golden[f"uw.{name}"] for name in ("t", "x0", "noise"))
    x_t = add_noise(linear, x0, t, noise)
    mse, vb = hybrid_loss(linear, fake_network(x_t, t), x0, x_t, t, noise, True)
    assert vb is not None
    close(mse + vb, weights_golden["uw.per_sample"], atol=1e-6)
    close(uncertainty_weights(weights_golden)(mse + vb, t), weights_golden["uw.loss"], atol=1e-6)


def test_uncertainty_weights_are_the_same_over_micro_batches(weights_golden: dict[str, Tensor]) -> None:
    weights, t, losses = uncertainty_weights(weights_golden), weights_golden["uw.t"], weights_golden["uw.per_sample"]
    whole = weights(losses, t)
    (gradient,) = torch.autograd.grad(whole, weights.log_scales)
    parts = torch.stack([weights(losses[i : i + 4], t[i : i + 4]) for i in range(0, 16, 4)]).mean()
    (gradient_of_parts,) = torch.autograd.grad(parts, weights.log_scales)
    close(parts, whole, atol=1e-6)
    close(gradient_of_parts, gradient, atol=1e-7)


def test_a_cluster_s_scale_settles_at_its_mean_loss() -> None:
    weights = UncertaintyWeights(num_timesteps=100, num_clusters=2)
    with torch.no_grad():
        weights.log_scales.copy_(torch.tensor([0.25, 4.0]).log() - math.log(2))  # loss_c / num_clusters
    loss = weights(torch.tensor([0.2, 0.3, 4.0, 4.0]), torch.tensor([0, 49, 50, 99]))
    (gradient,) = torch.autograd.grad(loss, weights.log_scales)
    close(gradient, torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize(("num_timesteps", "clusters"), [(1000, 8), (1000, 7), (10, 3)])
def test_clusters_of_timesteps_have_equal_shares(num_timesteps: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(5)
    t = clustered_timesteps(clusters * 400, num_timesteps, generator, clusters)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < num_timesteps
    weights = UncertaintyWeights(num_timesteps, clusters)
    weights(torch.ones(len(t)), t).backward()
    assert weights.log_scales.grad is not None
    expected = 0.5 - 0.5 / clusters  # each scale sees 1/clusters of the batch
    close(weights.log_scales.grad, torch.full((clusters,), expected), atol=1e-6)
    assert len(t.unique()) > 0.8 * num_timesteps


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a multiple of 8"):
        clustered_timesteps(12, 1000, torch.Generator())
    with pytest.raises(ValueError, match="give one of each per image"):
        UncertaintyWeights()(torch.ones(3), torch.zeros(4, dtype=torch.int64))
