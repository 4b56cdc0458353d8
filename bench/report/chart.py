"""How is a curve of one run drawn small, as SVG that takes the page's colours?"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 340.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 10.0, 34.0
MOST_POINTS = 80
STEPS = (1, 2, 5)


class Line(NamedTuple):
    """`kind`: the CSS class that says how it looks, and its name in the legend beside it."""

    kind: str
    name: str
    x: Sequence[float]
    y: Sequence[float]


def chart(lines: Sequence[Line], title: str, y_label: str) -> str:
    """Lines over the training images, on a logarithmic axis; empty if no line has a point above zero."""
    lines = [line for line in (_thinned(_positive(line)) for line in lines) if line.x]
    if not lines:
        return ""
    most = max(max(line.x) for line in lines) or 1.0
    low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
    low, high = low / 1.06, high * 1.06
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(_described(lines, title))}">',
        *(_y_tick(value, _place_y(value, low, high)) for value in _ticks(low, high)),
        *(_x_tick(most * part, _place_x(most * part, most)) for part in (0, 0.5, 1)),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 4:g}" text-anchor="middle">training images</text>',
        f'<text class="axis" x="12" y="{HEIGHT / 2 - 8:g}" transform="rotate(-90 12 {HEIGHT / 2 - 8:g})" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for line in lines:
        points = [(_place_x(x, most), _place_y(y, low, high)) for x, y in zip(line.x, line.y, strict=True)]
        parts.append(f'<polyline class="{line.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        if len(points) <= 20:
            parts += [f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
    return "".join([*parts, "</svg>"])


def _positive(line: Line) -> Line:
    kept = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if y > 0 and math.isfinite(y)]
    return line._replace(x=[x for x, _ in kept], y=[y for _, y in kept])


def _thinned(line: Line) -> Line:
    """At most MOST_POINTS of its points, the first and the last among them."""
    count = len(line.x)
    if count <= MOST_POINTS:
        return line
    kept = sorted({round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})
    return line._replace(x=[line.x[i] for i in kept], y=[line.y[i] for i in kept])


def _described(lines: Sequence[Line], title: str) -> str:
    ends = [f"{line.name}, from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines]
    return f"{title}: {'; '.join(ends)}"


def _place_x(value: float, most: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / most


def _place_y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (math.log(high) - math.log(value)) / (math.log(high) - math.log(low))


def _ticks(low: float, high: float) -> list[float]:
    """Round values between these: decades, or finer ones where there are fewer than three; else the ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), STEPS, range(1, 10)):
        found = [step * 10.0**exponent for exponent in range(first, last + 1) for step in steps]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside if len(inside) <= 6 else inside[:: -(-len(inside) // 6)]
    return [low * 1.06, high / 1.06]


def _y_tick(value: float, y: float) -> str:
    line = f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 5:g}" y="{y + 3.5:.1f}" text-anchor="end">{value:.3g}</text>'


def _x_tick(value: float, x: float) -> str:
    text = f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14:g}" text-anchor="middle">{text}</text>'
