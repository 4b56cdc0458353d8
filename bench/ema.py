"""Which average of the weights is sampled and scored?

An exponential moving average with a half-life in images and a warm-up: `half-life = min(half_life, warmup * images
seen)`, so that short runs are averaged over a like part of their training. Only parameters that got a gradient are
averaged, by the images that they have seen: experts that train apart are averaged on their own updates.
"""

from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench import switches
from bench.distributed import local


class EMA:
    """Averages of a module's trainable parameters, in images. half_life_images = 0: the weights themselves."""

    def __init__(self, module: nn.Module, half_life_images: float, warmup: float) -> None:
        if half_life_images < 0 or warmup < 0:
            raise ValueError(f"EMA half-life {half_life_images} and warm-up {warmup} must not be negative")
        self.half_life_images, self.warmup = half_life_images, warmup
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.images_seen = dict.fromkeys(self.parameters, 0)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if half_life_images else {}

    @torch.no_grad()
    def update(self, num_images: int, others: Container[nn.Parameter] = ()) -> None:
        """Take in the parameters that have a gradient, and the `others`, after `num_images` more images."""
        by_images: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None or parameter in others:
                self.images_seen[name] += num_images
                by_images[self.images_seen[name]].append(name)
        if not self.averages:
            return
        for images_seen, names in by_images.items():
            weight = 1 - self.decay(num_images, images_seen)
            averages = [local(self.averages[n]) for n in names]
            parameters = [local(self.parameters[n]) for n in names]
            if switches.is_on("ema"):
                torch._foreach_lerp_(averages, parameters, weight)
            else:
                for average, p in zip(averages, parameters, strict=True):
                    average.lerp_(p, weight)

    def decay(self, num_images: int, images_seen: int) -> float:
        """How much of the average remains after `num_images` more images, `images_seen` in all."""
        half_life = min(self.half_life_images, self.warmup * images_seen) if self.warmup else self.half_life_images
        return float(0.5 ** (num_images / half_life))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds its averages (storage is swapped, nothing is copied; of sharded parameters the contents)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            parameter = self.parameters[name]
            if isinstance(parameter, DTensor):  # FSDP gathers from the storage that it knows
                own, kept = local(parameter), local(parameter).clone()
                own.copy_(local(average))
                local(average).copy_(kept)
                continue
            parameter.data, self.averages[name] = average, parameter.data

    def state(self) -> dict[str, Tensor]:
        return self.averages

    def load(self, averages: dict[str, Tensor], images_seen: dict[str, int]) -> None:
        """Continue from a saved state; names must be those of the module."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.images_seen = dict(images_seen)
