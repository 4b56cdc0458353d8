"""How fast does each method train and sample, and how much memory does it need?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bench.figures.seeds import over_seeds, seeds_sentence
from bench.figures.style import Drawn, Material, Shown, new_figure, short_label
from bench.tables.notes import side_by_side
from bench.tidy import tidy

PANELS = (
    ("train_images_per_second", 1.0, "training (images/s)"),
    ("sample_images_per_second", 1.0, "sampling (images/s)"),
    ("peak_memory_bytes", 1e9, "peak memory in training (GB)"),
)
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")
SIDE_BY_SIDE = {
    True: "Some of these runs ran side by side on one machine, which slows all of them: differences may come from that.",
    False: "No two of these runs were seen to train at the same time.",
    None: "Whether runs ran side by side on one machine is not known.",
}
MEMORY = " Peak memory is that of the whole process on a CPU, and of what was allocated on a GPU."


def throughput(material: Material) -> list[Drawn]:
    """Bars per method: training and sampling images per second, peak memory."""
    measured = [(shown, _measured(shown)) for shown in material.shown if shown.run.summary]
    panels = [panel for panel in PANELS if any(own[panel[0]].notna().any() for _, own in measured)]
    if not panels:
        return []
    labels = list(dict.fromkeys(shown.label for shown, _ in measured))
    figure = new_figure(3.1 * len(panels) + 1.8, 0.34 * len(labels) + 1.4)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    tables = []
    for axes, (metric, divisor, title) in zip(all_axes, panels, strict=True):
        table = over_seeds([(shown, own.dropna(subset=[metric])) for shown, own in measured], ["unit"], metric)
        _bars(axes, table.assign(value=table[metric] / divisor, half_width=table["half_width"] / divisor), labels, material)
        axes.set_title(title)
        tables.append(table.rename(columns={metric: "value"}).assign(panel=metric))
    all_axes[0].set_yticks(range(len(labels)), [short_label(label, 26) for label in labels])
    all_axes[0].set_ylim(len(labels) - 0.45, -0.55)
    together = side_by_side(tidy(shown.run for shown, _ in measured))
    figure.suptitle("Throughput and memory" + {True: " (some runs ran side by side)", False: "", None: ""}[together])
    devices = sorted({str(shown.run.provenance.get("device") or "an unknown device") for shown, _ in measured})
    data = pd.concat(tables, ignore_index=True)[["panel", "label", "seeds", "value", "half_width"]]
    caption = (
        f"Measured on {', '.join(devices)}, training without evaluation, checkpoints and compilation. {seeds_sentence(data)} "
        f"{SIDE_BY_SIDE[together]}{MEMORY if 'peak_memory_bytes' in set(data['panel']) else ''}"
    )
    return [Drawn("throughput", figure, data, caption)]


def _measured(shown: Shown) -> pd.DataFrame:
    """One row; `unit` is the same for all runs, so that seeds are averaged."""
    summary, scores = shown.run.summary, shown.run.evaluations[-1:]
    sampling: Any = scores[0].get("sample_images_per_second") if scores else None
    values = {"unit": 0, "sample_images_per_second": sampling}
    values |= {metric: summary.get(metric) for metric in ("train_images_per_second", "peak_memory_bytes")}
    return pd.DataFrame([values]).astype("float64")


def _bars(axes: Axes, table: pd.DataFrame, labels: Sequence[str], material: Material) -> None:
    """A bar up to the mean, written at its foot; the 95% interval as a whisker or, with fewer than three seeds, their points."""
    looks = {shown.label: shown for shown in material.one_per_label()}
    most = (table["value"] + table["half_width"].fillna(0)).max()
    for place, label in enumerate(labels):
        own = table[table["label"] == label]
        if own.empty:
            axes.text(0, place, " –", va="center")
            continue
        mean, half_width = own["value"].mean(), own["half_width"].iloc[0]
        hatch = HATCHES[list(looks).index(label) % len(HATCHES)]
        axes.barh(place, mean, height=0.68, color=looks[label].colour, alpha=0.75, hatch=hatch, edgecolor="white", linewidth=0)
        end = mean
        if np.isfinite(half_width):
            axes.errorbar(mean, place, xerr=half_width, color="black", linewidth=1.0, capsize=2.5)
            end = mean + half_width
        elif len(own) > 1:
            axes.plot(own["value"], [place] * len(own), linestyle="", marker="|", color="black", markersize=8)
            end = own["value"].max()
        axes.text(end + 0.02 * most, place, f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}", va="center", fontsize=8)
    axes.set_xlim(0, 1.2 * most)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
