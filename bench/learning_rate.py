"""How large is a step? One rule for all parameter groups of all methods."""

import math

from bench.config import TrainConfig


def lr_factor(config: TrainConfig, progress: float, images: int) -> float:
    """What every group's learning rate is multiplied by, after `images` images and a part `progress` of the budget."""
    warmup = min(1.0, (images + config.batch_size) / config.lr_warmup_images) if config.lr_warmup_images else 1.0
    if config.lr_schedule == "constant":
        return warmup
    return warmup * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))
