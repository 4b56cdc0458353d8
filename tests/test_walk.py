"""Does the high-order solver walk our chain: first order is DDIM, second order converges faster, and blocks do not mix?"""

import itertools
import sys

import pytest
import torch
from helpers import randomise
from sampling import CPU, sampler_and_method
from torch import Tensor

from bench.config import DiffusionConfig, EvaluationConfig
from bench.walk import DiffusionWalk, SolverWalk, solver_of

LINEAR = DiffusionConfig(schedule="linear", num_timesteps=1000)
SPREAD = 0.5  # standard deviation of the data, one Gaussian around 0


def walk_of(steps: int, order: int = 0) -> DiffusionWalk:
    """DDIM, or with an order the solver."""
    evaluation = EvaluationConfig(sampler="dpm_solver" if order else "ddim", steps=str(steps))
    return SolverWalk(LINEAR, evaluation, False, order) if order else DiffusionWalk(LINEAR, evaluation, False)


def gaussian_error(walk: DiffusionWalk) -> float:
    """How far from the exact solution a walk is at the cleanest level, where the best network is known.

    The data are N(0, SPREAD^2), so x_t has the variance v = abar SPREAD^2 + 1 - abar, the best prediction of the noise is
    x sqrt(1 - abar) / v, and the probability flow keeps x / sqrt(v).
    """
    walk = walk.of_block()
    abar = walk.schedule.alphas_cumprod.values.flip(0)
    variance = abar * SPREAD**2 + 1 - abar
    x = torch.ones(1, 1, 1, 1) * variance[0].sqrt().float()
    for place in range(len(walk.times) - 1):
        output = ((1 - abar[place]).sqrt() / variance[place]).float() * x
        x = walk.step(place, output, x, None)
    return abs(float(x) - float(variance[-1].sqrt()))


def test_of_first_order_the_solver_is_ddim() -> None:
    walks = walk_of(20).of_block(), walk_of(20, order=1).of_block()
    states: list[Tensor] = [torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))] * 2
    for place in range(20):
        states = [walk.step(place, torch.tanh(x), x, None) for walk, x in zip(walks, states, strict=True)]
        torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("order", "low", "high"), [(0, 1.8, 2.2), (2, 3.4, 4.8), (3, 5.5, 12.0)])
def test_on_a_gaussian_the_error_falls_with_the_order(order: int, low: float, high: float) -> None:
    """Twice the steps: half the error of DDIM (0), a quarter with second order, an eighth with third."""
    errors = [gaussian_error(walk_of(steps, order)) for steps in (80, 160, 320)]
    for more, less in itertools.pairwise(errors):
        assert low < more / less < high, errors


def test_in_the_limit_of_many_steps_the_solver_and_ddim_agree() -> None:
    assert gaussian_error(walk_of(1000, 2)) < 2e-4
    assert gaussian_error(walk_of(1000)) < 2e-3
    assert gaussian_error(walk_of(320, 2)) < gaussian_error(walk_of(320)) / 5


def test_what_a_block_remembers_is_its_own() -> None:
    """Blocks of one round are walked expert by expert, in turns: each has the images that it has when it is alone."""
    settings = ("evaluation.sampler=dpm_solver", "evaluation.steps=8", "options.experts=3")
    sampler, method = sampler_and_method("multi_expert", *settings)
    together = sampler.draw(method, CPU)
    assert together.network_evaluations_per_sample == 8
    alone = [sampler._draw_blocks(method, [block], CPU)[0] for block in range(3)]
    assert torch.equal(together.images, torch.cat(alone)[:11])
    assert torch.equal(together.images, sampler.draw(method, CPU).images)  # nothing is left of the first time


def test_a_solver_without_its_library_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_multistep", None)
    with pytest.raises(ValueError, match=r"dpm_solver, which needs diffusers .*timestep-bench\[solvers\]"):
        solver_of("dpm_solver")
    assert solver_of("ddim") == ""


def test_the_protocol_names_library_version_and_order() -> None:
    assert solver_of("dpm_solver").startswith("diffusers ") and "solver_order=2" in solver_of("dpm_solver")


def test_the_solver_draws_near_what_ddim_draws_in_many_steps() -> None:
    """Of a network with small random weights."""
    images = {}
    for name in ("ddim", "dpm_solver"):
        sampler, method = sampler_and_method("dense", f"evaluation.sampler={name}", "evaluation.steps=40")
        images[name] = sampler.draw(randomise(method, std=0.05), CPU).images.int()
    assert (images["ddim"] - images["dpm_solver"]).abs().double().mean() < 4
    assert images["ddim"].double().std() > 20
