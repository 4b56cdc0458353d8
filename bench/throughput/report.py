"""What is written and shown of the rows that were measured?"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.files import write_text_atomically
from bench.provenance import ROOT, device_name, gpu_versions, version_of
from bench.throughput.contest import Setup
from bench.throughput.rows import Row

DASH = "–"
SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {  # column -> heading, how its numbers are written
    "images_per_second": ("images/s", lambda rate: f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"),
    "mfu": ("MFU", "{:.1%}".format),
    "mfu_of_vendor_peak": ("of vendor's", "{:.1%}".format),
    "peak_memory_bytes": ("peak GB", lambda size: f"{size / 1e9:.3g}"),
}


def facts_of_run(setup: Setup) -> Row:
    """Where, when and with which code: the same in every row."""
    version, gpu = version_of(ROOT), gpu_versions(setup.device)
    return {
        "device": device_name(setup.device),
        "threads": setup.threads if setup.device == "cpu" else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": version["commit"],
        "dirty": version["dirty"],
        "torch": torch.__version__,
        "cuda": gpu["cuda"],
        "driver": gpu["driver"],
        "python": platform.python_version(),
        "settings": " ".join(setup.settings),
    }


def frame_of(rows: Sequence[Row], facts: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**row, **facts} for row in rows])


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    write_text_atomically(path, frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def to_rich(frame: pd.DataFrame) -> Group:
    """A table for each thing that was timed at one size and batch size, with the ratio to each baseline that was asked for."""
    tables: list[Any] = []
    for (what, size, batch_size), part in frame.groupby(["what", "size", "batch_size"], sort=False):
        tables += [Text(f"{what}, {size}, batch {batch_size}", style="bold"), _grid(part)]
    tables += [Text(f"{row['what']}, {contestant_name(row)}: {row['note']}") for _, row in frame.iterrows() if row["note"]]
    if "sampling_steps" in frame and not (steps := frame["sampling_steps"].dropna()).empty:
        scale = frame["guidance_scale"].dropna().iloc[0]
        guided = "without guidance" if scale == 1 else f"guided with scale {scale:g}: two evaluations each"
        tables.append(Text(f"Images/s of sampling are of {steps.iloc[0]:g} steps an image, {guided}.", style="dim"))
    return Group(*tables)


def _grid(part: pd.DataFrame) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("", no_wrap=True)
    ratios = ratio_columns(part)
    shown = [name for name in SHOWN if name in part and part[name].notna().any()]
    headings = ["ms", "quartiles", *(SHOWN[name][0] for name in shown)]
    for heading in (*headings, *(f"x {name}" for name in ratios)):
        grid.add_column(heading, justify="right", no_wrap=True)
    beside = None
    for _, row in part.iterrows():
        if beside not in (None, row["beside"]):
            grid.add_section()
        beside = row["beside"]
        grid.add_row(
            contestant_name(row),
            _milliseconds(row["step_seconds"]),
            f"{_milliseconds(row['step_seconds_low'])}-{_milliseconds(row['step_seconds_high'])}",
            *(_number(row[name], SHOWN[name][1]) for name in shown),
            *(_number(row[column], lambda ratio: f"{ratio:.2f}") for column in ratios.values()),
        )
    return grid


def ratio_columns(frame: pd.DataFrame) -> dict[str, str]:
    """Baseline -> column."""
    prefix = "speed_over_"
    columns = [name for name in map(str, frame) if name.startswith(prefix) and not name.endswith(("_low", "_high"))]
    return {name.removeprefix(prefix): name for name in columns}


def contestant_name(row: Any) -> str:
    """What tells the rows of one table apart."""
    words = [row["method"], row["precision"], "" if row["compile"] == "none" else f"compiled ({row['compile']})", row["code"]]
    return " ".join(str(word) for word in words if word)


def _milliseconds(seconds: Any) -> str:
    return _number(seconds, lambda seconds: f"{1000 * seconds:#.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}")


def _number(value: Any, write: Callable[[Any], str]) -> str:
    return DASH if value is None or pd.isna(value) else write(value)
