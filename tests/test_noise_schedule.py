"""Are the noise schedules, whole and respaced, the released ones, and is what cannot be one refused?"""

import pytest
import torch
from diffusing import close
from torch import Tensor

from bench.diffusion import Schedule, make_schedule, respace

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
