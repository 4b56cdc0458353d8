"""How are images read from folders, one per class?

Decoded by Pillow (torchvision's own decoders are to be removed), resized and cropped by torchvision.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from bench.config import DataConfig
from bench.data.digest import Stamp, stamp
from bench.data.source import DataSource, balanced_order, hash_file, to_unit_range

EXTENSIONS = (".png", ".jpg", ".jpeg")
LAYOUT = "lay images out as train/CLASS/*.png (or .jpg) and heldout/CLASS/*.png below data.path"


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Images decoded when they are asked for: RGB, shorter side resized to `image_size` (bicubic), centre cropped."""

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return to_unit_range(self.pixels(indices)), self.labels[indices]

    def pixels(self, indices: Tensor) -> Tensor:
        return torch.stack([_decode(self.paths[i], self.image_size) for i in indices.tolist()])


def load_folder(config: DataConfig) -> DataSource:
    """Classes are numbered in the sorted order of their folder names; files are in sorted order too."""
    if not config.path:
        raise ValueError(f"data.path is empty: give a folder, and {LAYOUT}")
    if config.image_size < 1:
        raise ValueError(f"data.image_size is {config.image_size}: give the width in pixels to which images are cropped")
    root = Path(config.path)
    classes = _classes(root / "train")
    if _classes(root / "heldout") != classes:
        raise ValueError(
            f"the classes in {root / 'train'} and {root / 'heldout'} differ: {LAYOUT}, with the same classes in both"
        )
    train_paths, train_labels = _list(root / "train", classes)
    heldout_paths, heldout_labels = _list(root / "heldout", classes)
    order = balanced_order(heldout_labels)
    train = FolderImages(train_paths, train_labels, config.image_size)
    heldout = FolderImages(tuple(heldout_paths[i] for i in order.tolist()), heldout_labels[order], config.image_size)

    def fingerprint() -> str:
        digest = hashlib.sha256(f"{config.image_size}".encode())
        for path in (*train.paths, *heldout.paths):
            digest.update(f"{path.relative_to(root).as_posix()} {hash_file(path)};".encode())
        return digest.hexdigest()

    def stamped() -> Stamp:
        return stamp((*train.paths, *heldout.paths), f"folder {root} {config.image_size}")

    return DataSource("folder", len(classes), 3, config.image_size, train, heldout, fingerprint, stamp=stamped)


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: {LAYOUT}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} has no class folders: {LAYOUT}")
    return names


def _list(folder: Path, classes: list[str]) -> tuple[tuple[Path, ...], Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in EXTENSIONS)
        if not found:
            raise ValueError(f"{folder / name} holds no image ({', '.join(EXTENSIONS)}): {LAYOUT}")
        paths += found
        labels += [label] * len(found)
    return tuple(paths), torch.tensor(labels)


def _decode(path: Path, size: int) -> Tensor:
    """(3, size, size) uint8."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # Pillow would clip them
                raise ValueError(f"{path} has more than 8 bits a channel (mode {file.mode}): convert it to 8 bits")
            image = transforms.pil_to_tensor(file.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's own errors, for files that are no images or are cut short
        raise ValueError(f"{path} cannot be decoded as an image ({error}): replace or remove the file") from None
    height, width = image.shape[-2:]
    if min(height, width) != size:
        image = transforms.resize(image, [size], interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    return transforms.center_crop(image, [size, size])
