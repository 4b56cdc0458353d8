"""Do the sampling steps agree with the released ones, and do they take away exactly the noise that was added?"""

import helpers
import pytest
import torch
from diffusing import close, fake_network
from torch import Tensor

from bench.diffusion import (
    Schedule,
    UncertaintyWeights,
    add_noise,
    ancestral_step,
    ddim_step,
    guide,
    hybrid_loss,
    make_schedule,
    min_snr_weight,
    predict_posterior,
    respace,
)


def network_at(schedule: Schedule, x: Tensor, index: Tensor) -> Tensor:
    return fake_network(x, schedule.timesteps[index])


# --- one step ----------------------------------------------------------------------------------------------------------


def test_learned_posterior_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    posterior = predict_posterior(linear, golden["model_out"], golden["q_sample"], golden["t"])
    for name, ours in zip(("mean", "variance", "log_variance", "pred_xstart"), posterior, strict=True):
        close(ours, golden[f"p_mean_variance.clip0.{name}"], atol=1e-6)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_fixed_variances_agree_with_the_released_ones(golden: dict[str, Tensor], linear: Schedule, kind: str) -> None:
    output, x = golden["model_out"], golden["q_sample"]
    posterior = predict_posterior(linear, output[:, :4], x, golden["t"], kind)
    for name, ours in (("variance", posterior.variance), ("log_variance", posterior.log_variance)):
        assert ours.shape == x.shape and torch.equal(ours, ours[:, :1, :1, :1].expand_as(x))
        close(ours[:, 0, 0, 0], golden[f"p_mean_variance.{kind}.{name}"], atol=1e-9, rtol=1e-6)
    close(posterior.mean, golden["p_mean_variance.clip0.mean"], atol=1e-6)
    assert torch.equal(predict_posterior(linear, output, x, golden["t"], kind).mean, posterior.mean)


def test_ancestral_step_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    x, t, noise = golden["q_sample"], golden["t"], golden["p_sample.noise"]
    close(ancestral_step(linear, network_at(linear, x, t), x, t, noise), golden["p_sample.sample"], atol=1e-6)
    close(predict_posterior(linear, network_at(linear, x, t), x, t).x0, golden["p_sample.pred_xstart"], atol=1e-6)
    spaced, index = respace(linear, "250"), golden["t250"]
    sample = ancestral_step(spaced, network_at(spaced, x, index), x, index, golden["p_sample250.noise"])
    close(sample, golden["p_sample250.sample"], atol=1e-6)


@pytest.mark.parametrize("eta", [0, 0.5])
def test_ddim_step_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule, eta: float) -> None:
    spaced, x, index = respace(linear, "ddim50"), golden["q_sample"], golden["t50"]
    output, key = network_at(spaced, x, index), f"ddim50.eta{eta}"
    close(ddim_step(spaced, output, x, index, golden[f"{key}.noise"], eta), golden[f"{key}.sample"])
    close(predict_posterior(spaced, output, x, index).x0, golden[f"{key}.pred_xstart"])


def test_ddim_step_on_the_full_chain_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    x, t = golden["q_sample"], golden["t"]
    close(ddim_step(linear, network_at(linear, x, t), x, t, None), golden["ddim1000.eta0.sample"])


def test_noise_is_masked_at_the_first_level(golden: dict[str, Tensor], linear: Schedule) -> None:
    x, output, index = golden["q_sample"][:2], golden["model_out"][:2], torch.tensor([0, 1])
    noises = torch.zeros_like(x), torch.ones_like(x)
    for step in (ancestral_step, lambda *arguments: ddim_step(*arguments, eta=1.0)):
        quiet, loud = (step(linear, output, x, index, noise) for noise in noises)
        assert torch.equal(quiet[0], loud[0])
        assert not torch.equal(quiet[1], loud[1])


