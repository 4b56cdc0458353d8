"""How much noise is there at each timestep, and which timesteps does a sampler visit?

T timesteps, t = 0 the cleanest; `betas` are the variances added step by step. "abar" in comments is the running
product of 1 - beta. Everything is computed in float64; `table[index]` hands out float32.

    linear schedule             DDPM, arXiv 2006.11239, section 4
    cosine schedule             improved DDPM, arXiv 2102.09672, eq. 17
    posterior q(x_{t-1} | x_t, x0)  DDPM, eq. 7
    fewer steps                 improved DDPM, section 4; "ddimS" as in DDIM, arXiv 2010.02502, appendix D.2 (linear)
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from bench.method import check_choice

SCHEDULES = ("linear", "cosine")


class Table:
    """One number per step: `values` (S,), float64 or int64 on the CPU.

    `table[index]` with index (B,) int64 is float32 (B, 1, 1, 1), ready to multiply images, or int64 (B,) for a table of
    integers; on the index's device. The cast table is kept per device: after the first lookup, none copies or waits.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._on_device: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor) -> Tensor:
        if index.device not in self._on_device:
            cast = self.values.float() if self.values.is_floating_point() else self.values
            self._on_device[index.device] = cast.to(index.device)
        picked = self._on_device[index.device][index]
        return picked.view(-1, 1, 1, 1) if picked.is_floating_point() else picked


@dataclass(frozen=True, eq=False)
class Schedule:
    """A chain of S noise levels, all T of the full chain or some of them (`respace`).

    An `index` (B,) int64 counts the S levels; the network is given `timesteps[index]`, the timestep of the full chain.
    """

    betas: Table  # (S,)
    timesteps: Table  # (S,) int64, in 0..num_timesteps - 1
    num_timesteps: int  # T

    @property
    def num_steps(self) -> int:
        """S, the number of levels in this chain."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """abar: the share of the image in the variance of x_t."""
        return Table(torch.cumprod(1 - self.betas.values, dim=0))

    @cached_property
    def alphas_cumprod_prev(self) -> Table:
        """abar of the next cleaner level; 1 for the first."""
        return Table(torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod.values[:-1]]))

    @cached_property
    def sqrt_alphas_cumprod(self) -> Table:
        return Table(self.alphas_cumprod.values.sqrt())

    @cached_property
    def sqrt_alphas_cumprod_prev(self) -> Table:
        return Table(self.alphas_cumprod_prev.values.sqrt())

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Table:
        return Table((1 - self.alphas_cumprod.values).sqrt())

    @cached_property
    def one_minus_alphas_cumprod_prev(self) -> Table:
        return Table(1 - self.alphas_cumprod_prev.values)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Table:
        return Table((1 / self.alphas_cumprod.values).sqrt())

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Table:
        return Table((1 / self.alphas_cumprod.values - 1).sqrt())

    @cached_property
    def log_betas(self) -> Table:
        return Table(self.betas.values.log())

    @cached_property
    def posterior_variance(self) -> Table:
        """Variance of q(x_{t-1} | x_t, x0), eq. 7; 0 at the first level."""
        before, here = self.alphas_cumprod_prev.values, self.alphas_cumprod.values
        return Table(self.betas.values * (1 - before) / (1 - here))

    @cached_property
    def posterior_log_variance_clipped(self) -> Table:
        """Its logarithm; the first level, where the variance is 0, takes the second's."""
        return Table(_first_from_second(self.posterior_variance.values).log())

    @cached_property
    def posterior_mean_coef1(self) -> Table:
        """What x0 is multiplied with in the mean of q(x_{t-1} | x_t, x0), eq. 7."""
        before, here = self.alphas_cumprod_prev.values, self.alphas_cumprod.values
        return Table(self.betas.values * before.sqrt() / (1 - here))

    @cached_property
    def posterior_mean_coef2(self) -> Table:
        """What x_t is multiplied with in the mean of q(x_{t-1} | x_t, x0), eq. 7."""
        before, here = self.alphas_cumprod_prev.values, self.alphas_cumprod.values
        return Table((1 - self.betas.values).sqrt() * (1 - before) / (1 - here))

    @cached_property
    def large_variance(self) -> Table:
        """beta, but the first level takes the second's posterior variance, as its decoder needs a small one."""
        return Table(torch.cat([self.posterior_variance.values[1:2], self.betas.values[1:]]))

    @cached_property
    def large_log_variance(self) -> Table:
        return Table(self.large_variance.values.log())

    @cached_property
    def snr(self) -> Table:
        """Signal-to-noise ratio abar / (1 - abar)."""
        return Table(self.alphas_cumprod.values / (1 - self.alphas_cumprod.values))


