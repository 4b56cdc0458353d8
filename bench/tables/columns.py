"""Which columns can a comparison have, and how are their numbers and headings written?"""

from collections.abc import Sequence
from typing import NamedTuple

from bench.tables.numbers import Style, si_style, significant_style


class Column(NamedTuple):
    """A metric as a column. `block`: cost or quality; `better`: lower, higher or, where more is not better, empty.

    `kind`: integer; si (k, M, G ...); significant:DIGITS; or fixed:DIVISOR:DECIMALS. Columns of one `scale` are written alike.
    """

    metric: str
    title: str
    short: str  # for terminals
    block: str
    better: str = ""
    kind: str = "significant:3"
    unit: str = ""
    scale: str = ""
    asked_for: bool = False  # shown only where the suite names it under `columns`


COLUMNS = (
    Column("stored_parameters", "Stored parameters", "Stored params", "cost", kind="si", scale="parameters"),
    Column("active_parameters", "Active parameters", "Active params", "cost", kind="si", scale="parameters"),
    Column("forward_macs_per_image", "Forward / image", "Forward", "cost", kind="si", unit="\N{NO-BREAK SPACE}MACs"),
    Column("train_flops", "Training", "Training", "cost", kind="si", unit="FLOPs"),
    Column("images_seen", "Images", "Images", "cost", kind="si"),
    Column("updates_per_parameter_set", "Updates / parameter set", "Updates / set", "cost", kind="integer"),
    Column("train_images_per_second", "Train images/s †", "Train img/s†", "cost"),
    Column("sample_images_per_second", "Sample images/s †", "Sample img/s†", "cost"),
    Column("device_seconds", "Device-seconds †", "Device s†", "cost", asked_for=True),
    Column("peak_memory_bytes", "Peak memory †", "Peak mem.†", "cost", kind="si", unit="B", asked_for=True),
    Column("network_evaluations_per_sample", "Evaluations / sample", "Evals / sample", "cost", kind="integer", asked_for=True),
    Column("lost_device_seconds", "Device-seconds lost to crashes †", "Lost s†", "cost"),
    Column("initial_flops", "Spent on initial weights", "Initial weights", "cost", kind="si", unit="FLOPs"),
    Column("fid_train", "FID (train)", "FID train", "quality", "lower", "significant:4", scale="fid"),
    Column("fid_heldout", "FID (held-out)", "FID held-out", "quality", "lower", "significant:4", scale="fid"),
    Column("sfid", "sFID", "sFID", "quality", "lower", "significant:3", asked_for=True),
    Column("kid", "KID", "KID", "quality", "lower", "fixed:0.001:2", "×10⁻³"),
    Column("precision", "Precision", "Preci- sion", "quality", "higher", "fixed:1:3"),
    Column("recall", "Recall", "Recall", "quality", "higher", "fixed:1:3"),
    Column("class_accuracy", "Class accuracy", "Class acc.", "quality", "higher", "fixed:0.01:1", "%"),
    Column("inception_score", "Inception score", "IS", "quality", "higher", asked_for=True),
    Column("heldout_loss", "Held-out loss", "Held-out loss", "quality", "lower", "significant:4", asked_for=True),
    Column("nearest_neighbour", "Nearest-neighbour distance", "Nearest neighb.", "quality"),
    Column("n", "n", "n", "quality", kind="integer"),
    Column("seeds", "Seeds", "Seeds", "quality", kind="integer"),
)
SHARE = Column("share_of_budget", "Share of budget", "Share", "cost", kind="fixed:0.01:0", unit="%")
PAIRS = Column("seeds", "Pairs", "Pairs", "quality", kind="integer")
AS_RANGE = {SHARE.metric}  # where seeds differ, the smallest and the largest
OPTIONAL = tuple(column.metric for column in COLUMNS if column.asked_for)
ONLY_IF_ABOVE = {"initial_flops": 0, "lost_device_seconds": 0, "seeds": 1}  # columns left out where they say nothing


def alike(column: Column) -> list[str]:
    """The metrics that are written with as many decimals."""
    return [other.metric for other in COLUMNS if other.scale and other.scale == column.scale] or [column.metric]


def style_of(column: Column, values: Sequence[float]) -> Style:
    """For these values, of all metrics that are `alike`."""
    kind, *numbers = column.kind.split(":")
    if kind == "si":
        return si_style(values, column.unit)
    if kind == "significant":
        return significant_style(values, int(numbers[0]))
    return Style(float(numbers[0]), int(numbers[1])) if kind == "fixed" else Style()


def heading(title: str, column: Column, style: Style) -> str:
    unit = (style.unit or column.unit).strip()
    arrow = {"lower": " ↓", "higher": " ↑", "": ""}[column.better]
    return title + (f" ({unit})" if unit else "") + arrow
