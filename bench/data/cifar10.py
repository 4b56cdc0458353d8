"""How is CIFAR-10 read from its binary files?

The binary version holds plain bytes: records of one label and 3 x 32 x 32 pixels. The Python version is pickles, which
execute code when they are read, and is not supported.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.config import DataConfig
from bench.data.source import DataSource, TensorImages, balanced_order, check_image_size, hash_arrays

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
HELDOUT_FILES = ("test_batch.bin",)
RECORD_BYTES = 1 + 3 * 32 * 32
LAYOUT = f"data.path must be a folder with the files of CIFAR-10's binary version, {', '.join((*TRAIN_FILES, *HELDOUT_FILES))}"


def load_cifar10(config: DataConfig) -> DataSource:
    """50,000 images to train on; the 10,000 of the test batch, in balanced order, are held out."""
    check_image_size(config.image_size, 32, "CIFAR-10")
    if not config.path:
        raise ValueError(f"data.path is empty: {LAYOUT}")
    folder = Path(config.path)
    train = _read(folder, TRAIN_FILES)
    images, labels = _read(folder, HELDOUT_FILES)
    order = balanced_order(labels)
    heldout = (images[order], labels[order])
    arrays = [
        ("train images", train[0]),
        ("train labels", train[1]),
        ("heldout images", heldout[0]),
        ("heldout labels", heldout[1]),
    ]

    def fingerprint() -> str:
        return hash_arrays((name, tensor.numpy()) for name, tensor in arrays)

    return DataSource("cifar10", 10, 3, 32, TensorImages(*train), TensorImages(*heldout), fingerprint)


def _read(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) uint8 and (n,) int64 from consecutive files."""
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"there is no file {path}: {LAYOUT}")
        content = np.fromfile(path, dtype=np.uint8)
        if not len(content) or len(content) % RECORD_BYTES:
            raise ValueError(f"{path} has {len(content)} bytes, which is no multiple of {RECORD_BYTES} above 0: fetch it again")
        parts.append(content.reshape(-1, RECORD_BYTES))
    records = torch.from_numpy(np.concatenate(parts))
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"the files in {folder} hold the label {int(labels.max())}, where CIFAR-10 has 0..9: {LAYOUT}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels
