"""What do the tests of encoding and packing share? Images, an autoencoder, the command, what it makes of them, and a full disk.

The fixtures are offered to all tests by conftest.py.
"""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from command import tsbench
from PIL import Image

from bench.config import DataConfig

NUM_TRAIN, NUM_HELDOUT = 21, 9


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """PNGs of 16x20 in three classes, cropped to 16x16."""
    root = tmp_path_factory.mktemp("images") / "images"
    draw = np.random.default_rng(0)
    for part, count in (("train", NUM_TRAIN), ("heldout", NUM_HELDOUT)):
        for index in range(count):
            folder = root / part / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return DataConfig(name="folder", path=str(root), image_size=16)


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autoencoders import write_autoencoder  # diffusers takes seconds to import, and most tests do without

    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny")


def command(images: DataConfig, autoencoder: Path, out: Path, *more: str) -> list[object]:
    settings = [f"data.name={images.name}", f"data.path={images.path}", f"data.image_size={images.image_size}"]
    return ["encode", *settings, "--autoencoder", autoencoder, "--out", out, *more]


@pytest.fixture(scope="session")
def latents(images: DataConfig, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, mirrored ones too."""
    out = tmp_path_factory.mktemp("latents") / "new" / "latents"
    outcome = tsbench(*command(images, autoencoder, out, "--mirrored"))
    assert (outcome.code, outcome.out) == (0, f"latents of 21 images to train on and 9 held out: {out}\n"), outcome.err
    return out


@pytest.fixture
def room_for_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk on which the first array has room, and no other; the bytes that were asked for, as they are."""
    asked: list[int] = []

    def only_the_first_fits(file: int, start: int, length: int) -> None:
        asked.append(length)
        if len(asked) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", only_the_first_fits)
    return asked
