"""Do noising, posteriors and losses agree with the released implementation, and keep the laws they must?"""

import math

import pytest
import torch
from diffusing import close, fake_network
from torch import Tensor

from bench.diffusion import (
    Schedule,
    add_noise,
    ddim_step,
    discretised_log_likelihood,
    gaussian_kl,
    hybrid_loss,
    make_schedule,
    posterior_mean,
    predict_posterior,
)


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
