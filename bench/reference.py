"""What are samples compared with, and how is it kept for the runs that follow?

Statistics and features of the training set (or of a reference file) and of held-out images. They follow from contents
alone and are kept in a file that is named by the hash of those, so that it cannot be out of date. Processes that make
the same at the same time write the same, each in one piece.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench import adm, fidelity
from bench.config import content_hash
from bench.data import DataSource, ImageSet
from bench.data.source import hash_arrays
from bench.distance import mean_and_covariance
from bench.distributed import World
from bench.files import make_folder, write_bytes_atomically
from bench.protocol import EvalProtocol

CONTENTS = ("extractor", "extractor_sha256", "data_sha256", "reference", "reference_sha256", "feature_batch_size", "uint8_rule")
PARTS = ("mean", "covariance", "heldout_mean", "heldout_covariance", "features")
NOTHING = (torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64))  # in a file, statistics of no images
KEPT_FROM = 5000  # images to look at; fewer take seconds, and leave no file

Extract = Callable[[Tensor | ImageSet], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with."""

    train: tuple[Tensor, Tensor]  # mean and covariance: of the training set, or the reference file's
    heldout: tuple[Tensor, Tensor] | None  # None: no images are held out
    features: Tensor  # (m, width): of the training set, or of the reference file's images


def make_reference(
    protocol: EvalProtocol, data: DataSource, extract: Extract, device: str, world: World, folder: Path | None
) -> Reference | None:
    """Read from `folder` if it is there, else computed with the help of all ranks and kept there; rank 0 gets it."""
    file = Path(protocol.reference_path)
    with world.together():
        of_file = adm.image_shape(file) if protocol.reference == "adm" else None
    num_images = (of_file[0] if of_file else len(data.train)) + len(data.heldout)
    path = folder / f"{reference_key(protocol, device)}.safetensors" if folder and num_images >= KEPT_FROM else None
    with world.together():
        found = _read(path) if path and world.is_main else None
    if world.decide(found is not None, torch.device("cpu")):
        return found
    name = fidelity.layer(protocol.extractor, "fid")
    with world.together():
        images = adm.read_images(file) if of_file else data.train
    of_heldout = extract(data.heldout) if len(data.heldout) else {}
    of_train = extract(images)
    reference: Reference | None = None
    with world.together():
        if world.is_main:
            stored = adm.read_reference(file) if protocol.reference == "adm" else None
            train = (stored.mean, stored.covariance) if stored else mean_and_covariance(of_train[name])
            heldout = mean_and_covariance(of_heldout[name]) if of_heldout else None
            reference = Reference(train, heldout, of_train[name])
            if path:
                _write(path, reference)
    return reference


def reference_key(protocol: EvalProtocol, device: str) -> str:
    """A hash of all that the reference follows from, the device's kind and torch included: they decide about last bits."""
    contents = {name: getattr(protocol, name) for name in CONTENTS}
    return content_hash({**contents, "device": torch.device(device).type, "torch": torch.__version__}, length=20)


def _write(path: Path, reference: Reference) -> None:
    heldout = reference.heldout or NOTHING
    parts = dict(zip(PARTS, (*reference.train, *heldout, reference.features), strict=True))
    parts = {name: tensor.contiguous() for name, tensor in parts.items()}
    make_folder(path.parent)
    write_bytes_atomically(path, save(parts, {"sha256": _hash(parts)}))


def _read(path: Path) -> Reference | None:
    """None if there is no such file. A damaged one is made anew, with a warning."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name) for name in PARTS}
            sound = (file.metadata() or {}).get("sha256") == _hash(parts)
    except SafetensorError:
        sound = False
    if not sound:
        warnings.warn(f"{path} is damaged and is computed again", stacklevel=2)
        return None
    mean, covariance, heldout_mean, heldout_covariance, features = (parts[name] for name in PARTS)
    heldout = (heldout_mean, heldout_covariance) if len(heldout_mean) else None
    return Reference((mean, covariance), heldout, features)


def _hash(parts: dict[str, Tensor]) -> str:
    return hash_arrays((name, parts[name].numpy()) for name in PARTS)
