"""Does the diffusion mathematics agree with the released implementation, and keep the laws it must?"""

import math

import helpers
import pytest
import torch
from torch import Tensor

from bench.diffusion import (
    Schedule,
    UncertaintyWeights,
    add_noise,
    clustered_timesteps,
    ddim_step,
    discretised_log_likelihood,
    gaussian_kl,
    guide,
    hybrid_loss,
    make_schedule,
    min_snr_weight,
    posterior_mean,
    predict_posterior,
    respace,
    snr,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return helpers.golden("diffusion")[0]


@pytest.fixture(scope="module")
def weights_golden() -> dict[str, Tensor]:
    return helpers.golden("loss_weights")[0]


@pytest.fixture(scope="module")
def linear() -> Schedule:
    return make_schedule("linear")


def fake_network(x: Tensor, t: Tensor) -> Tensor:
    """The network of the golden tensors: x (B, C, H, W), original timesteps (B,) -> (B, 2C, H, W)."""
    t = t.float().view(-1, 1, 1, 1)
    return torch.cat([0.8 * torch.sin(x) + 0.1 * x * torch.cos(t / 100), torch.tanh(0.3 * x + t / 1000 - 0.5)], dim=1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# --- schedules ---------------------------------------------------------------------------------------------------------


TABLES = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_agree_with_the_released_ones(golden: dict[str, Tensor], name: str) -> None:
    schedule = make_schedule(name)
    close(schedule.betas.values, golden[f"{name}_raw.betas"], atol=1e-15, rtol=1e-15)
    close(schedule.betas.values, golden[f"{name}.betas"], atol=1e-12, rtol=0)
    checked = [table for table in TABLES if f"{name}.{table}" in golden]
    assert len(checked) == (10 if name == "linear" else 3)
    for table in checked:
        close(getattr(schedule, table).values, golden[f"{name}.{table}"], atol=1e-12, rtol=1e-12)
    assert schedule.num_steps == schedule.num_timesteps == 1000
    assert schedule.timesteps.values.tolist() == list(range(1000))


@pytest.mark.parametrize("steps", ["250", "50", "10", "ddim50", "ddim25", "100,50,10"])
def test_respacing_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule, steps: str) -> None:
    spaced, name = respace(linear, steps), "respace." + steps.replace(",", "_")
    assert torch.equal(spaced.timesteps.values, golden[f"{name}.timestep_map"])
    close(spaced.betas.values, golden[f"{name}.betas"], atol=1e-12, rtol=1e-12)
    for table in ("alphas_cumprod", "posterior_log_variance_clipped"):
        if f"{name}.{table}" in golden:
            close(getattr(spaced, table).values, golden[f"{name}.{table}"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_timesteps", [2, 7, 100, 1000])
def test_respacing_keeps_the_ends_and_the_noise_levels(num_timesteps: int) -> None:
    schedule = make_schedule("cosine", num_timesteps)
    for steps in {2, num_timesteps // 3, num_timesteps - 1, num_timesteps} - {0, 1}:
        spaced = respace(schedule, steps)
        kept = spaced.timesteps.values
        assert spaced.num_steps == steps and spaced.num_timesteps == num_timesteps
        assert kept[0] == 0 and kept[-1] == num_timesteps - 1 and bool((kept.diff() > 0).all())
        close(spaced.alphas_cumprod.values, schedule.alphas_cumprod.values[kept], atol=1e-15, rtol=1e-12)


def test_respacing_twice_still_names_the_timesteps_of_the_full_chain(linear: Schedule) -> None:
    twice = respace(respace(linear, "ddim50"), "ddim10")
    assert twice.timesteps.values.tolist() == list(range(0, 1000, 100))
    assert twice.num_timesteps == 1000


@pytest.mark.parametrize("steps", ["0", "1", "-5", "", "fifty", "ddim", "ddim0", "ddim20,5", "10,,10", "2.5"])
def test_unreadable_steps_are_refused(linear: Schedule, steps: str) -> None:
    with pytest.raises(ValueError, match="cannot be read: give a number of at least 2"):
        respace(linear, steps)


def test_impossible_steps_are_refused(linear: Schedule) -> None:
    with pytest.raises(ValueError, match="'1001' ask for 1001 of the 1000 timesteps in section 1"):
        respace(linear, 1001)
    with pytest.raises(ValueError, match="ask for 400 of the 333 timesteps in section 2"):
        respace(linear, "100,400,10")
    with pytest.raises(ValueError, match=r"no integer stride visits exactly 37 of 1000 timesteps; .* works is ddim36"):
        respace(linear, "ddim37")


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="'sigmoid': choose one of linear, cosine"):
        make_schedule("sigmoid")
    with pytest.raises(ValueError, match="choose at least 2"):
        make_schedule("cosine", 1)
    with pytest.raises(ValueError, match="choose more than 20 timesteps, or the cosine schedule"):
        make_schedule("linear", 20)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_short_chains_end_at_about_the_same_noise(name: str) -> None:
    assert make_schedule(name, 100).alphas_cumprod.values[-1] < 1e-4
    assert (make_schedule(name, 21).betas.values < 1).all()


def test_lookups_are_float32_of_the_float64_tables_on_the_index_s_device(linear: Schedule) -> None:
    index = torch.tensor([0, 3, 999])
    picked = linear.alphas_cumprod[index]
    assert picked.dtype == torch.float32 and picked.shape == (3, 1, 1, 1)
    assert torch.equal(picked.flatten(), linear.alphas_cumprod.values[index].float())
    assert torch.equal(respace(linear, "10").timesteps[torch.tensor([1, 9])], torch.tensor([111, 999]))
    elsewhere = torch.zeros(2, dtype=torch.int64, device="meta")
    assert linear.alphas_cumprod[elsewhere].device.type == "meta"


# --- training ----------------------------------------------------------------------------------------------------------


def test_noising_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    x0, t, noise = golden["x0"], golden["t"], golden["noise"]
    close(add_noise(linear, x0, t, noise), golden["q_sample"], atol=1e-6)
    close(add_noise(make_schedule("cosine"), x0, t, noise), golden["q_sample_cosine"], atol=1e-6)


def test_true_posterior_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    t = golden["t"]
    close(posterior_mean(linear, golden["x0"], golden["q_sample"], t), golden["q_posterior.mean"], atol=1e-6)
    close(linear.posterior_variance[t].flatten(), golden["q_posterior.variance"], rtol=1e-6)
    close(linear.posterior_log_variance_clipped[t].flatten(), golden["q_posterior.log_variance"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "noised"), [("linear", "loss", "q_sample"), ("cosine", "loss_cosine", "q_sample_cosine")]
)
def test_hybrid_loss_agrees_with_the_released_one(golden: dict[str, Tensor], name: str, key: str, noised: str) -> None:
    x_t, t = golden[noised], golden["t"]
    terms = hybrid_loss(make_schedule(name), fake_network(x_t, t), golden["x0"], x_t, t, golden["noise"], True)
    assert terms.vb is not None
    close(terms.mse, golden[f"{key}.mse"], atol=1e-6)
    close(terms.vb, golden[f"{key}.vb"], atol=1e-6)
    close(terms.mse + terms.vb, golden[f"{key}.loss"], atol=1e-6)
    if name == "linear":  # the released KL loss is T times the same term
        close(terms.vb, golden["loss_kl.loss"] / 1000, atol=1e-6)


def test_gradient_of_the_hybrid_loss_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    output = golden["model_out"].clone().requires_grad_()
    terms = hybrid_loss(linear, output, golden["x0"], golden["q_sample"], golden["t"], golden["noise"], True)
    assert terms.vb is not None
    (gradient,) = torch.autograd.grad((terms.mse + terms.vb).mean(), output, retain_graph=True)
    close(gradient, golden["loss.grad_model_out_of_mean"], atol=1e-7)
    (of_variational_term,) = torch.autograd.grad(terms.vb.sum(), output)
    assert not of_variational_term[:, :4].any() and of_variational_term[:, 4:].any()


def test_loss_without_a_learned_variance(golden: dict[str, Tensor], linear: Schedule) -> None:
    output = golden["model_out"][:, :4]
    terms = hybrid_loss(linear, output, golden["x0"], golden["q_sample"], golden["t"], golden["noise"], False)
    close(terms.mse, golden["loss_fixed_sigma.mse"], atol=1e-6)
    assert terms.vb is None


def test_loss_is_float32_for_a_half_precision_network(golden: dict[str, Tensor], linear: Schedule) -> None:
    output = golden["model_out"].bfloat16()
    terms = hybrid_loss(linear, output, golden["x0"], golden["q_sample"], golden["t"], golden["noise"], True)
    assert terms.vb is not None and terms.mse.dtype == terms.vb.dtype == torch.float32
    upcast = hybrid_loss(linear, output.float(), golden["x0"], golden["q_sample"], golden["t"], golden["noise"], True)
    assert upcast.vb is not None
    assert torch.equal(terms.mse, upcast.mse) and torch.equal(terms.vb, upcast.vb)


def test_likelihood_and_divergence_agree_with_the_released_ones(golden: dict[str, Tensor]) -> None:
    x0, noise = golden["x0"], golden["noise"]
    likelihood = discretised_log_likelihood(x0.clamp(-1, 1), 0.9 * x0, torch.full_like(x0, -2.0))
    close(likelihood, golden["dgll"])
    divergence = gaussian_kl(x0, torch.tensor(-1.0), noise, torch.tensor(-0.5))
    close(divergence, golden["normal_kl"])


def test_probabilities_of_all_256_bins_sum_to_one() -> None:
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in ((0.3, -3.0), (-1.0, -1.0), (1.2, 0.5)):
        log_probability = discretised_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
        close(log_probability.exp().sum(), torch.tensor(1.0), atol=1e-5)


def test_impossible_bins_have_a_finite_log_probability() -> None:
    log_probability = discretised_log_likelihood(torch.zeros(1), torch.tensor([100.0]), torch.tensor([-3.0]))
    close(log_probability, torch.tensor([math.log(1e-12)]))


def test_variational_term_is_zero_at_the_true_posterior(linear: Schedule) -> None:
    torch.manual_seed(0)
    x0, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 500, 999])
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    terms = hybrid_loss(linear, output, x0, add_noise(linear, x0, t, noise), t, noise, True)
    assert terms.vb is not None
    close(terms.vb, torch.zeros(4), atol=1e-5)
    assert not terms.mse.any()


def test_wrong_shapes_are_refused(golden: dict[str, Tensor], linear: Schedule) -> None:
    x0, t, noise = golden["x0"], golden["t"], golden["noise"]
    with pytest.raises(ValueError, match="noise has shape"):
        add_noise(linear, x0, t, noise[:1])
    with pytest.raises(ValueError, match="give one int64 index for each image"):
        add_noise(linear, x0, t.float(), noise)
    with pytest.raises(ValueError, match="give one int64 index for each image"):
        add_noise(linear, x0, t[:3], noise)
    with pytest.raises(ValueError, match="learn_sigma is False, but the network gives 8 channels for 4"):
        hybrid_loss(linear, golden["model_out"], x0, x0, t, noise, False)
    with pytest.raises(ValueError, match=r"must have 4 channels \(noise\) or 8"):
        hybrid_loss(linear, golden["model_out"][:, :6], x0, x0, t, noise, True)
    with pytest.raises(ValueError, match="sample with fixed_small or fixed_large"):
        predict_posterior(linear, noise, x0, t)
    with pytest.raises(ValueError, match="variance is 'huge': choose one of learned"):
        predict_posterior(linear, noise, x0, t, "huge")
    with pytest.raises(ValueError, match="pass noise, or choose eta 0"):
        ddim_step(linear, noise, x0, t, None, eta=0.5)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        ddim_step(linear, noise, x0, t, noise, eta=1.5)


# --- loss weights ------------------------------------------------------------------------------------------------------


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


# --- guidance ----------------------------------------------------------------------------------------------------------


def labelled_network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x * y.view(-1, 1, 1, 1), x + t.view(-1, 1, 1, 1)], dim=1)


