"""How fast is each contestant of `tsbench throughput`, and how much faster than its baselines?"""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from bench.figures.style import COLOURS, Drawn, new_figure, short_label

LOOKS = {"ours": COLOURS[1], "naive": "#b0b0b0"}


def speed(frame: pd.DataFrame, name: str) -> list[Drawn]:
    """Bars of images/s for each thing that was timed, ours and plain side by side, with whiskers at the quartiles.

    No figure where nothing could be timed. `frame` has a row of each contestant and measure, as the CSV.
    """
    timed = _once(frame[frame["step_seconds"].notna()].fillna({"beside": "", "method": ""}))
    if timed.empty:
        return []
    alike = (
        timed.loc[timed["code"] == "ours", "compile"].nunique() < 2
    )  # then plain code stands beside ours, and the title says it
    data = timed.assign(contestant=[_contestant(row, alike) for _, row in timed.iterrows()])
    return _parts(data, name) if (data["method"] == "").all() else [_methods(data, name)]


def _once(timed: pd.DataFrame) -> pd.DataFrame:
    """Of a baseline that was timed beside several methods, its own rows if it has some, else the first."""
    borrowed = (timed["beside"] != "") & (timed["beside"] != timed["method"])
    same = ["what", "method", "code", "size", "batch_size", "precision", "compile"]
    return pd.concat([timed[~borrowed], timed[borrowed]]).drop_duplicates(same).sort_index().reset_index(drop=True)


def _methods(data: pd.DataFrame, name: str) -> Drawn:
    """A panel for each measure."""
    kinds, rows = list(data["what"].unique()), list(data["contestant"].unique())
    figure = new_figure(3.6 * len(kinds) + 2.2, (0.22 * data["code"].nunique() + 0.16) * len(rows) + 1.3)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        of_kind = data[data["what"] == kind]
        _bars(axes, of_kind, rows, "images_per_second")
        axes.set_title(kind)
        axes.set_xlabel(_unit(of_kind))
        _dress(axes, rows)
    how = set(data.loc[data["code"] == "ours", "compile"])
    compiled = f", ours compiled: {how.pop()}" if len(how) == 1 and how != {"none"} else ""
    figure.suptitle(f"Throughput on {data['device'].iloc[0]}{compiled}")
    return Drawn(name, figure, None)


def _unit(data: pd.DataFrame) -> str:
    if "sampling_steps" not in data or data["sampling_steps"].isna().all():
        return "images/s"
    guided = "" if (data["guidance_scale"] == 1).all() else "guided "
    return f"images/s of {data['sampling_steps'].max():g} {guided}steps"


def _parts(data: pd.DataFrame, name: str) -> list[Drawn]:
    """How many times as fast as plain code each part is, of those that were timed beside it."""
    compared = data[(data["code"] == "ours") & data["speed_over_naive"].notna()]
    if compared.empty:
        return []
    ours = compared.assign(contestant=lambda of: of["what"] + ", " + of["contestant"])
    rows = list(ours["contestant"])
    figure = new_figure(6.2, 0.36 * len(rows) + 1.3)
    axes = figure.subplots()
    _bars(axes, ours, rows, "speed_over_naive")
    _double(axes, ours["speed_over_naive"])
    axes.set_xlabel("times as fast as plain code in the same run")
    _dress(axes, rows)
    figure.suptitle(f"Parts on {data['device'].iloc[0]}")
    return [Drawn(name, figure, None)]


def _double(axes: Axes, ratios: pd.Series) -> None:
    """Show ratios as doublings, by bars that begin at 1: a loader's would dwarf all others."""
    for bar in axes.containers[0]:
        bar.set_bounds(1, bar.get_y(), bar.get_width() - 1, bar.get_height())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(1, ratios.min()) / 1.1, 2 * ratios.max())
    axes.axvline(1, color="black", linewidth=1)


def _bars(axes: Axes, data: pd.DataFrame, rows: list[str], column: str) -> None:
    codes = [code for code in LOOKS if code in set(data["code"])]
    looks = {"hue": "code", "hue_order": codes, "palette": LOOKS, "dodge": True, "errorbar": None}
    sns.barplot(data, y="contestant", x=column, order=rows, ax=axes, **looks)
    height = 0.8 / len(codes)
    for _, row in data.iterrows():
        place = rows.index(row["contestant"]) + (codes.index(row["code"]) - (len(codes) - 1) / 2) * height
        low, high = _quartiles(row, column)
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([low, high], [place, place], color="black", linewidth=1.2, solid_capstyle="butt")
        axes.text(max(high, row[column]) * 1.02, place, _written(row[column]), va="center", fontsize=7)
    axes.set_xlim(0, 1.25 * data[column].max())


def _dress(axes: Axes, rows: list[str]) -> None:
    axes.set_yticks(range(len(rows)), [short_label(row, 40) for row in rows])
    axes.set_ylabel("")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if legend := axes.get_legend():
        legend.set_title("")
        legend.set_visible(len(legend.get_texts()) > 1)


def _quartiles(row: Any, column: str) -> tuple[float, float]:
    """Of a ratio as they were measured; of images/s, which fall as the seconds of a step rise, from those."""
    if f"{column}_low" in row:
        return float(row[f"{column}_low"]), float(row[f"{column}_high"])
    scale = row[column] * row["step_seconds"]
    return scale / row["step_seconds_high"], scale / row["step_seconds_low"]


def _written(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _contestant(row: Any, alike: bool) -> str:
    compiled = "" if alike or row["compile"] == "none" else f"compiled: {row['compile']}"
    words = (row["method"], row["size"], f"batch {row['batch_size']}", row["precision"], compiled)
    return " ".join(str(word) for word in words if word)
