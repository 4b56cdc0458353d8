"""Which arrays does a run leave: what is inside the trained method, what it draws, and how?"""

import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.files import write_bytes_atomically

REMEDY = "delete it and give the run to `tsbench train` once more, which makes what is missing"


class Trajectory(NamedTuple):
    """The first images of a sample on their way from noise to image."""

    images: np.ndarray  # (frame, n, C, H, W) uint8: as they are, from pure noise to the sample's own bytes
    predicted: np.ndarray  # (frame, n, C, H, W) uint8: the clean images that the network saw in them; last, the sample's own
    times: np.ndarray  # (frame,) float64: what the network was given there; NaN for the last, which it is not shown
    labels: np.ndarray  # (n,) int64


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
    arrays = read_arrays(file)
    found = {}
    for name in (key for key in arrays if "/" not in key):
        axes = tuple(str(axis) for axis in arrays.get(f"{name}/axes", ()))
        history = arrays.get(f"{name}/history")
        images_seen = arrays.get("history/images_seen") if history is not None else None
        if len(axes) != arrays[name].ndim or (history is not None and images_seen is None):
            raise ValueError(f"{file} has no matching axis names or points for {name}: {REMEDY}")
        found[name] = Diagnostic(axes, arrays[name], history, images_seen)
    return found


def read_samples(path: Path) -> np.ndarray | None:
    """The drawn images, (n, H, W, C) uint8; None if there are none."""
    file = Path(path) / "samples.npz"
    if not file.exists():
        return None
    images = read_arrays(file).get("arr_0")
    if images is None or images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{file} holds no uint8 images arr_0 (n, H, W, C): {REMEDY}")
    return images


def write_trajectory(path: Path, trajectory: Trajectory) -> None:
    """`trajectory.npz` of a run folder; equal input gives equal bytes."""
    content = io.BytesIO()
    np.savez_compressed(content, **trajectory._asdict())  # type: ignore[arg-type]
    write_bytes_atomically(Path(path) / "trajectory.npz", content.getvalue())


def read_trajectory(path: Path) -> Trajectory | None:
    """Of a run's `trajectory.npz`; None if there is none."""
    file = Path(path) / "trajectory.npz"
    if not file.exists():
        return None
    arrays = read_arrays(file)
    missing = [name for name in Trajectory._fields if name not in arrays]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: {REMEDY}")
    found = Trajectory(**{name: arrays[name] for name in Trajectory._fields})
    shape = (len(found.times), len(found.labels))
    if any(part.ndim != 5 or part.shape[:2] != shape or part.dtype != np.uint8 for part in (found.images, found.predicted)):
        raise ValueError(f"{file} holds no uint8 images (frame, n, C, H, W) with times and labels: {REMEDY}")
    return found


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file; empty if there is none."""
    if not file.exists():
        return {}
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}): {REMEDY}") from None