def make_schedule(name: str, num_timesteps: int = 1000) -> Schedule:
    """The full chain: `"linear"` (betas from 1e-4 to 2e-2, times 1000/T) or `"cosine"` (betas of at most 0.999).

    Raises ValueError for another name, for T < 2, and for a linear chain so short that a beta reaches 1 (T <= 20).
    """
    check_choice("noise schedule", name, SCHEDULES)
    if num_timesteps < 2:
        raise ValueError(f"a noise schedule of {num_timesteps} timesteps was asked for: choose at least 2")
    if name == "linear":
        scale = 1000 / num_timesteps
        if scale * 2e-2 >= 1:
            raise ValueError(
                f"the linear schedule over {num_timesteps} timesteps needs a beta of {scale * 2e-2:g}, and betas stay below 1: "
                "choose more than 20 timesteps, or the cosine schedule"
            )
        betas = torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=torch.float64)
    else:
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    return Schedule(Table(betas), Table(torch.arange(num_timesteps)), num_timesteps)


def respace(schedule: Schedule, steps: str | int) -> Schedule:
    """The chain that visits only some levels of `schedule`, with the same abar at those.

    steps: `"250"`, that many spread evenly, first and last included; `"100,50,10"`, the chain cut into equal sections
    (the first ones longer by one if need be) and each spread so; `"ddim50"`, every n-th level from the first, for the
    integer n that gives exactly 50. Raises ValueError if `steps` reads otherwise, asks for fewer than 2 levels or for
    more than there are, or if no stride gives the number asked for.
    """
    kept = _kept_levels(str(steps), schedule.num_steps)
    abar = schedule.alphas_cumprod.values[kept]
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return Schedule(Table(1 - abar / before), Table(schedule.timesteps.values[kept]), schedule.num_timesteps)


def _kept_levels(steps: str, available: int) -> list[int]:
    """Indices of the levels that `steps` keeps, ascending."""
    strided = steps.startswith("ddim")
    counts = [int(part) if part.isdecimal() else 0 for part in steps.removeprefix("ddim").split(",")]
    if min(counts) < 1 or sum(counts) < 2 or (strided and len(counts) > 1):
        raise ValueError(
            f"sampling steps {steps!r} cannot be read: give a number of at least 2 (250), "
            "one for each section of the chain (100,50,10), or ddim and a number (ddim50)"
        )
    if strided:
        return _strided(counts[0], available)
    kept, start = [], 0
    shortest, num_longer = divmod(available, len(counts))
    for section, count in enumerate(counts):
        length = shortest + (section < num_longer)
        if count > length:
            raise ValueError(
                f"sampling steps {steps!r} ask for {count} of the {length} timesteps in section {section + 1}: "
                f"choose at most {length} there"
            )
        # a section of which one level is kept keeps its first; the strides are summed one by one, as improved DDPM and all that
        # descend from it do: for an odd count, ties (x.5) would otherwise round to another timestep than the literature's
        stride = (length - 1) / max(count - 1, 1)
        kept += [start + round(place) for place in accumulate([stride] * (count - 1), initial=0.0)]
        start += length
    return kept


def _strided(count: int, available: int) -> list[int]:
    for stride in range(1, available):
        if len(range(0, available, stride)) == count:
            return list(range(0, available, stride))
    possible = sorted({len(range(0, available, stride)) for stride in range(1, available)})
    nearest = min(possible, key=lambda number: abs(number - count))
    raise ValueError(
        f"sampling steps 'ddim{count}' cannot be had: no integer stride visits exactly {count} of {available} timesteps; "
        f"the nearest number that works is ddim{nearest}"
    )


def _first_from_second(values: Tensor) -> Tensor:
    return torch.cat([values[1:2], values[1:]])
