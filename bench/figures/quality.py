"""How good are the images for how much training, and for how much compute when they are sampled?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.figures.seeds import over_seeds, seeds_sentence
from bench.figures.style import Drawn, Material, Shown, legend_beside, new_figure
from bench.tables import shared_protocol
from bench.tidy import tidy

FIDS = (("fid_train", "FID against training images"), ("fid_heldout", "FID against held-out images"))
FRONT_LABEL = "Pareto front"
FLOOR_LABEL = "real against real data"
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
COUNTS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
TIMES = ((3600.0, "h"), (1.0, "s"))
FRONT = (
    "Pareto front: no other point shown has both a lower FID and a lower cost. Points before a run's end (small) have the "
    "averaged weights of that moment, whose learning rate was still on its way."
)
INITIAL = " Compute that was spent on initial weights is not counted."


class Cost(NamedTuple):
    """A cost on the horizontal axis; `name` is for titles. `scales`: the units that there are, the largest first."""

    metric: str
    name: str
    label: str
    scales: tuple[tuple[float, str], ...]
    unit: str = ""


COSTS = {
    "fid_vs_flops": Cost("train_flops", "training compute", "training compute", PREFIXES, "FLOPs"),
    "fid_vs_images": Cost("images_seen", "training images", "training images", COUNTS),
    "fid_vs_device_seconds": Cost("device_seconds", "training time", "training time, summed over devices", TIMES),
    "fid_vs_sampling_cost": Cost("macs_per_sample", "sampling cost", "network evaluations × MACs, per sample", PREFIXES, "MACs"),
}


def fid_vs(name: str) -> Callable[[Material], list[Drawn]]:
    """The figure of that name in COSTS: a panel per FID, with the front, and the floor of real data."""

    def draw(material: Material) -> list[Drawn]:
        points = scored_points(material)
        table = over_cost(points, COSTS[name].metric, at_the_end=name == "fid_vs_sampling_cost")
        return [_draw(name, COSTS[name], table, points, material)] if len(table) else []

    return draw


def scored_points(material: Material) -> list[tuple[Shown, pd.DataFrame]]:
    """Of every run that is done and scored: a row for each point of its curve and for its end, under the shared protocol.

    Columns: point (0, 1, ...; the last is the end), num_points, the metrics of COSTS and FIDS that are known, n, steps.
    """
    scored = [shown for shown in material.shown if shown.run.evaluations and shown.run.summary]
    if not scored:
        return []
    protocol = shared_protocol(tidy([shown.run for shown in scored], material.floor))
    return [(shown, rows) for shown in scored if len(rows := _points_of(shown, protocol))]


def over_cost(points: list[tuple[Shown, pd.DataFrame]], cost: str, at_the_end: bool = False) -> pd.DataFrame:
    """panel, label, seeds, point, cost, fid, half_width, is_end; empty if the cost is the same everywhere or not known.

    Costs are averaged over seeds like the FIDs.
    """
    rows = [(shown, own[own["point"] == own["num_points"] - 1] if at_the_end else own) for shown, own in points]
    rows = [(shown, own) for shown, own in rows if cost in own and own[cost].notna().all()]
    costs = np.concatenate([own[cost] for _, own in rows]) if rows else np.zeros(1)
    if costs.max() <= 1.01 * costs.min():
        return pd.DataFrame()
    at = ["point", "num_points"]
    parts = []
    for metric, _ in FIDS:
        having = [(shown, own) for shown, own in rows if metric in own and own[metric].notna().all()]
        where = over_seeds(having, at, cost).drop(columns="half_width")
        fid = over_seeds(having, at, metric).merge(where, on=["label", "seeds", *at])
        parts.append(fid.rename(columns={metric: "fid"}).assign(panel=metric))
    table = pd.concat([part for part in parts if len(part)], ignore_index=True) if any(map(len, parts)) else pd.DataFrame()
    if len(table):
        table = table.assign(is_end=table["point"] == table["num_points"] - 1)
        table = table[["panel", "label", "seeds", "point", cost, "fid", "half_width", "is_end"]]
    return table


def pareto_front(points: np.ndarray) -> np.ndarray:
    """points (n, 2), less is better in both -> the indices of those that no other beats, by the first coordinate."""
    front: list[int] = []
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if np.isfinite(points[i]).all() and (not front or points[i, 1] < points[front[-1], 1]):
            front.append(int(i))
    return np.array(front, dtype=int)


def _points_of(shown: Shown, protocol: str) -> pd.DataFrame:
    summary = shown.run.summary
    end = [(record, summary) for record in shown.run.evaluations if record["protocol_hash"] == protocol][-1:]
    curve = [(record, record) for record in shown.run.curve if record["protocol_hash"] == protocol]
    rows: list[dict[str, Any]] = []
    for record, place in [*sorted(curve, key=lambda each: each[1]["images_seen"]), *end]:
        spent = {name: place.get(name) for name in ("images_seen", "train_flops", "device_seconds")}
        evaluations, macs = record.get("network_evaluations_per_sample"), summary.get("forward_macs_per_image")
        sampling = {"macs_per_sample": evaluations * macs if evaluations and macs else None}
        fids = {metric: record["metrics"].get(metric) for metric, _ in FIDS}
        about = {"n": record["n"], "steps": record["protocol"].get("steps"), "initial_flops": summary.get("initial_flops")}
        rows.append({"point": len(rows), **spent, **sampling, **fids, **about})
    return pd.DataFrame(rows).assign(num_points=len(rows)) if end else pd.DataFrame()


def _draw(name: str, cost: Cost, table: pd.DataFrame, points: list[tuple[Shown, pd.DataFrame]], material: Material) -> Drawn:
    panels = [(metric, title) for metric, title in FIDS if (table["panel"] == metric).any()]
    figure = new_figure(4.4 * len(panels) + 2.2, 4.0)
    divisor, prefix = next(each for each in cost.scales if table[cost.metric].max() >= each[0] or each is cost.scales[-1])
    unit = f"{prefix}{cost.unit}"
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    floors = (material.floor or {}).get("metrics", {})
    ranges = [np.append(table[table["panel"] == metric]["fid"], floors.get(metric, [])) for metric, _ in panels]
    logarithmic = any(spans_much(fids) for fids in ranges)  # panels beside each other are scaled alike
    for axes, (metric, title) in zip(all_axes, panels, strict=True):
        own = table[table["panel"] == metric].assign(x=lambda rows: rows[cost.metric] / divisor)
        _draw_points(axes, own, material)
        floor = floors.get(metric)
        if floor is not None:
            axes.axhline(floor, color="black", linestyle="--", linewidth=1.0, zorder=1, label=FLOOR_LABEL)
        _scale(axes, own, floor, logarithmic)
        axes.set_title(title)
        axes.set_xlabel(f"{cost.label} ({unit})" if unit else cost.label)
        axes.set_ylabel("FID (lower is better)")
    first = points[0][1].iloc[0]
    steps = f", sampling steps {first['steps']}" if first["steps"] else ""
    figure.suptitle(f"Quality against {cost.name} (n = {first['n']}{steps})")
    legend_beside(figure, all_axes[0])
    initial = INITIAL if any((own["initial_flops"].fillna(0) > 0).any() for _, own in points) else ""
    front = FRONT if not table["is_end"].all() else FRONT.split(" Points")[0]
    caption = f"FID of {first['n']} samples against {cost.name}. {seeds_sentence(table)} {front}{initial}"
    return Drawn(name, figure, table, caption)


def _draw_points(axes: Axes, own: pd.DataFrame, material: Material) -> None:
    """Lines along training, large markers at its end, and the front of all of them."""
    looks = {shown.label: shown for shown in material.one_per_label()}
    front = own.iloc[pareto_front(own[["x", "fid"]].to_numpy())]
    named: set[str] = set()
    for (label, _), rows in own.groupby(["label", "seeds"], sort=False):
        shown = looks[str(label)]
        look = {"color": shown.colour, "marker": shown.marker, "linestyle": shown.line}
        if len(rows) > 1:
            axes.plot(rows["x"], rows["fid"], **look, markersize=3.5, linewidth=1.2)
            if rows["half_width"].notna().any():
                low, high = rows["fid"] - rows["half_width"], rows["fid"] + rows["half_width"]
                axes.fill_between(rows["x"], low, high, color=shown.colour, alpha=0.12, linewidth=0, zorder=1)
        end = rows[rows["is_end"]]
        if end["half_width"].notna().all():
            axes.errorbar(
                end["x"], end["fid"], yerr=end["half_width"], color=shown.colour, linestyle="", elinewidth=1.1, capsize=2.5
            )
        name = f"_{label}" if label in named else str(label)
        named.add(str(label))
        look["linestyle"] = shown.line if len(rows) > 1 else ""
        axes.plot(end["x"], end["fid"], **look, markersize=8, zorder=4, label=name, markeredgecolor="white", markeredgewidth=0.5)
    axes.step(front["x"], front["fid"], where="post", color="#8a8a8a", linewidth=3.0, alpha=0.4, zorder=2, label=FRONT_LABEL)


def spans_much(values: np.ndarray) -> bool:
    return bool(values.max() > 4 * values.min() > 0)


def _scale(axes: Axes, own: pd.DataFrame, floor: float | None, logarithmic: bool) -> None:
    """Costs logarithmic where they differ by much, with plain numbers. The points set the limits: an interval may go beyond."""
    fids = np.append(own["fid"], floor if floor is not None else [])
    spans = spans_much(own["x"].to_numpy())
    for is_log, scale, axis in ((logarithmic, axes.set_yscale, axes.yaxis), (spans, axes.set_xscale, axes.xaxis)):
        if is_log:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    highest = min((own["fid"] + own["half_width"].fillna(0)).max(), 2 * fids.max())
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, 1.1 * highest)
    else:
        axes.set_ylim(fids.min() / 1.25, 1.1 * highest)
