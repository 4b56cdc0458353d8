"""Which timesteps belong to which expert?

The noise schedule has T timesteps, t = 0 the cleanest. A method may split them into E intervals and give each to a
network of its own; a method that does not split has one interval.
"""

import random
from functools import lru_cache
from typing import NamedTuple


class Interval(NamedTuple):
    """Timesteps `start <= t < stop`, the `index`-th of a partition of 0..T-1."""

    index: int  # type: ignore[assignment]  # it hides tuple.index, which nobody needs here
    start: int
    stop: int

    def __contains__(self, t: object) -> bool:
        return isinstance(t, int) and self.start <= t < self.stop

    @property
    def length(self) -> int:
        return self.stop - self.start


def partition(count: int, num_timesteps: int = 1000) -> tuple[Interval, ...]:
    """Split 0..T-1 into `count` intervals whose lengths differ by at most one: `start = i*T // count`.

    Raises ValueError unless 1 <= count <= num_timesteps.
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(
            f"cannot split {num_timesteps} timesteps into {count} intervals: choose a count from 1 to {num_timesteps}"
        )
    edges = [i * num_timesteps // count for i in range(count + 1)]
    return tuple(Interval(i, edges[i], edges[i + 1]) for i in range(count))


def interval_of(t: int, intervals: tuple[Interval, ...]) -> Interval:
    """The interval that holds timestep `t`; ValueError if none does."""
    for interval in intervals:
        if t in interval:
            return interval
    raise ValueError(f"timestep {t} lies outside 0..{intervals[-1].stop - 1}")


def interval_at_step(step: int, intervals: tuple[Interval, ...], seed: int) -> Interval:
    """The interval of the draw of that number (from 0), that of an optimiser step where each trains one: seeded shuffled cycles
    of as many draws as intervals.

    Of a `partition` each interval appears once a cycle, so counts never differ by more than one (where E does not divide
    T, the timesteps of intervals that are shorter by one come up that much more often). Intervals of other lengths are
    drawn in proportion to them. The answer depends on (step, seed) alone, so an expert trained in a job of its own sees
    the same steps.
    """
    cycle, place = divmod(step, len(intervals))
    return intervals[_cycle(cycle, tuple(i.stop for i in intervals), seed)[place]]


def steps_per_interval(num_steps: int, intervals: tuple[Interval, ...], seed: int) -> list[int]:
    """How many of the first `num_steps` optimiser steps train each interval."""
    counts = [0] * len(intervals)
    for step in range(num_steps):
        counts[interval_at_step(step, intervals, seed).index] += 1
    return counts


@lru_cache(maxsize=8)
def _cycle(cycle: int, stops: tuple[int, ...], seed: int) -> tuple[int, ...]:
    lengths = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
    equal = max(lengths) - min(lengths) <= 1
    order = list(range(len(stops))) if equal else _systematic_sample(stops, _van_der_corput(cycle))
    random.Random(f"{seed}/interval cycle/{cycle}").shuffle(order)
    return tuple(order)


def _systematic_sample(stops: tuple[int, ...], offset: float) -> list[int]:
    """The intervals at the evenly spaced positions `(j + offset) * T / E`; offset in [0, 1)."""
    order, index = [], 0
    for j in range(len(stops)):
        while (j + offset) * stops[-1] / len(stops) >= stops[index]:
            index += 1
        order.append(index)
    return order


def _van_der_corput(n: int) -> float:
    """The n-th point of the base-2 low-discrepancy sequence in [0, 1): 0, 1/2, 1/4, 3/4, 1/8 ..."""
    value, weight = 0.0, 0.5
    while n:
        value += weight * (n & 1)
        n, weight = n >> 1, weight / 2
    return value
