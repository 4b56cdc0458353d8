"""When has a run had its share?

A budget is an amount of one unit: `images` that went through a network (summed over experts), `train_flops` (counted,
`bench.flops`) or `device_seconds` (summed over devices; evaluation, checkpoints and compilation excluded). Steps
follow from it.
"""

from dataclasses import dataclass

from bench.config import BudgetConfig
from bench.flops import Cost


@dataclass(frozen=True)
class Budget:
    """The steps that a run gets; None where only the clock tells (`device_seconds`)."""

    num_steps: int | None
    device_seconds: float | None

    def progress(self, steps_done: int, device_seconds: float) -> float:
        """The part that is spent, in [0, 1]."""
        if self.num_steps is not None:
            return min(1.0, steps_done / self.num_steps)
        assert self.device_seconds is not None
        return min(1.0, device_seconds / self.device_seconds)


def plan(config: BudgetConfig, cost: Cost, batch_size: int, num_passes: int = 1) -> Budget:
    """Whole steps that come nearest to the budget; ValueError if they miss it by more than 1%."""
    if config.unit == "device_seconds":
        return Budget(None, config.amount)
    per_step = float(batch_size) if config.unit == "images" else cost.train_flops(batch_size, num_passes)
    num_steps = max(1, round(config.amount / per_step))
    if abs(num_steps * per_step - config.amount) > 0.01 * config.amount:
        raise ValueError(
            f"a budget of {config.amount:g} {config.unit} is not a whole number of steps of {per_step:g} within 1%: "
            f"choose a smaller train.batch_size or a budget.amount such as {num_steps * per_step:g}"
        )
    return Budget(num_steps, None)