def test_ddim_with_eta_one_is_the_ancestral_step_with_the_small_variance(golden: dict[str, Tensor], linear: Schedule) -> None:
    x, index, noise = golden["q_sample"], golden["t250"], golden["noise"]
    spaced = respace(linear, "250")
    output = network_at(spaced, x, index)
    close(
        ddim_step(spaced, output, x, index, noise, eta=1.0),
        ancestral_step(spaced, output, x, index, noise, "fixed_small"),
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_steps_are_finite_at_every_level(name: str, steps: int) -> None:
    schedule = respace(make_schedule(name), steps)
    index = torch.arange(steps)
    x = torch.ones(steps, 1, 2, 2)
    output, noise = torch.ones(steps, 2, 2, 2), torch.ones_like(x)
    for variance in ("learned", "fixed_small", "fixed_large"):
        assert ancestral_step(schedule, output, x, index, noise, variance).isfinite().all()
    for eta in (0.0, 0.5, 1.0):
        assert ddim_step(schedule, output, x, index, noise, eta).isfinite().all()


# --- whole chains ------------------------------------------------------------------------------------------------------


def test_ancestral_chain_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    spaced, x = respace(linear, "10"), golden["loop.z"]
    for place, noise in enumerate(golden["loop.p10.noises"]):
        index = torch.full((len(x),), 9 - place)
        x = ancestral_step(spaced, network_at(spaced, x, index), x, index, noise)
    close(x, golden["loop.p10.sample"])


def test_ddim_chain_agrees_with_the_released_one(golden: dict[str, Tensor], linear: Schedule) -> None:
    spaced, x = respace(linear, "ddim10"), golden["loop.z"]
    assert torch.equal(spaced.timesteps.values, golden["loop.ddim10.timestep_map"])
    for place in range(10):
        index = torch.full((len(x),), 9 - place)
        x = ddim_step(spaced, network_at(spaced, x, index), x, index, None)
    close(x, golden["loop.ddim10.sample"])


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", ["10", "ddim50", "100,50,10"])
def test_ddim_with_the_true_noise_recovers_the_image(name: str, steps: str) -> None:
    torch.manual_seed(2)
    schedule = respace(make_schedule(name), steps)
    x0 = torch.rand(2, 3, 4, 4) * 2 - 1
    x = add_noise(schedule, x0, torch.full((2,), schedule.num_steps - 1), torch.randn_like(x0))
    for level in reversed(range(schedule.num_steps)):
        index = torch.full((2,), level)
        true_noise = (x - schedule.sqrt_alphas_cumprod[index] * x0) / schedule.sqrt_one_minus_alphas_cumprod[index]
        x = ddim_step(schedule, true_noise, x, index, None)
    close(x, x0, atol=1e-4)


def test_ancestral_chain_with_a_perfect_network_draws_from_the_data(linear: Schedule) -> None:
    """For standard normal data the best noise prediction is known, and beta is exactly the posterior's variance."""
    torch.manual_seed(3)
    schedule = respace(linear, 50)
    x = torch.randn(1, 1, 200, 200)
    for level in reversed(range(50)):
        index = torch.tensor([level])
        best_prediction = schedule.sqrt_one_minus_alphas_cumprod[index] * x
        x = ancestral_step(schedule, best_prediction, x, index, torch.randn_like(x), "fixed_large")
    assert abs(float(x.mean())) < 0.02
    assert float(x.std()) == pytest.approx(1, abs=0.015)


# --- what a step may not do --------------------------------------------------------------------------------------------


def test_no_step_waits_for_the_device(linear: Schedule) -> None:
    """Tensors without storage have no values to wait for: reading one on the host raises."""
    with torch.device("meta"):
        x, noise, output = torch.empty(4, 3, 8, 8), torch.empty(4, 3, 8, 8), torch.empty(4, 6, 8, 8)
        index, y, weights = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64), UncertaintyWeights()
    x_t = add_noise(linear, x, index, noise)
    mse, vb = hybrid_loss(linear, output, x, x_t, index, noise, True)
    assert vb is not None
    weights(min_snr_weight(linear, index, 5) * mse + vb, index)
    ancestral_step(linear, output, x, index, noise)
    sample = ddim_step(linear, output, x, index, noise, 0.5)
    guide(lambda x, t, y: output, x, linear.timesteps[index], y, 1.5, 3)
    assert sample.device.type == "meta"


def test_tables_first_used_while_sampling_can_train() -> None:
    schedule, x, t = make_schedule("cosine"), torch.ones(1, 1, 2, 2), torch.tensor([5])
    with torch.inference_mode():
        ancestral_step(schedule, torch.ones(1, 2, 2, 2), x, t, x)
        hybrid_loss(schedule, torch.ones(1, 2, 2, 2), x, x, t, x, True)
    output = torch.zeros(1, 2, 2, 2, requires_grad=True)
    mse, vb = hybrid_loss(schedule, output, x, add_noise(schedule, x, t, x), t, x, True)
    assert vb is not None
    (mse + vb).sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()


# --- guidance of a released network ------------------------------------------------------------------------------------


def test_guidance_agrees_with_the_released_dit() -> None:
    tensors, method = helpers.golden("dit")[0], helpers.golden_method("dit")
    denoiser = method.specialise(method.intervals[0])
    with torch.no_grad():
        output = guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], scale=1.5, channels=3)
    close(output, tensors["out_cfg"], atol=1e-6)
