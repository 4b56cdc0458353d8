"""How fast is a batch read, beside the same from one file for each image?

Both read on one thread what the page cache holds already: what is compared is gathering with opening and decoding. The
size of a network and the device do not matter.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.config import DataConfig
from bench.data import ImageSet, load_data
from bench.data.packed import pack
from bench.throughput.clock import Call, Part
from bench.throughput.contest import CHANNELS, INPUT_SIZE

NUM_FILES = 2048  # latents: 32 MB in float32
NUM_PHOTOS = 256  # 50 MB packed
PHOTO_WIDTH, PHOTO_HEIGHT, PHOTO_QUALITY = 500, 375, 90  # of a JPEG; the most common size in ImageNet
IMAGE_SIZE = 256


def latent_loader(folder: Path) -> Part:
    """A batch of latents gathered from one memory-mapped file, or from as many files of one image each."""

    def make(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
        latents, paths = write_latents(folder, NUM_FILES)
        images = load_data(DataConfig(name="latents", path=str(folder))).train
        draw = _indices(len(latents), batch_size)
        return lambda: images.batch(draw())[0], lambda: batch_of_files(paths, draw())

    return make


def image_loader(folder: Path) -> Part:
    """A batch of 256x256 images gathered from what `tsbench pack` writes, or from JPEGs of 500x375, each decoded by Pillow,
    resized and cropped: the two data sets as training reads them.
    """

    def make(size: str, batch_size: int, device: torch.device) -> tuple[Call, Call]:
        packed, files = image_sets(folder, NUM_PHOTOS)
        draw = _indices(len(files), batch_size)
        return lambda: packed.batch(draw())[0], lambda: files.batch(draw())[0]

    return make


LOADERS: dict[str, Callable[[Path], Part]] = {"loader": latent_loader, "loader, images": image_loader}


def image_sets(folder: Path, count: int) -> tuple[ImageSet, ImageSet]:
    """The same images packed and as JPEGs, written below `folder` unless they are there."""
    photos, arrays = folder / "photos", folder / "packed"
    if not arrays.exists():
        write_photos(photos, count)
    files = load_data(DataConfig(name="folder", path=str(photos), image_size=IMAGE_SIZE))
    if not arrays.exists():
        pack(files, arrays)
    return load_data(DataConfig(name="packed", path=str(arrays))).train, files.train


def write_photos(folder: Path, count: int) -> None:
    """JPEGs that take no longer to decode than photographs: smooth, with grain, 76 kB each (the mean of ImageNet's is 108 kB)."""
    source = np.random.default_rng(0)
    for part, number in (("train", count), ("heldout", 1)):
        (folder / part / "class").mkdir(parents=True)
        for index in range(number):
            coarse = source.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((PHOTO_WIDTH, PHOTO_HEIGHT), Image.Resampling.BICUBIC))
            grain = source.integers(-20, 21, smooth.shape)
            photo = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            photo.save(folder / part / "class" / f"{index:06d}.jpg", quality=PHOTO_QUALITY)


def write_latents(folder: Path, count: int) -> tuple[np.ndarray, list[Path]]:
    """The same images in the form of `bench.data.latents`, and one by one."""
    latents = np.random.default_rng(0).standard_normal((count, CHANNELS, INPUT_SIZE, INPUT_SIZE), dtype=np.float32)
    labels = np.arange(count) % 10
    for part in ("train", "heldout"):
        np.save(folder / f"{part}_latents.npy", latents)
        np.save(folder / f"{part}_labels.npy", labels)
    paths = [folder / f"{index:06d}.npy" for index in range(count)]
    for path, image in zip(paths, latents, strict=True):
        np.save(path, image)
    return latents, paths


def batch_of_files(paths: Sequence[Path], indices: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(np.load(paths[index])) for index in indices.tolist()])


def _indices(count: int, batch_size: int) -> Callable[[], Tensor]:
    source = torch.Generator().manual_seed(0)
    return lambda: torch.randint(count, (batch_size,), generator=source)
