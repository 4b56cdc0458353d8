"""Under which frozen protocol are images scored?

A protocol is all that determines a score, and has a hash; scores of different hashes are never set side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor

from bench import adm, fidelity
from bench.config import ONLY_WHEN_SET, EvaluationConfig, content_hash
from bench.data import UINT8_RULE, DataSource
from bench.data.source import hash_file
from bench.distributed import World
from bench.pixels import pixels_of
from bench.walk import solver_of

LABEL_SCHEME = "balanced: image i has class i modulo the number of classes"


@dataclass(frozen=True)
class EvalProtocol:
    """All that determines a score, apart from the network. Paths say where to find what the hashes name; they do not count."""

    extractor: str
    extractor_sha256: str
    data: str
    data_sha256: str
    reference: str  # train: the training set; adm: a reference file
    reference_sha256: str
    num_samples: int
    sampler: str
    steps: str
    eta: float
    guidance_scale: float
    guidance_channels: int
    seed: int
    block_size: int
    kid_subset_size: int
    kid_subsets: int = 100
    kid_kernel: str = ""
    neighbours: int = 3  # k of precision and recall
    inception_score_splits: int = 10
    feature_batch_size: int = 50
    label_scheme: str = LABEL_SCHEME
    decoder: str = "none"
    precision: str = "fp32"
    uint8_rule: str = UINT8_RULE
    torch_fidelity: str = torch_fidelity.__version__
    guidance_start: int = 0  # these three count only where they are set
    guidance_stop: int = 0
    solver: str = ""  # the library that takes the steps, if it is not this one
    extractor_path: str = field(default="", compare=False)
    reference_path: str = field(default="", compare=False)

    @property
    def content(self) -> dict[str, Any]:
        """What counts, by name: no paths, and nothing that is left unset of what older protocols did not have."""
        counting = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}
        return {name: value for name, value in counting.items() if value or name not in ONLY_WHEN_SET}

    @property
    def hash(self) -> str:
        return content_hash(self.content)

    @property
    def has_spatial(self) -> bool:
        """Whether samples are compared by spatial features, too: with a reference file that has their statistics."""
        return self.extractor == "inception" and self.reference == "adm" and adm.has_spatial(Path(self.reference_path))


def check_scoring(config: EvaluationConfig, pixels: DataSource) -> None:
    """ValueError in one sentence if samples cannot be compared with these images so. Nothing is hashed, no image is read."""
    if not len(pixels.train) and (not config.reference or adm.image_shape(Path(config.reference)) is None):  # decoded latents
        raise ValueError(
            "there are no images to compare samples with: set evaluation.images, or evaluation.reference to a file that has some"
        )
    _check_extractor_fits(config.extractor, pixels)
    if config.sampler != "ddim" and config.eta != 0:
        raise ValueError(f"evaluation.eta is {config.eta}, which only the ddim sampler has: set it to 0 for {config.sampler}")
    fidelity.check_weights(config.extractor, config.extractor_weights)
    if config.reference:
        _check_reference(config, pixels)
    _check_counts(config, pixels)


def pixels_to_score(config: EvaluationConfig, data: DataSource) -> DataSource | None:
    """What the samples of a run are compared with, by `check_scoring` found fit for it; None for latents that nothing decodes,
    which end without scores, and cannot have them on their way.
    """
    pixels = pixels_of(config, data)
    if pixels is not None:
        check_scoring(config, pixels)
    elif config.curve_every:
        raise ValueError(
            f"evaluation.curve_every is {config.curve_every}, but {data.name} are not scored without evaluation.autoencoder: "
            "give one, or set it to 0"
        )
    return pixels


def protocol_of(config: EvaluationConfig, pixels: DataSource) -> EvalProtocol:
    """The protocol that a configuration and the images to compare with (`bench.pixels.pixels_of`) make, which are read for
    it; ValueError as by `check_scoring`.
    """
    assert pixels.pixels
    check_scoring(config, pixels)
    return EvalProtocol(
        extractor=config.extractor,
        extractor_sha256=fidelity.weights_hash(config.extractor, config.extractor_weights),
        data=pixels.name,
        data_sha256=pixels.content_hash,
        reference="adm" if config.reference else "train",
        reference_sha256=hash_file(Path(config.reference)) if config.reference else pixels.content_hash,
        num_samples=config.num_samples,
        sampler=config.sampler,
        steps=config.steps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        guidance_channels=config.guidance_channels,
        guidance_start=config.guidance_start,
        guidance_stop=config.guidance_stop,
        solver=solver_of(config.sampler),
        decoder=f"{pixels.decoder()} of latents {pixels.decoded.content_hash}" if pixels.decoded else pixels.decoder(),
        precision=config.precision,
        seed=config.seed,
        block_size=config.block_size,
        kid_subset_size=config.kid_subset_size,
        kid_kernel="(x.y/width + 1)^3" if config.extractor == "inception" else "(x.y + 1)^3 of features of unit length",
        extractor_path=config.extractor_weights,
        reference_path=config.reference,
    )


def hashed_by_rank_0(data: DataSource, world: World, digests: Path | None = None) -> DataSource:
    """The same data set (and the latents that it is decoded from), which one rank reads to hash it for all; all must ask for its
    hash at the same place. It is kept in the folder `digests` for the runs that follow.
    """
    read = replace(data, digests=digests)
    decoded = data.decoded and hashed_by_rank_0(data.decoded, world, digests)

    def fingerprint() -> str:
        with world.together():
            own = read.content_hash if world.is_main else ""
        return world.share_text(own)

    return replace(data, fingerprint=fingerprint, stamp=None, decoded=decoded)


def differences(a: EvalProtocol | Mapping[str, Any], b: EvalProtocol | Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two protocols, or the contents of two, differ."""
    left, right = (dict(p.content if isinstance(p, EvalProtocol) else p) for p in (a, b))
    missing = object()
    return sorted(name for name in {*left, *right} if left.get(name, missing) != right.get(name, missing))


