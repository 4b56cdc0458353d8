"""As which images is a run drawn, and with which are they compared?

Of a data set of pixels, both are its own. Latents are drawn as the images that an autoencoder makes of them
(`evaluation.autoencoder`), and these are compared with the images that the latents came from (`evaluation.images`), with a
reference file (`evaluation.reference`), or with both. Without an autoencoder, a run on latents ends without scores.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.autoencoder import CONFIG, WEIGHTS, Layout, load_autoencoder, read_layout
from bench.config import DataConfig, EvaluationConfig, content_hash
from bench.data import DataSource, ImageSet, load_data
from bench.data.digest import hashed_once, stamp
from bench.data.source import TensorImages, hash_file

EMBEDDED = "digits"  # the one data set that has no folder
NOT_DRAWN = (  # for `name` of the data set
    "data set {name!r} holds latents: give evaluation.autoencoder, the folder of the autoencoder that decodes them, and "
    "evaluation.images or evaluation.reference, which samples are compared with"
)


@dataclass(frozen=True)
class Decoder:
    """Latents as they are trained on -> pixels, (B, C, H, W) in about [-1, 1]. It is loaded when it is first called."""

    layout: Layout
    scaling: float

    def __call__(self, x: Tensor) -> Tensor:
        return load_autoencoder(self.layout, x.device).decode(x / self.scaling)

    def shape_of(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image that a latent (c, h, w) becomes."""
        _, height, width = latent
        return self.layout.image_channels, height * self.layout.shrinkage, width * self.layout.shrinkage

    def describe(self) -> str:
        """For a protocol: all that decides about pixels. Reads the weights to hash them."""
        files = [self.layout.folder / name for name in (CONFIG, WEIGHTS)]
        sha256 = hashed_once(stamp(files, "autoencoder"), lambda: content_hash([hash_file(path) for path in files], length=64))
        return f"AutoencoderKL {sha256} scaling {self.scaling:g}"


def decoder_of(config: EvaluationConfig, data: DataSource) -> Decoder | None:
    """None for a data set of pixels, and for latents without an autoencoder. ValueError if it does not fit the data."""
    if data.pixels or not config.autoencoder:
        return None
    layout = read_layout(Path(config.autoencoder))
    if layout.latent_channels != data.channels:
        raise ValueError(
            f"the autoencoder in {layout.folder} has latents of {layout.latent_channels} channels, but those in "
            f"data.path have {data.channels}: give the one that they were encoded with"
        )
    return Decoder(layout, data.scaling)


def pixels_of(config: EvaluationConfig, data: DataSource) -> DataSource | None:
    """What the samples of a run on `data` are as images: the data set to score them against; None if they are not decoded.

    Where latents are compared with a reference file alone, its sets are empty. ValueError in one sentence for what does not
    fit.
    """
    decoder = decoder_of(config, data)
    if decoder is None:
        for name in ("autoencoder", "images"):
            if value := getattr(config, name):
                why = f"{data.name} are pixels already" if data.pixels else "without evaluation.autoencoder nothing is decoded"
                raise ValueError(f"evaluation.{name} is {value!r}, but {why}: leave it empty")
        return data if data.pixels else None
    channels, size, _ = decoder.shape_of((data.channels, data.input_size, data.input_size))
    if not config.images:
        empty = _no_images(channels, size)
        return DataSource("none", data.num_classes, channels, size, empty, empty, lambda: "none", decoder=decoder.describe)
    images = load_data(_where(config.images, size))
    found, wanted = (images.num_classes, images.channels, images.input_size), (data.num_classes, channels, size)
    if not images.pixels or found != wanted:
        raise ValueError(
            f"evaluation.images {config.images} has images of {found[1]}x{found[2]}x{found[2]} in {found[0]} classes, but the "
            f"latents are decoded to {wanted[1]}x{wanted[2]}x{wanted[2]} in {wanted[0]}: give what they were encoded from"
        )
    return replace(images, decoder=decoder.describe)


def _where(given: str, size: int) -> DataConfig:
    """The data set by its name, what `tsbench pack` has written, or a folder of images."""
    if given == EMBEDDED:
        return DataConfig(given)
    is_packed = (Path(given) / "train_images.npy").exists()
    return DataConfig("packed" if is_packed else "folder", given, size)


def _no_images(channels: int, size: int) -> ImageSet:
    return TensorImages(torch.empty(0, channels, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
