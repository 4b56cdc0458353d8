"""How are cached latents read?

Below `data.path`: train_latents.npy (n, C, H, H), train_labels.npy (n,), heldout_latents.npy, heldout_labels.npy, and
optionally meta.json with `scaling` (latents are multiplied by it, 1 if absent; 0.18215 for Stable Diffusion's
autoencoder) and `source` (words on where they come from). `tsbench encode` writes them.

With data.flip also train_mirrored_latents.npy, of the training images mirrored before they were encoded: papers flip images,
and an autoencoder makes another latent of a mirrored image than the image's own, mirrored.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.config import DataConfig
from bench.data.digest import stamp
from bench.data.source import DataSource, balanced_order, check_image_size, hash_arrays, open_array

LAYOUT = "data.path must hold train_latents.npy, train_labels.npy, heldout_latents.npy and heldout_labels.npy"
MIRRORED = "train_mirrored_latents"
MIRRORED_LAYOUT = "data.flip=true draws from it; write it with `tsbench encode --mirrored`, or set data.flip=false"
META_KEYS = ("scaling", "source")


@dataclass(frozen=True, eq=False)
class LatentImages:
    """Latents in a memory-mapped file; image i is row `rows[i]`."""

    latents: np.ndarray  # (n, C, H, W), any float type
    rows: np.ndarray  # (n,) int64
    labels: Tensor
    scaling: float

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        gathered = np.take(self.latents, self.rows[indices.numpy()], axis=0)  # a copy, of these rows alone
        return torch.from_numpy(gathered.astype(np.float32, copy=False)).mul_(self.scaling), self.labels[indices]


def load_latents(config: DataConfig) -> DataSource:
    """Latents as written; labels are 0..K-1, where K follows from the training labels."""
    if not config.path:
        raise ValueError(f"data.path is empty: {LAYOUT}")
    root = Path(config.path)
    names = [f"{part}_{kind}" for part in ("train", "heldout") for kind in ("latents", "labels")]
    arrays = {name: open_array(root / f"{name}.npy", LAYOUT, "write it again with numpy.save") for name in names}
    if config.flip:
        arrays[MIRRORED] = open_array(root / f"{MIRRORED}.npy", MIRRORED_LAYOUT, "write it again with numpy.save")
    shape = _check(root, arrays)
    check_image_size(config.image_size, shape[-1], "these latent")
    scaling = _scaling(root / "meta.json")
    num_classes = int(arrays["train_labels"].max()) + 1
    labels = {part: torch.from_numpy(np.array(arrays[f"{part}_labels"], dtype=np.int64)) for part in ("train", "heldout")}
    if int(labels["train"].min()) < 0 or int(labels["heldout"].min()) < 0 or int(labels["heldout"].max()) >= num_classes:
        raise ValueError(
            f"the labels in {root} leave 0..{num_classes - 1}, the range of the training labels: write the files again"
        )
    order = balanced_order(labels["heldout"])
    train = LatentImages(arrays["train_latents"], np.arange(len(labels["train"])), labels["train"], scaling)
    heldout = LatentImages(arrays["heldout_latents"], order.numpy(), labels["heldout"][order], scaling)
    mirrored = replace(train, latents=arrays[MIRRORED]) if config.flip else None

    stamped = stamp((root / f"{name}.npy" for name in arrays), f"latents {scaling}")  # what is mapped, whatever is written later

    def fingerprint() -> str:
        return hash_arrays([*arrays.items(), ("scaling", np.array([scaling]))])

    return DataSource(
        "latents",
        num_classes,
        shape[0],
        shape[-1],
        train,
        heldout,
        fingerprint,
        pixels=False,
        scaling=scaling,
        mirrored=mirrored,
        stamp=lambda: stamped,
    )


def _check(root: Path, arrays: dict[str, np.ndarray]) -> tuple[int, ...]:
    """The shape of one image (C, H, H); ValueError if types, ranks or lengths disagree."""
    for part in ("train", "heldout"):
        latents, labels = arrays[f"{part}_latents"], arrays[f"{part}_labels"]
        if latents.dtype.kind != "f" or latents.ndim != 4 or latents.shape[2] != latents.shape[3]:
            raise ValueError(
                f"{part}_latents.npy in {root} is {latents.dtype} {latents.shape}: it must be of a float type, (n, C, H, H)"
            )
        if labels.dtype.kind not in "iu" or labels.shape != latents.shape[:1] or not len(labels):
            raise ValueError(
                f"{part}_labels.npy in {root} is {labels.dtype} {labels.shape}, but {part}_latents.npy has {len(latents)} "
                "images: it must hold one integer for each of them, and at least one"
            )
    shape = arrays["train_latents"].shape[1:]
    if arrays["heldout_latents"].shape[1:] != shape:
        other = arrays["heldout_latents"].shape[1:]
        raise ValueError(f"latents in {root} are {shape} to train and {other} held out: encode both in the same way")
    mirrored, plain = arrays.get(MIRRORED), arrays["train_latents"]
    if mirrored is not None and (mirrored.dtype, mirrored.shape) != (plain.dtype, plain.shape):
        raise ValueError(
            f"{MIRRORED}.npy in {root} is {mirrored.dtype} {mirrored.shape}, but train_latents.npy {plain.dtype} {plain.shape}: "
            "encode both in the same way"
        )
    return tuple(int(n) for n in shape)


def _scaling(path: Path) -> float:
    if not path.is_file():
        return 1.0
    try:
        meta: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): mend or remove it") from None
    if not isinstance(meta, dict) or not set(meta) <= set(META_KEYS):
        raise ValueError(f"{path} must be a mapping with no other keys than {' and '.join(META_KEYS)}: mend or remove it")
    scaling = meta.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < float("inf"):
        raise ValueError(f"scaling in {path} is {scaling!r}: give a number above 0")
    return float(scaling)
