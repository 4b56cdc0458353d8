"""What does the network learn to predict, and how is a miss weighed?

Two objectives behind one small interface, so that the trainer, the held-out loss and the sampler need not ask which
it is: discrete diffusion (the network predicts noise and, optionally, the variance) and rectified flow (it predicts
the velocity).
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from bench.config import DiffusionConfig, ModelConfig
from bench.diffusion import Schedule, UncertaintyWeights, add_noise, hybrid_loss, make_schedule, min_snr_weight
from bench.flow import flow_loss, flow_noise
from bench.method import Method
from bench.randomness import Batch


class Objective(Protocol):
    """All terms are per sample, (B,)."""

    module: nn.Module  # what the loss itself learns; often nothing

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...

    def terms(self, output: Tensor, x_t: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss terms by name; the first is the plain squared error, comparable between methods."""

    def loss(self, terms: dict[str, Tensor], t: Tensor) -> Tensor:
        """The scalar that is minimised (without the method's penalties)."""


class NoiseObjective:
    """Squared error of the noise, plus the variational term when the variance is learned (arXiv 2102.09672, eq. 16)."""

    def __init__(self, config: DiffusionConfig, learn_sigma: bool) -> None:
        self.schedule: Schedule = make_schedule(config.schedule, config.num_timesteps)
        self.learn_sigma = learn_sigma
        self.weight, self.gamma = config.loss_weight, config.min_snr_gamma
        self.module: nn.Module = UncertaintyWeights(config.num_timesteps) if self.weight == "uncertainty" else nn.Module()

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return add_noise(self.schedule, x0, t, noise)

    def terms(self, output: Tensor, x_t: Tensor, batch: Batch) -> dict[str, Tensor]:
        mse, vb = hybrid_loss(self.schedule, output.float(), batch.x0, x_t, batch.t, batch.noise, self.learn_sigma)
        return {"mse": mse} if vb is None else {"mse": mse, "vb": vb}

    def loss(self, terms: dict[str, Tensor], t: Tensor) -> Tensor:
        if self.weight == "min_snr":
            terms = terms | {"mse": terms["mse"] * min_snr_weight(self.schedule, t, self.gamma)}
        per_sample = torch.stack(list(terms.values())).sum(dim=0)
        return self.module(per_sample, t) if self.weight == "uncertainty" else per_sample.mean()


class FlowObjective:
    """Squared error of the velocity; t in (0, 1) (arXiv 2209.03003, eq. 1)."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Module()

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return flow_noise(x0, t, noise)

    def terms(self, output: Tensor, x_t: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"mse": flow_loss(output.float(), batch.x0, batch.noise)}

    def loss(self, terms: dict[str, Tensor], t: Tensor) -> Tensor:
        return terms["mse"].mean()


def make_objective(config: DiffusionConfig, model: ModelConfig, method: Method) -> Objective:
    """ValueError where the objective or the weighting does not fit a method that splits the schedule."""
    if len(method.intervals) > 1:
        asked = "rectified flow" if config.objective == "flow" else "uncertainty weighting"
        if config.objective == "flow" or config.loss_weight == "uncertainty":
            raise ValueError(
                f"{asked} draws timesteps over the whole schedule, which this method splits into {len(method.intervals)}: "
                "choose diffusion.objective=noise and diffusion.loss_weight=uniform or min_snr"
            )
    return FlowObjective() if config.objective == "flow" else NoiseObjective(config, model.learn_sigma)
