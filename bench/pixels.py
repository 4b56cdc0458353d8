"""As which images is a run drawn, and with which are they compared?

Of a data set of pixels, both are its own. Latents are drawn as the images that an autoencoder makes of them
(`evaluation.autoencoder`), and these are compared with the images that the latents came from (`evaluation.images`), with a
reference file (`evaluation.reference`), or with both. Without an autoencoder, a run on latents ends without scores.
"""

from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from bench.autoencoder import Layout, check_loadable, digest_of, load_autoencoder, read_layout
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, ImageSet, load_data
from bench.data.source import TensorImages

EMBEDDED = "digits"  # the one data set that has no folder


@dataclass(frozen=True)
class Decoder:
    """Latents as they are trained on -> pixels, (B, C, H, W) in about [-1, 1]. It is loaded when it is first called."""

    layout: Layout
    scaling: float

    def __call__(self, x: Tensor) -> Tensor:
        return load_autoencoder(self.layout, x.device).decode(x / self.scaling)

    def load(self, device: torch.device) -> None:
        """Now, for the calls that follow."""
        load_autoencoder(self.layout, torch.empty(0, device=device).device)  # as tensors know it: cuda:0, not cuda

    def shape_of(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the image that a latent (c, h, w) becomes."""
        _, height, width = latent
        return self.layout.image_channels, height * self.layout.shrinkage, width * self.layout.shrinkage

    def describe(self) -> str:
        """For a protocol: all that decides about pixels, but the latents. Reads the weights to hash them."""
        library = f"diffusers {metadata.version('diffusers')}"
        return f"{library} AutoencoderKL {digest_of(self.layout)} scaling {self.scaling!r}"


def decoder_of(config: EvaluationConfig, data: DataSource) -> Decoder | None:
    """None for a data set of pixels, and for latents without an autoencoder. ValueError if it does not fit the data, or could
    not be loaded when it is needed.
    """
    if not config.autoencoder:
        return None
    if data.pixels:
        raise ValueError(f"evaluation.autoencoder is {config.autoencoder!r}, but {data.name} are pixels already: leave it empty")
    layout = read_layout(Path(config.autoencoder))
    if layout.latent_channels != data.channels:
        raise ValueError(
            f"the autoencoder in {layout.folder} has latents of {layout.latent_channels} channels, but those in "
            f"data.path have {data.channels}: give the one that they were encoded with"
        )
    check_loadable(layout)
    return Decoder(layout, data.scaling)


def check_drawn(config: EvaluationConfig, data: DataSource) -> None:
    """ValueError for latents that nothing decodes."""
    if not data.pixels and decoder_of(config, data) is None:
        raise ValueError(
            f"data set {data.name!r} holds latents: give evaluation.autoencoder, the folder of the autoencoder that decodes them"
        )


def pixels_of(config: EvaluationConfig, data: DataSource) -> DataSource | None:
    """What the samples of a run on `data` are as images: the data set to score them against; None if they are not decoded.

    Where latents are compared with a reference file alone, its sets are empty. ValueError in one sentence for what does not
    fit.
    """
    decoder = decoder_of(config, data)
    if decoder is None:
        if config.images:
            why = f"{data.name} are pixels already" if data.pixels else "without evaluation.autoencoder nothing is decoded"
            raise ValueError(f"evaluation.images is {config.images!r}, but {why}: leave it empty")
        return data if data.pixels else None
    channels, size, _ = decoder.shape_of((data.channels, data.input_size, data.input_size))
    if not config.images:
        empty = _no_images(channels, size)
        images = DataSource("none", data.num_classes, channels, size, empty, empty, lambda: "none")
    else:
        images = _images(config.images, size)
        _check_same(images, data, (channels, size), config.images)
    return replace(images, decoder=decoder.describe, decoded=data)


def pixels_needed(config: EvaluationConfig, data: DataSource) -> DataSource:
    """As `pixels_of`; ValueError for latents that nothing decodes."""
    check_drawn(config, data)
    pixels = pixels_of(config, data)
    assert pixels is not None
    return pixels


def _images(given: str, size: int) -> DataSource:
    """The data set by its name, what `tsbench pack` has written, or a folder of images."""
    is_packed = (Path(given) / "train_images.npy").exists()
    config = DataConfig("packed", given) if is_packed else DataConfig("folder", given, size)
    try:
        return load_data(DataConfig(given) if given == EMBEDDED else config)
    except ValueError as error:
        raise ValueError(f"evaluation.images is {given!r}, and as data.path: {error}") from None


def _check_same(images: DataSource, latents: DataSource, shape: tuple[int, int], given: str) -> None:
    """ValueError unless the images can be those that the latents came from."""
    found, wanted = (images.channels, images.input_size), shape
    if not images.pixels or found != wanted:
        raise ValueError(
            f"evaluation.images {given} has images of {found[0]}x{found[1]}x{found[1]}, but the latents are decoded to "
            f"{wanted[0]}x{wanted[1]}x{wanted[1]}: give what they were encoded from"
        )
    for part in ("train", "heldout"):
        own, other = getattr(images, part).labels, getattr(latents, part).labels
        if not torch.equal(own, other):
            raise ValueError(
                f"evaluation.images {given} has {len(own)} images in its {part} part, whose classes are not those of the "
                f"{len(other)} latents: give what they were encoded from"
            )


def _no_images(channels: int, size: int) -> ImageSet:
    return TensorImages(torch.empty(0, channels, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
