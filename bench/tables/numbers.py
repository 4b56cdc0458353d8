"""How is a number written in a table: with which unit, how many decimals, and how many of its seeds?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.statistics import MIN_SEEDS, half_width

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


def write_number(value: float, style: Style, signed: bool = False) -> str:
    """`signed`: with a plus before what is above zero."""
    text = f"{value / style.divisor:{'+' if signed else ''},.{style.decimals}f}"
    return text[1:] if text[0] in "+-" and not text.strip("+-0.,") else text  # no sign before a rounded zero


def write_seeds(values: Sequence[float], style: Style, signed: bool = False) -> str:
    """One seed: the value; two: both; more: the mean and the half-width of its 95% interval."""
    if len(values) < MIN_SEEDS:
        return " / ".join(write_number(value, style, signed) for value in values)
    return f"{write_number(float(np.mean(values)), style, signed)} ± {write_number(half_width(values), style)}"


def _decimals(values: Sequence[float], divisor: float, digits: int = 3) -> int:
    sizes = sorted(abs(value) / divisor for value in values if value)
    if not sizes:
        return 0
    typical = sizes[len(sizes) // 2]
    return max(0, min(4, digits - 1 - math.floor(math.log10(typical))))
