"""Does rectified flow agree with the released implementation, and does it lead from noise to the image?"""

import helpers
import pytest
import torch
from torch import Tensor

from bench.diffusion import guide
from bench.flow import euler_step, flow_loss, flow_noise, flow_times, flow_times_to_sample, times_from_draws
from bench.method import Denoiser

KINDS = {"ln": "logit_normal", "uniform": "uniform", "stratified": "stratified"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return helpers.golden("rectified_flow")[0]


@pytest.fixture(scope="module")
def network() -> Denoiser:
    method = helpers.golden_method("dit_moe_tp1")
    return torch.no_grad()(method.specialise(method.intervals[0]))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-6, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("key", KINDS)
def test_times_agree_with_the_released_ones(golden: dict[str, Tensor], key: str) -> None:
    close(times_from_draws(KINDS[key], golden[f"{key}.raw"]), golden[f"{key}.t"])


@pytest.mark.parametrize("key", KINDS)
def test_loss_agrees_with_the_released_one(golden: dict[str, Tensor], network: Denoiser, key: str) -> None:
    x0, t, noise = golden["x"], golden[f"{key}.t"], golden[f"{key}.z1"]
    z = flow_noise(x0, t, noise)
    close(z, golden[f"{key}.zt"])
    output = network(z, t, golden["y"])
    close(output[:, :4], golden[f"{key}.v"], atol=1e-5)
    loss = flow_loss(output, x0, noise)
    close(loss, golden[f"{key}.per_sample"], atol=1e-5)
    close(loss.mean(), golden[f"{key}.loss"], atol=1e-5)


def sample(network: Denoiser, z: Tensor, y: Tensor, num_steps: int) -> list[Tensor]:
    states = [z]
    for time in flow_times_to_sample(num_steps):
        t = time.expand(len(z))
        states.append(euler_step(network(states[-1], t, y), states[-1], t, 1 / num_steps))
    return states


def test_sampling_agrees_with_the_released_one(golden: dict[str, Tensor], network: Denoiser) -> None:
    states = sample(network, golden["sample.z"], golden["sample.cond"], 4)
    close(torch.stack(states), golden["sample.nocfg"], atol=1e-5)


def test_guided_sampling_agrees_with_the_released_one(golden: dict[str, Tensor], network: Denoiser) -> None:
    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return guide(network, x, t, y, scale=2.0, channels=4)

    z = golden["sample.z"].repeat(2, 1, 1, 1)
    states = sample(guided, z, torch.cat([golden["sample.cond"], golden["sample.null"]]), 4)
    conditional, null = torch.stack(states).chunk(2, dim=1)
    close(conditional, golden["sample.cfg2"], atol=1e-5)
    close(null, golden["sample.cfg2"], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values())
def test_times_lie_inside_the_unit_interval_and_follow_their_law(kind: str) -> None:
    times = flow_times(kind, 40_000, torch.Generator().manual_seed(0))
    assert times.dtype == torch.float32 and times.shape == (40_000,)
    assert times.min() > 0 and times.max() < 1
    quartile = {"uniform": 0.25}.get(kind, 0.33747)  # sigmoid of the normal's first quartile
    below = [float((times < edge).float().mean()) for edge in (quartile, 0.5, 1 - quartile)]
    assert below == pytest.approx([0.25, 0.5, 0.75], abs=0.01)


@pytest.mark.parametrize("count", [1, 3, 256])
def test_strata_hold_one_time_each(count: int) -> None:
    times = flow_times("stratified", count, torch.Generator().manual_seed(1))
    quantile = torch.special.ndtr(torch.logit(times.double()))
    assert torch.equal((quantile * count).floor(), torch.arange(count, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_the_ends_of_a_uniform_draw_stay_inside(kind: str) -> None:
    for draw in (0.0, 1 - 2**-24):
        times = times_from_draws(kind, torch.full((1000,), draw))
        assert times.min() > 0 and times.max() < 1


def test_straight_velocity_leads_to_the_image_in_any_number_of_steps() -> None:
    torch.manual_seed(4)
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert not flow_loss(noise - x0, x0, noise).any()
    for num_steps in (1, 3, 50):
        states = sample(lambda x, t, y: noise - x0, noise, torch.zeros(2), num_steps)
        close(states[-1], x0, atol=1e-5)
        close(states[1], flow_noise(x0, torch.full((2,), 1 - 1 / num_steps), noise), atol=1e-5)


def test_a_step_never_passes_time_zero() -> None:
    x, velocity = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    close(euler_step(velocity, x, torch.tensor([0.5, 0.1]), 0.25).flatten(), torch.tensor([-0.25, -0.1]))


def test_wrong_inputs_are_refused() -> None:
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="'cosine': choose one of logit_normal"):
        flow_times("cosine", 2, torch.Generator())
    with pytest.raises(ValueError, match="give one float in"):
        flow_noise(x, torch.tensor([1, 2]), x)
    with pytest.raises(ValueError, match="noise has shape"):
        flow_noise(x, torch.tensor([0.1, 0.2]), x[:, :3])
    with pytest.raises(ValueError, match="at least 4 channels"):
        flow_loss(x[:, :3], x, x)
    with pytest.raises(ValueError, match="choose at least 1"):
        flow_times_to_sample(0)
