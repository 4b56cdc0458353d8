"""How do figures look, so that a method is recognised in all of them, in grey and by the colour-blind too?"""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.files import write_bytes_atomically
from bench.runs import Run
from bench.tidy import distinct_labels

COLOURS = (
    *("#4d4d4d", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8b6f00"),
    *("#332288", "#882255", "#44aa99", "#a6761d"),
)
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2, 1, 2, 1, 2)), (0, (2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "viridis"  # its lightness is monotone, so it can be read in grey
LEGEND_LINE_INCHES = 0.195
TIMESTEP = "timestep (0: almost no noise)"
SETTINGS: dict[str, Any] = {
    "pdf.fonttype": 42,  # embed TrueType fonts, so that text stays text
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "lines.linewidth": 1.6,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "grid.color": "#e4e4e4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,  # inches
    "figure.constrained_layout.h_pad": 0.06,
}


@dataclass(frozen=True)
class Shown:
    """A run with its name and look, the same in every figure; runs that differ in their seed only share both."""

    run: Run
    label: str
    colour: str
    line: Any
    marker: str


@dataclass(frozen=True)
class Material:
    """All that the figures are made from. `shown` is in the suite's order, then by seed."""

    shown: tuple[Shown, ...]
    floor: Mapping[str, Any] | None = None
    real_images: np.ndarray | None = None  # (n, H, W, C) uint8, image i of class i mod num_classes
    class_names: Sequence[str] = ()
    baseline: str = ""  # the label that the others are compared with, if it is among them

    def one_per_label(self) -> list[Shown]:
        """The first seed of each: for what cannot be averaged over seeds."""
        return list({shown.label: shown for shown in reversed(self.shown)}.values())[::-1]


class Drawn(NamedTuple):
    name: str
    figure: Figure
    data: pd.DataFrame | None  # what it shows
    caption: str = ""  # what to see, and how it was computed; in a sentence or two


def dress(runs: Iterable[Run], suite: Mapping[str, Any]) -> tuple[Shown, ...]:
    """Gives each run its name and look: the colour from the suite, lines and markers by the place in the suite.

    So a method keeps its look whatever else is shown. What the suite does not name comes after, by name.
    """
    runs = list(runs)
    labels = distinct_labels((run.label, run.options) for run in runs)
    entries = suite.get("methods", [])
    order = [str(entry.get("label") or entry["method"]) for entry in entries]
    colours = {label: entry["colour"] for label, entry in zip(order, entries, strict=True) if "colour" in entry}
    spare = [colour for colour in COLOURS if colour not in colours.values()] or COLOURS

    def place(run: Run) -> tuple[int, str, int]:
        position = order.index(run.label) if run.label in order else len(order)
        return position, labels[run.label, run.options], int(run.config["seed"])

    runs.sort(key=place)
    names = list(dict.fromkeys([*order, *(labels[run.label, run.options] for run in runs)]))
    uncoloured = [name for name in names if name not in colours]
    shown = []
    for run in runs:
        label = labels[run.label, run.options]
        i = names.index(label)
        colour = colours[label] if label in colours else spare[uncoloured.index(label) % len(spare)]
        shown.append(Shown(run, label, colour, LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]))
    return tuple(shown)


def settings() -> AbstractContextManager[None]:
    """Within it, matplotlib draws in this style, whatever the user's own settings are."""
    chosen: Any = dict(matplotlib.rcParamsDefault) | sns.axes_style("ticks") | SETTINGS | {"backend": "agg"}
    return matplotlib.rc_context(chosen)


def new_figure(width: float, height: float) -> Figure:
    """Inches. Not known to pyplot, so nothing has to be closed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(drawn: Drawn, pdf: bool = True) -> dict[str, bytes]:
    """File name -> content: PNG at 150 dpi, unless not `pdf` a PDF with its fonts and, if any, the CSV of what is shown.

    The same figure gives the same bytes.
    """
    drawn.figure.draw_without_rendering()
    drawn.figure.set_layout_engine("none")  # the layout stays, and is not worked out again for each format
    files = {}
    formats = {"png": {"Software": None}} | ({"pdf": {"CreationDate": None, "Producer": None, "Creator": None}} if pdf else {})
    for suffix, metadata in formats.items():
        buffer = io.BytesIO()
        drawn.figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
        files[f"{drawn.name}.{suffix}"] = buffer.getvalue()
    return files | data_file(drawn)


def save(drawn: Drawn, folder: Path) -> list[Path]:
    """The files of `render` in a folder."""
    files = render(drawn)
    for name, content in files.items():
        write_bytes_atomically(folder / name, content)
    return [folder / name for name in files]


def data_file(drawn: Drawn) -> dict[str, bytes]:
    """Only the CSV of what is shown; empty for pictures."""
    if drawn.data is None:
        return {}
    return {f"{drawn.name}.csv": drawn.data.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()}


def names_for(name: str, shown: Sequence[Shown]) -> list[str]:
    """File names for a figure that is made once per label: the plain name if there is only one, else with the label."""
    if len(shown) == 1:
        return [name]
    names: list[str] = []
    for each in shown:
        short = re.sub("[^a-z0-9]+", "_", each.label.lower()).strip("_") or "unnamed"
        same = sum(re.fullmatch(rf"{name}_{short}(_again\d+)?", other) is not None for other in names)
        names.append(f"{name}_{short}" + f"_again{same}" * bool(same))
    return names


def short_label(label: str, width: int = 34) -> str:
    """Over two lines if it is long: for legends and rows."""
    return "\n".join(textwrap.wrap(label, width, break_long_words=False)) if len(label) > width else label


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0..count-1, evenly spread, the first and the last among them: for what has room for a few only."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def image_axis(axes: Axes, most: float) -> None:
    """A horizontal axis of images seen, in thousands or millions."""
    divisor, unit = (1e6, "millions") if most >= 2e6 else (1e3, "thousands")
    axes.set_xlabel(f"training images ({unit})")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:g}"))
    axes.set_xlim(0, most)


def log_loss_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis with plain numbers, also between the decades where there are fewer than two.

    It spans the lines. An interval may go beyond it: on this axis, one that reaches zero has no end.
    """
    axes.set_yscale("log")
    axes.set_ylabel(label)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = values.min(), values.max()
    margin = max((high / low) ** 0.06, 1.05)
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    decades = np.log10(high / low)
    named = (2, 3, 5) if decades < 1.3 else (2, 5) if decades < 2.3 else ()
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _leading(value) in named else ""))


def legend_beside(figure: Figure, axes: Axes) -> None:
    """One legend for the figure, to the right of everything; with many labels the figure becomes as high as they are."""
    handles, labels = axes.get_legend_handles_labels()
    shown = [short_label(label) for label in labels]
    num_lines = sum(1 + label.count("\n") for label in shown)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, LEGEND_LINE_INCHES * num_lines + 0.2))
    figure.legend(handles, shown, loc="outside right upper", handlelength=3.6)


def _leading(value: float) -> int:
    return round(value / 10 ** np.floor(np.log10(value) + 1e-9))