def _check_reference(config: EvaluationConfig, data: DataSource) -> None:
    path = Path(config.reference)
    stored, expected = adm.read_reference(path), fidelity.FEATURE_WIDTHS[config.extractor]
    width = len(stored.mean)
    if width != expected:
        raise ValueError(
            f"{path} has statistics of {width} features, but {config.extractor} has {expected}: choose another reference"
        )
    if config.extractor == "inception" and stored.spatial_mean is not None and len(stored.spatial_mean) != fidelity.SPATIAL_WIDTH:
        raise ValueError(
            f"{path} has statistics of {len(stored.spatial_mean)} spatial features, but {config.extractor} has "
            f"{fidelity.SPATIAL_WIDTH}: choose another reference"
        )
    shape = adm.image_shape(path)
    own = (data.channels, data.input_size, data.input_size)
    if shape is not None and shape[1:] != own:
        raise ValueError(f"{path} has images of shape {shape[1:]}, but {data.name} has {own}: choose another reference")


def _check_extractor_fits(extractor: str, data: DataSource) -> None:
    if extractor == "digits" and data.name != "digits":
        raise ValueError("evaluation.extractor is digits, which knows the images of data set digits alone: choose inception")
    if extractor == "inception" and data.channels != 3:
        raise ValueError(
            f"evaluation.extractor is inception, which needs images of 3 channels, but here they have {data.channels}: choose "
            "digits for the data set digits; for others there is no extractor yet"
        )


def _check_counts(config: EvaluationConfig, pixels: DataSource) -> None:
    """Too few images for a metric: Kernel distance subsets, one image per part of the Inception Score, a covariance."""
    least = max(config.kid_subset_size, EvalProtocol.inception_score_splits, EvalProtocol.neighbours + 1)
    if config.num_samples < least:
        raise ValueError(
            f"evaluation.num_samples is {config.num_samples}, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {config.kid_subset_size}): draw more, or lower evaluation.kid_subset_size"
        )
    shape = adm.image_shape(Path(config.reference)) if config.reference else None
    num_reference = len(pixels.train) if shape is None else shape[0]
    least = max(config.kid_subset_size, EvalProtocol.neighbours + 1)
    if num_reference < least:
        raise ValueError(
            f"there are {num_reference} images to compare samples with, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {config.kid_subset_size}): lower it, or use a larger set"
        )
    if len(pixels.train) and len(pixels.heldout) < 2:
        raise ValueError(f"{len(pixels.heldout)} images are held out, too few for a covariance: hold out more")


def check_data(protocol: EvalProtocol, data: DataSource) -> None:
    """ValueError unless the protocol was made for this data set."""
    if data.content_hash != protocol.data_sha256:
        raise ValueError(f"the data set {data.name!r} is not the one the protocol was made for: make the protocol from it again")


def check_samples(samples: Tensor, labels: Tensor, protocol: EvalProtocol, data: DataSource) -> None:
    """ValueError unless these are the images and labels that the protocol asks for."""
    expected = (protocol.num_samples, data.channels, data.input_size, data.input_size)
    if samples.dtype != torch.uint8 or tuple(samples.shape) != expected:
        raise ValueError(f"samples are {samples.dtype} {tuple(samples.shape)}, but the protocol asks for torch.uint8 {expected}")
    if labels.dtype != torch.int64 or len(labels) != len(samples) or labels.ndim != 1:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, but there must be one int64 for each of {len(samples)} samples"
        )
    if not torch.equal(labels.cpu(), torch.arange(len(labels)) % data.num_classes):
        raise ValueError(f"the labels of the samples do not follow the protocol ({LABEL_SCHEME}): draw them in that order")
