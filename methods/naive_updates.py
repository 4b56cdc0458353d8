"""What do optimiser and average do in plain code: parameter by parameter, in Python?"""

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.ema import EMA

if TYPE_CHECKING:
    from bench.trainer import Trainer


class LoopedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2), one parameter after the other, one operation after the other."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean / (1 - beta1 ** state["step"]), deviation, value=-group["lr"])


class LoopedEMA(EMA):
    """The average, one parameter after the other."""

    @torch.no_grad()
    def update(self, num_images: int, others: Container[nn.Parameter] = ()) -> None:
        assert not others
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.images_seen[name] += num_images
                if self.averages:
                    decay = self.decay(num_images, self.images_seen[name])
                    self.averages[name].mul_(decay).add_(parameter, alpha=1 - decay)


def loop_updates(trainer: "Trainer") -> None:
    """Give a trainer that has not begun the plain optimiser and average; its method makes gradients whole (switch `outer`)."""
    train = trainer.config.train
    groups = [{"params": group["params"], "lr": group["lr"]} for group in trainer.optimizer.param_groups]
    trainer.optimizer = LoopedAdamW(groups, train.lr, (train.beta1, train.beta2), train.weight_decay)  # type: ignore[assignment]
    trainer.ema = LoopedEMA(trainer.method, train.ema_half_life_images, train.ema_warmup)
