"""How is a number written in a table: with which unit, how many decimals, and how many of its seeds?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Style(NamedTuple):
    """Values are divided by `divisor` and written with `decimals`; `unit` is what the heading then says."""

    divisor: float = 1.0
    decimals: int = 0
    unit: str = ""


def si_style(values: Sequence[float], unit: str = "") -> Style:
    """Three significant digits for a typical value, in the thousands that make the largest at least 1."""
    largest = max((abs(value) for value in values), default=0.0)
    divisor, prefix = next(((size, prefix) for size, prefix in PREFIXES if largest >= size), (1.0, ""))
    return Style(divisor, _decimals(values, divisor), prefix + unit)


def significant_style(values: Sequence[float], digits: int) -> Style:
    return Style(1.0, _decimals(values, 1.0, digits))


def write_number(value: float, style: Style) -> str:
    text = f"{value / style.divisor:,.{style.decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text  # no minus before a rounded zero


def write_seeds(values: Sequence[float], style: Style) -> str:
    """One seed: the value; two: both; more: the mean and the half-width of its 95% interval."""
    texts = [write_number(value, style) for value in values]
    if len(values) < 3:
        return " / ".join(texts)
    return f"{write_number(float(np.mean(values)), style)} ± {write_number(half_width(values), style)}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean, by Student's t; 0 with fewer than three values, for which no interval is given."""
    if len(values) < 3:
        return 0.0
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(stdtrit(len(values) - 1, 0.975)) * standard_error


def rank(means: Sequence[float], widths: Sequence[float], texts: Sequence[str], lower_is_better: bool) -> list[str]:
    """A mark for each: best, second or none. Those written alike, or within the interval of a place's holder, share its mark."""
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


def _decimals(values: Sequence[float], divisor: float, digits: int = 3) -> int:
    sizes = sorted(abs(value) / divisor for value in values if value)
    if not sizes:
        return 0
    typical = sizes[len(sizes) // 2]
    return max(0, min(4, digits - 1 - math.floor(math.log10(typical))))
