"""What stands on the page of one run: how it was set, how it trained, what it draws, and where it comes from?"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from bench.arrays import read_samples
from bench.config import RunConfig
from bench.figures.losses import heldout_curve, training_curve
from bench.figures.style import Shown, dress
from bench.report.chart import Line, chart
from bench.report.material import Material
from bench.report.pictures import contact_sheet, data_uri
from bench.runs import Run
from bench.settings import flat_settings
from bench.tables import origin
from bench.tables.columns import COLUMNS, Column, heading, style_of
from bench.tables.numbers import write_number
from bench.tidy import FLOOR

PLACELESS = ("label", "seed")  # settings that a run's heading has already
NOT_KEPT = "The run's folder is not beside these results, so its curves and samples cannot be shown."
HEADLINE = ("fid_train", "fid_heldout", "heldout_loss")  # the first of these that is known


class RunPage(NamedTuple):
    """`own`: the settings in which the runs of this report differ; `remark`: what cannot be shown, and why."""

    run_id: str
    label: str
    colour: str
    method: str
    seed: str
    state: str
    headline: str
    scores: list[tuple[str, str, str]]  # metric, heading, value
    own: dict[str, str]
    settings: str  # all of them, as YAML
    origin: dict[str, str]
    charts: list[str]  # SVG
    samples: str  # data URI
    samples_width: int
    remark: str


def run_pages(material: Material) -> list[RunPage]:
    """One for each run, in the order of the tables, then by name."""
    frame, records = material.results.frame, material.results.records
    in_tables = [run for table in material.tables for part in table.parts for row in part.rows for run in row.runs]
    rows_of = {str(run): rows for run, rows in frame[frame["run"] != FLOOR].groupby("run")}
    order = [run for run in dict.fromkeys([*in_tables, *sorted(rows_of)]) if run in rows_of]
    differing = _differing({run: records[run]["config"] for run in order if run in records})
    colours = {str(entry.get("label") or entry["method"]): entry.get("colour", "") for entry in material.suite.get("methods", [])}
    shown = {each.run.run_id: each for each in dress(material.runs.values(), material.suite)}
    return [_page(rows_of[run], shown.get(run), records.get(run, {}), differing, colours) for run in order]


def _page(
    rows: pd.DataFrame, shown: Shown | None, record: Mapping[str, Any], differing: list[str], colours: Mapping[str, str]
) -> RunPage:
    known = rows.iloc[0]
    scores = list(_scores(rows[rows["at_images"].isna()]))
    by_metric = {metric: f"{name} {value}" for metric, name, value in scores}
    config = record.get("config", {})
    flat = flat_settings(config)
    samples, width = _samples(shown.run) if shown else ("", 0)
    return RunPage(
        run_id=str(known["run"]),
        label=str(known["label"]),
        colour=shown.colour if shown else colours.get(str(known["label"]), ""),
        method=str(known["method"]),
        seed=str(known["seed"]),
        state=str(known["state"]),
        headline=next((by_metric[metric] for metric in HEADLINE if metric in by_metric), ""),
        scores=scores,
        own={name: str(flat[name]) for name in differing if name in flat},
        settings=OmegaConf.to_yaml(OmegaConf.create(dict(config))) if config else "",
        origin=origin({"scores": {}, **record}, rows.sort_values("protocol_hash", ascending=False)) if record else {},
        charts=[text for text in (_loss_chart(shown) if shown else "", _score_chart(rows)) if text],
        samples=samples,
        samples_width=width,
        remark="" if shown else NOT_KEPT,
    )


def _differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all runs. What came after a run stands at its default there."""
    flats, defaults = [flat_settings(config) for config in configs.values()], flat_settings(asdict(RunConfig()))
    names = dict.fromkeys(name for flat in flats for name in flat if name not in PLACELESS)
    return [name for name in names if len({repr(flat.get(name, defaults.get(name))) for flat in flats}) > 1]


def _scores(ends: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """What is known of a run at its end, in the order of the tables, with protocols apart if there are several."""
    protocols = sorted(set(ends["protocol_hash"]) - {""})
    for column in COLUMNS:
        for metric, title in ((column.metric, column.title), (f"{column.metric}_min", column.title)):
            for protocol_hash, value in ends[ends["metric"] == metric][["protocol_hash", "value"]].to_numpy():
                apart = f", protocol {protocol_hash}" if protocol_hash and len(protocols) > 1 else ""
                yield metric, *_written(column, title + apart, float(value))


def _written(column: Column, title: str, value: float) -> tuple[str, str]:
    style = style_of(column, [value])
    return heading(title, column, style).replace(" †", ""), write_number(value, style)


def _loss_chart(shown: Shown) -> str:
    training, heldout = training_curve(shown), heldout_curve(shown)
    lines = []
    if len(training):
        lines.append(Line("training", "training loss, smoothed", list(training["images_seen"]), list(training["smoothed"])))
    if len(heldout):
        lines.append(Line("heldout", "held-out loss", list(heldout["images_seen"]), list(heldout["loss"])))
    return chart(lines, "Denoising loss over training", "denoising loss")


def _score_chart(rows: pd.DataFrame) -> str:
    """FID at the places where the run was scored on its way, and at its end; nothing if it was not."""
    fid = rows[rows["metric"] == "fid_train"]
    if not fid["at_images"].notna().any() or fid["protocol_hash"].nunique() > 1:
        return ""
    end = rows[rows["metric"] == "images_seen"]["value"].max()
    points = fid.assign(x=fid["at_images"].fillna(end)).sort_values("x")
    return chart([Line("heldout", "FID (train)", list(points["x"]), list(points["value"]))], "FID over training", "FID (train)")


def _samples(run: Run) -> tuple[str, int]:
    images = read_samples(run.path)
    sheet = contact_sheet(images) if images is not None else None
    return (data_uri(sheet[0]), sheet[1]) if sheet else ("", 0)
