"""Which contestants are timed side by side, where not all of a group fit into memory?

Each with all its baselines if those fit, else with one after the other, else alone and without a ratio. While one runs,
the others hold their weights and states, and it alone has activations.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.throughput.contest import Contestant, baseline_of

SHARE_USED = 0.95  # of what is free


class Need(NamedTuple):
    """Bytes, in training: estimates."""

    peak: float  # while it runs
    held: float = 0.0  # while another does


def bytes_together(needs: Iterable[Need]) -> float:
    """At the peak of the one that needs most."""
    each = list(needs)
    return sum(need.held for need in each) + max((need.peak - need.held for need in each), default=0.0)


def pieces(
    contestants: Sequence[Contestant], against: Sequence[str], need: Callable[[Contestant], Need], free_bytes: float
) -> list[list[Contestant]]:
    """Every contestant is in one at least, and beside each of its baselines if the two of them fit; all in one if all fit."""

    def fits(some: Iterable[Contestant]) -> bool:
        return bytes_together(map(need, some)) <= SHARE_USED * free_bytes

    found: list[list[Contestant]] = []
    for contestant in contestants:
        beside = [each for each in contestants if each in {baseline_of(contestant, name) for name in against}]
        star = [contestant, *beside]
        pairs = [[contestant, each] for each in beside if fits([contestant, each])]
        for unit in [star] if fits(star) else pairs or [[contestant]]:
            _add(unit, found, fits)
    return [[each for each in contestants if each in piece] for piece in found]


def _add(unit: list[Contestant], found: list[list[Contestant]], fits: Callable[[Iterable[Contestant]], bool]) -> None:
    """To the last piece if it fits there; not at all if a piece has all of it."""
    if any(set(unit) <= set(piece) for piece in found):
        return
    if found and fits({*found[-1], *unit}):
        found[-1] = list({*found[-1], *unit})
    else:
        found.append(unit)
