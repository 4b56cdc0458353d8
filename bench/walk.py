"""Which steps lead from noise to image?

`DiffusionWalk`   ancestral (DDPM) and DDIM, over a respaced chain: `bench.diffusion`
`SolverWalk`      DPM-Solver++ of second order (arXiv 2211.01095), multistep, as diffusers computes it
`FlowWalk`        Euler steps of a rectified flow: `bench.flow`
"""

import copy
import warnings
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.config import DiffusionConfig, EvaluationConfig, ModelConfig
from bench.diffusion import ancestral_step, ddim_step, split_output, x0_from_noise
from bench.flow import euler_step, flow_times_to_sample
from bench.noise_schedule import make_schedule, respace

SOLVER_HINT = "install it with `pip install 'timestep-bench[solvers]'`, or choose ancestral or ddim"
SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}


class Walk(Protocol):
    """A sampler: `times` are what the network is given at each step, from noise to image."""

    times: Tensor  # (S,) int64 timesteps, or float in (0, 1]
    adds_noise: bool  # whether a step needs noise of its own

    def of_block(self) -> "Walk":
        """The walk of one block of images: what it remembers of earlier steps is theirs alone."""

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, C, H, W) after the step at `place`, given the network's output there; never waits for the device."""

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        """The clean image (B, C, H, W) that the output stands for."""


class DiffusionWalk:
    """Ancestral or DDIM steps over a respaced chain."""

    def __init__(self, diffusion: DiffusionConfig, evaluation: EvaluationConfig, learn_sigma: bool) -> None:
        self.schedule = respace(make_schedule(diffusion.schedule, diffusion.num_timesteps), evaluation.steps)
        self.levels = range(self.schedule.num_steps - 1, -1, -1)
        self.times = self.schedule.timesteps.values.flip(0)
        self.ancestral, self.eta = evaluation.sampler == "ancestral", evaluation.eta
        self.adds_noise = self.ancestral or self.eta > 0
        self.variance = "learned" if learn_sigma else "fixed_large"

    def of_block(self) -> "DiffusionWalk":
        return self  # it remembers nothing

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        index = torch.full((len(x),), self.levels[place], device=x.device)
        if self.ancestral:
            assert noise is not None
            return ancestral_step(self.schedule, output, x, index, noise, self.variance)
        return ddim_step(self.schedule, output, x, index, noise, self.eta)

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        index = torch.full((len(x),), self.levels[place], device=x.device)
        return x0_from_noise(self.schedule, split_output(output, x)[0], x, index)


class SolverWalk(DiffusionWalk):
    """A high-order solver's steps over the same chain; deterministic, and one network evaluation each.

    Of order 1 it is DDIM. The last step, to the clean image, is of first order.
    """

    def __init__(self, diffusion: DiffusionConfig, evaluation: EvaluationConfig, learn_sigma: bool, order: int = 2) -> None:
        super().__init__(diffusion, evaluation, learn_sigma)
        self.adds_noise = False
        betas = make_schedule(diffusion.schedule, diffusion.num_timesteps).betas.values
        make = _import_solver()
        self.scheduler = make(**(SOLVER | {"solver_order": order}), trained_betas=betas.numpy(), num_train_timesteps=len(betas))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own way of calling NumPy
            self.scheduler.set_timesteps(timesteps=self.times.tolist())
        self.scheduler.set_begin_index(0)
        self.host_times: list[int] = self.times.tolist()

    def of_block(self) -> "SolverWalk":
        own = copy.copy(self)
        own.scheduler = copy.deepcopy(self.scheduler)
        return own

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        assert self.scheduler.step_index in (None, place), "a multistep solver takes its steps in order"
        predicted_noise, _ = split_output(output, x)
        taken: Tensor = self.scheduler.step(predicted_noise, self.host_times[place], x, return_dict=False)[0]
        return taken


class FlowWalk:
    """Euler steps of a rectified flow, from t = 1 to 0."""

    adds_noise = False

    def __init__(self, evaluation: EvaluationConfig) -> None:
        if not evaluation.steps.isdigit() or int(evaluation.steps) < 1:
            raise ValueError(f"evaluation.steps is {evaluation.steps!r}: rectified flow takes a whole number of steps")
        self.times = flow_times_to_sample(int(evaluation.steps))

    def of_block(self) -> "FlowWalk":
        return self

    def step(self, place: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        t = torch.full((len(x),), float(self.times[place]), device=x.device)
        return euler_step(output, x, t, 1 / len(self.times))

    def predicted(self, place: int, output: Tensor, x: Tensor) -> Tensor:
        t = torch.full((len(x),), float(self.times[place]), device=x.device)
        return euler_step(output, x, t, 1.0)  # all the way to 0


def make_walk(diffusion: DiffusionConfig, evaluation: EvaluationConfig, model: ModelConfig) -> Walk:
    """ValueError where the sampler does not fit the objective or the steps do not fit the chain."""
    if (diffusion.objective == "flow") != (evaluation.sampler == "euler"):
        raise ValueError(
            f"evaluation.sampler is {evaluation.sampler!r}, which does not fit diffusion.objective={diffusion.objective}: "
            "choose ancestral, ddim or dpm_solver for noise; for flow euler, with evaluation.steps a plain number"
        )
    if diffusion.objective == "flow":
        return FlowWalk(evaluation)
    kind = SolverWalk if evaluation.sampler == "dpm_solver" else DiffusionWalk
    return kind(diffusion, evaluation, model.learn_sigma)


def solver_of(sampler: str) -> str:
    """What a protocol says of the library that takes the steps; empty for our own. ValueError if it is not installed."""
    if sampler != "dpm_solver":
        return ""
    _import_solver()
    settings = ", ".join(f"{name}={value}" for name, value in SOLVER.items())
    return f"diffusers {metadata.version('diffusers')} DPMSolverMultistepScheduler({settings})"


def _import_solver() -> Any:
    """Imported where it is asked for: most runs do without, and it takes seconds."""
    try:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    except ImportError as error:
        raise ValueError(f"evaluation.sampler is dpm_solver, which needs diffusers ({error}): {SOLVER_HINT}") from None
    return DPMSolverMultistepScheduler
