"""How are the reference files and sample files of ADM read and written?

ADM (arXiv 2105.05233) evaluates .npz files: a reference holds `mu` and `sigma` of Inception's features (`mu_s`,
`sigma_s`: of its spatial ones) and some images in `arr_0`, uint8 (n, H, W, C); a sample file holds `arr_0`, and
labels in `arr_1`. No TensorFlow, and no pickles.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LAYOUT = "an ADM reference is an .npz file with mu (D,) and sigma (D, D), and images in arr_0 (n, H, W, C) as uint8"


@dataclass(frozen=True, eq=False)
class AdmReference:
    """The statistics of a reference file, float64; the spatial ones where the file has them."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)
    spatial_mean: Tensor | None
    spatial_covariance: Tensor | None


def read_reference(path: Path) -> AdmReference:
    """The statistics alone; images are read by `read_images`. Raises ValueError if the file is not an ADM reference."""
    arrays = _read(path, ("mu", "sigma", "mu_s", "sigma_s"))
    mean, covariance = _statistics(path, arrays, "mu", "sigma")
    if mean is None or covariance is None:
        raise ValueError(f"{path} has no mu and sigma: {LAYOUT}")
    return AdmReference(mean, covariance, *_statistics(path, arrays, "mu_s", "sigma_s"))


def has_spatial(path: Path) -> bool:
    """Whether a reference file has the statistics of spatial features."""
    _check_is_archive(path)
    with zipfile.ZipFile(path) as archive:
        return {"mu_s.npy", "sigma_s.npy"} <= set(archive.namelist())


def image_shape(path: Path) -> tuple[int, ...] | None:
    """(n, C, H, W) of the images in a file, without reading them; None if it has none."""
    _check_is_archive(path)
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        with archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
    if len(shape) != 4 or dtype != np.uint8:
        raise ValueError(f"arr_0 in {path} is {dtype} {shape}: it must be uint8 of shape (n, H, W, C)")
    count, height, width, channels = shape
    return count, channels, height, width


def read_images(path: Path) -> Tensor:
    """(n, C, H, W) uint8, from a reference or a sample file."""
    if image_shape(path) is None:
        raise ValueError(f"{path} has no images in arr_0: {LAYOUT}")
    return torch.from_numpy(_read(path, ("arr_0",))["arr_0"]).permute(0, 3, 1, 2).contiguous()


def write_samples(path: Path, samples: Tensor, labels: Tensor | None = None) -> None:
    """uint8 (n, C, H, W), and labels (n,) -> a sample file that ADM's evaluator reads; equal input gives equal bytes."""
    if samples.dtype != torch.uint8 or samples.ndim != 4:
        raise ValueError(f"samples to write are {samples.dtype} {tuple(samples.shape)}: give uint8 of shape (n, C, H, W)")
    arrays = {"arr_0": samples.permute(0, 2, 3, 1).contiguous().cpu().numpy()}
    if labels is not None:
        arrays["arr_1"] = labels.cpu().numpy()
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of `names` that the file has."""
    _check_is_archive(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): {LAYOUT}") from None


def _check_is_archive(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {LAYOUT}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file: {LAYOUT}")


def _statistics(
    path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str
) -> tuple[Tensor | None, Tensor | None]:
    if mean_name not in arrays or covariance_name not in arrays:
        return None, None
    mean, covariance = arrays[mean_name], arrays[covariance_name]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{mean_name} and {covariance_name} in {path} are {mean.shape} and {covariance.shape}: {LAYOUT}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mean_name} or {covariance_name} in {path} is not finite: fetch the file again")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
