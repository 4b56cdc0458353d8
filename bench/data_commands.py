"""What do `tsbench pack` and `tsbench encode` do? They make memory-mapped arrays of a data set: of its pixels, or its latents."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from bench.config import DataConfig

SETTINGS: dict[str, Any] = {
    "nargs": "*",
    "metavar": "key=value",
    "help": "for example data.name=folder data.path=IMAGES data.image_size=256",
}


def add_parsers(commands: Any) -> None:
    """The commands, for `bench.cli`."""
    pack = commands.add_parser(
        "pack",
        help="write a folder of images as memory-mapped arrays, which are read many times as fast",
        description="Decode, resize and crop a data set once, and write it as memory-mapped arrays. "
        "Train on them with data.name=packed data.path=OUT.",
    )
    pack.add_argument("settings", **SETTINGS)
    pack.add_argument("--out", type=Path, required=True, help="a new folder for the arrays")
    pack.set_defaults(run=run_pack)

    encode = commands.add_parser(
        "encode",
        help="write images as the latents that an autoencoder makes of them",
        description="Encode a data set once, with an autoencoder in a local folder as diffusers lays it out. Interrupted, "
        "the same command goes on. Train on the latents with data.name=latents data.path=OUT.",
    )
    encode.add_argument("settings", **SETTINGS)
    encode.add_argument(
        "--autoencoder", type=Path, required=True, metavar="FOLDER", help="such as a copy of stabilityai/sd-vae-ft-ema"
    )
    encode.add_argument("--out", type=Path, required=True, help="a new folder for the latents, or one that was begun")
    encode.add_argument("--mirrored", action="store_true", help="the mirrored training images too, for data.flip=true")
    encode.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what encodes (default: %(default)s)")
    encode.set_defaults(run=run_encode, resumable=True)


def run_pack(parsed: argparse.Namespace) -> int:
    from bench.data import load_data
    from bench.data.packed import pack

    source = load_data(_config(parsed.settings, "packed"))
    with _progress("packing") as told:
        pack(source, parsed.out, told)
    print(f"{len(source.train)} images to train on and {len(source.heldout)} held out: {parsed.out}")
    return 0


def run_encode(parsed: argparse.Namespace) -> int:
    from bench.autoencoder import read_layout
    from bench.data import load_data
    from bench.data.encode import encode
    from bench.job import find_device

    config = _config(parsed.settings, "encoded")
    layout, device = read_layout(parsed.autoencoder), find_device(parsed.device)
    source = load_data(config)
    with _progress("encoding") as told:
        encode(config, source, layout, parsed.out, device, parsed.mirrored, told)
    print(f"latents of {len(source.train)} images to train on and {len(source.heldout)} held out: {parsed.out}")
    return 0


def _config(settings: list[str], done: str) -> DataConfig:
    """ValueError if anything but the data is set."""
    from bench.job import make_config

    others = [setting for setting in settings if "=" in setting and not setting.startswith("data.")]
    if others:
        raise ValueError(f"{' '.join(others)} would change nothing in what is {done}: give settings of data alone")
    return make_config({}, settings).data


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; to be told how many images are done, of how many."""
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
