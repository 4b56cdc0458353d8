"""What does `tsbench pack` do? It makes memory-mapped arrays of a data set whose images are slow to read."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn


def add_parsers(commands: Any) -> None:
    """The command, for `bench.cli`."""
    pack = commands.add_parser(
        "pack",
        help="write a folder of images as memory-mapped arrays, which are read many times as fast",
        description="Decode, resize and crop a data set once, and write it as memory-mapped arrays. "
        "Train on them with data.name=packed data.path=OUT.",
    )
    pack.add_argument(
        "settings", nargs="*", metavar="key=value", help="for example data.name=folder data.path=IMAGES data.image_size=256"
    )
    pack.add_argument("--out", type=Path, required=True, help="a new folder for the arrays")
    pack.set_defaults(run=run_pack)


def run_pack(parsed: argparse.Namespace) -> int:
    from bench.data import load_data
    from bench.data.packed import pack
    from bench.job import make_config

    others = [setting for setting in parsed.settings if "=" in setting and not setting.startswith("data.")]
    if others:
        raise ValueError(f"{' '.join(others)} would change nothing in what is packed: give settings of data alone")
    source = load_data(make_config({}, parsed.settings).data)
    columns = ("packing", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        pack(source, parsed.out, lambda done, total: bar.update(task, completed=done, total=total))
    print(f"{len(source.train)} images to train on and {len(source.heldout)} held out: {parsed.out}")
    return 0
