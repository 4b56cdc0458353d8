"""Which of the embedded 8x8 handwritten digits are trained on, and which are held out?

scikit-learn's copy of "Optical Recognition of Handwritten Digits" (UCI): 1,797 grey images, pixels 0..16.
"""

import torch
from torch import Tensor

from bench.config import DataConfig
from bench.data.source import DataSource, TensorImages, balanced_order, check_image_size, evenly_spread, hash_arrays

HELDOUT_PER_CLASS = 50
NUM_CLASSES = 10


def load_digits(config: DataConfig) -> DataSource:
    """1,297 images to train on, 500 held out; no file is read but scikit-learn's own."""
    if config.path:
        raise ValueError(f"data.path is {config.path!r}, but digits are embedded in scikit-learn: leave data.path empty")
    check_image_size(config.image_size, 8, "digits")
    images, labels = _images()
    train_indices, heldout_indices = split(labels)
    train = TensorImages(images[train_indices], labels[train_indices])
    heldout = TensorImages(images[heldout_indices], labels[heldout_indices])

    def fingerprint() -> str:
        parts = {"train": train, "heldout": heldout}
        return hash_arrays(
            (f"{name}/{kind}", tensor.numpy())
            for name, part in parts.items()
            for kind, tensor in (("images", part.images), ("labels", part.labels))
        )

    return DataSource("digits", NUM_CLASSES, 1, 8, train, heldout, fingerprint)


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on (in the data set's order) and held out (balanced order), without randomness.

    Of each class, 50 images spread evenly through the data set's order are held out: neighbours in it come from the
    same writer, so that every writer is in both parts.
    """
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        heldout[members[evenly_spread(len(members), HELDOUT_PER_CLASS)]] = True
    heldout_indices = heldout.nonzero().squeeze(1)
    return (~heldout).nonzero().squeeze(1), heldout_indices[balanced_order(labels[heldout_indices])]


def _images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8.0 - 1.0  # (1797, 1, 8, 8), 0..16 -> [-1, 1]
    return images, torch.from_numpy(bunch.target).long()