def guided(scale: float, channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    z, t = torch.randn(2, 4, 3, 3), torch.tensor([1, 2])
    pair = torch.cat([z, z]), torch.cat([t, t]), torch.tensor([2, 3, 7, 7])
    return guide(labelled_network, *pair, scale, channels), labelled_network(*pair)


def test_guidance_of_scale_one_is_the_conditional_output() -> None:
    output, plain = guided(scale=1.0, channels=4)
    close(output[:2], plain[:2], atol=1e-6)
    close(output[2:, :4], plain[:2, :4], atol=1e-6)


def test_guidance_leaves_other_channels_to_each_half() -> None:
    output, plain = guided(scale=4.0, channels=3)
    conditional, null = plain[:2, :3], plain[2:, :3]
    expected = null + 4 * (conditional - null)
    assert torch.equal(output[:2, :3], expected) and torch.equal(output[2:, :3], expected)
    assert torch.equal(output[:, 3:], plain[:, 3:])


def test_guidance_of_an_odd_batch_or_of_too_many_channels_is_refused() -> None:
    x = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match="stack the batch twice"):
        guide(labelled_network, x, torch.zeros(3), torch.zeros(3), 2.0, 3)
    with pytest.raises(ValueError, match="choose from 1 to 8"):
        guide(labelled_network, x[:2], torch.zeros(2), torch.zeros(2), 2.0, 9)
