"""Which arrays did a run leave: what is inside the trained method, and what it draws?"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Diagnostic(NamedTuple):
    """What there is to see inside a trained method."""

    axes: tuple[str, ...]
    values: np.ndarray  # one dimension per axis
    history: np.ndarray | None  # (point, *axes): the same over training
    images_seen: np.ndarray | None  # (point,)


def read_diagnostics(path: Path) -> dict[str, Diagnostic]:
    """Name -> diagnostic of a run's `diagnostics.npz`; empty if there is none."""
    file = Path(path) / "diagnostics.npz"
    if not file.exists():
        return {}
    arrays = _read_npz(file)
    found = {}
    for name in (key for key in arrays if "/" not in key):
        axes = tuple(str(axis) for axis in arrays.get(f"{name}/axes", ()))
        history = arrays.get(f"{name}/history")
        images_seen = arrays.get("history/images_seen") if history is not None else None
        if len(axes) != arrays[name].ndim or (history is not None and images_seen is None):
            raise ValueError(f"{file} has no matching axis names or points for {name}: delete it and score the run again")
        found[name] = Diagnostic(axes, arrays[name], history, images_seen)
    return found


def read_samples(path: Path) -> np.ndarray | None:
    """The drawn images, (n, H, W, C) uint8; None if there are none."""
    file = Path(path) / "samples.npz"
    if not file.exists():
        return None
    images = _read_npz(file).get("arr_0")
    if images is None or images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{file} holds no uint8 images arr_0 (n, H, W, C): delete it and sample the run again")
    return images


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}): delete it and score the run again") from None
