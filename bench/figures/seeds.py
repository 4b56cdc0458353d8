"""How are the seeds of a method drawn: as their mean with its 95% interval or, with fewer than three, each by itself?"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bench.figures.style import Material, Shown
from bench.statistics import MIN_SEEDS, half_width

Curves = Iterable[tuple[Shown, pd.DataFrame]]  # of runs


def over_seeds(curves: Curves, at: Sequence[str], value: str) -> pd.DataFrame:
    """Columns: label, seeds, *at, value, half_width (of the 95% interval; NaN where there is none).

    With MIN_SEEDS seeds or more, the mean at each place that all of them have; with fewer, or if they have no place in common,
    the rows of each seed. `seeds` names those that a row is made of.
    """
    by_label: dict[str, list[tuple[int, pd.DataFrame]]] = {}
    for shown, curve in curves:
        if len(curve):
            by_label.setdefault(shown.label, []).append((int(shown.run.config["seed"]), curve))
    parts = []
    for label, of_seeds in by_label.items():
        mean = _mean([curve for _, curve in of_seeds], at, value) if len(of_seeds) >= MIN_SEEDS else None
        if mean is not None and len(mean):
            parts.append(mean.assign(label=label, seeds=" ".join(str(seed) for seed, _ in of_seeds)))
        else:
            parts += [c[[*at, value]].assign(half_width=np.nan, label=label, seeds=str(seed)) for seed, c in of_seeds]
    columns = ["label", "seeds", *at, value, "half_width"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def draw_lines(axes: Axes, table: pd.DataFrame, material: Material, x: str, y: str, **look: Any) -> None:
    """Each mean with its interval as a band, or each seed, of a table as from `over_seeds`; a label is named once."""
    looks = {shown.label: shown for shown in material.one_per_label()}
    named: set[str] = set()
    for (label, _), rows in table.groupby(["label", "seeds"], sort=False):
        shown = looks[str(label)]
        name = f"_{label}" if label in named else str(label)  # what begins with _ is left out of legends
        named.add(str(label))
        axes.plot(rows[x], rows[y], color=shown.colour, linestyle=shown.line, label=name, **look)
        if rows["half_width"].notna().any():
            low, high = rows[y] - rows["half_width"], rows[y] + rows["half_width"]
            axes.fill_between(rows[x], low, high, color=shown.colour, alpha=0.16, linewidth=0, zorder=1)


def seeds_sentence(table: pd.DataFrame) -> str:
    """For captions: what a line or a point stands for."""
    counts = {len(str(seeds).split()) for seeds in table["seeds"]} - {1}
    if not counts:
        several = table.groupby("label")["seeds"].nunique().max() > 1
        return "Each seed is shown by itself." if several else "One seed each."
    number = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    rest = " Where there are fewer than three seeds, each is shown by itself." if (table["half_width"].isna()).any() else ""
    return f"Mean over {number} seeds with its 95% interval (Student's t).{rest}"


def _mean(curves: Sequence[pd.DataFrame], at: Sequence[str], value: str) -> pd.DataFrame:
    together = pd.concat([curve[[*at, value]].dropna() for curve in curves]).groupby(list(at))[value]
    rows = [(place, float(own.mean()), half_width(list(own))) for place, own in together if len(own) == len(curves)]
    places = pd.DataFrame([place for place, _, _ in rows], columns=list(at))
    return places.assign(**{value: [mean for _, mean, _ in rows], "half_width": [width for _, _, width in rows]})
