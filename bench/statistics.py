"""How sure is a number? Means over seeds, their 95% intervals, differences at equal seeds, and which of several is best.

Intervals are Student's t over seeds and need three of them: with fewer, the points themselves are shown.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

MIN_SEEDS = 3  # for an interval


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean; 0 with fewer than MIN_SEEDS values, for which no interval is given."""
    if len(values) < MIN_SEEDS:
        return 0.0
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(stdtrit(len(values) - 1, 0.975)) * standard_error


def paired_differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """seed -> value minus the baseline's, for the seeds that both have."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}


def excludes_zero(values: Sequence[float]) -> bool:
    """Whether there is an interval, and zero lies outside it."""
    return len(values) >= MIN_SEEDS and abs(float(np.mean(values))) > half_width(values)


def rank(means: Sequence[float], widths: Sequence[float], texts: Sequence[str], lower_is_better: bool) -> list[str]:
    """A mark for each: best, second or none.

    The best mean is best, and with it those written alike and those whose mean lies within its interval (`widths` are half of
    them); the best mean of the rest is second, in the same way. A wide interval of one's own earns no mark.
    """
    marks = [""] * len(means)
    for mark in ("best", "second"):
        left = [i for i in range(len(means)) if not marks[i]]
        if not left or len(means) < 2:
            break
        holder = min(left, key=lambda i: means[i] if lower_is_better else -means[i])
        for i in left:
            if texts[i] == texts[holder] or abs(means[i] - means[holder]) <= widths[holder]:
                marks[i] = mark
    return marks
