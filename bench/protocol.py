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


def check_scoring(config: EvaluationConfig, data: DataSource) -> None:
    """ValueError in one sentence if a data set cannot be scored so. Nothing is hashed, and of the data no image is read."""
    check_pixels(data)
    _check_extractor_fits(config.extractor, data)
    if config.sampler != "ddim" and config.eta != 0:
        raise ValueError(f"evaluation.eta is {config.eta}, which only the ddim sampler has: set it to 0 for {config.sampler}")
    fidelity.check_weights(config.extractor, config.extractor_weights)
    if config.reference:
        _check_reference(config, data)
    _check_counts(config, data)


def check_if_scored(config: EvaluationConfig, data: DataSource) -> None:
    """`check_scoring` for a run, which on latents ends without scores, and cannot have them on its way."""
    if data.pixels:
        check_scoring(config, data)
    elif config.curve_every:
        raise ValueError(f"evaluation.curve_every is {config.curve_every}, but {data.name} are not scored: set it to 0")


def protocol_of(config: EvaluationConfig, data: DataSource) -> EvalProtocol:
    """The protocol that a configuration and a data set make, which is read for it; ValueError as by `check_scoring`."""
    check_scoring(config, data)
    return EvalProtocol(
        extractor=config.extractor,
        extractor_sha256=fidelity.weights_hash(config.extractor, config.extractor_weights),
        data=data.name,
        data_sha256=data.content_hash,
        reference="adm" if config.reference else "train",
        reference_sha256=hash_file(Path(config.reference)) if config.reference else data.content_hash,
        num_samples=config.num_samples,
        sampler=config.sampler,
        steps=config.steps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        guidance_channels=config.guidance_channels,
        guidance_start=config.guidance_start,
        guidance_stop=config.guidance_stop,
        solver=solver_of(config.sampler),
        precision=config.precision,
        seed=config.seed,
        block_size=config.block_size,
        kid_subset_size=config.kid_subset_size,
        kid_kernel="(x.y/width + 1)^3" if config.extractor == "inception" else "(x.y + 1)^3 of features of unit length",
        extractor_path=config.extractor_weights,
        reference_path=config.reference,
    )


def protocol_if_scored(config: EvaluationConfig, data: DataSource) -> EvalProtocol | None:
    """As `protocol_of`; None for latents, of which there are no images to score."""
    return protocol_of(config, data) if data.pixels else None


def hashed_by_rank_0(data: DataSource, world: World) -> DataSource:
    """The same data set, which one rank reads to hash it for all; all must ask for its hash at the same place."""

    def fingerprint() -> str:
        with world.together():
            own = data.content_hash if world.is_main else ""
        return world.share_text(own)

    return replace(data, fingerprint=fingerprint)


def differences(a: EvalProtocol | Mapping[str, Any], b: EvalProtocol | Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two protocols, or the contents of two, differ."""
    left, right = (dict(p.content if isinstance(p, EvalProtocol) else p) for p in (a, b))
    missing = object()
    return sorted(name for name in {*left, *right} if left.get(name, missing) != right.get(name, missing))


def _check_reference(config: EvaluationConfig, data: DataSource) -> None:
    path = Path(config.reference)
    width, expected = len(adm.read_reference(path).mean), fidelity.FEATURE_WIDTHS[config.extractor]
    if width != expected:
        raise ValueError(
            f"{path} has statistics of {width} features, but {config.extractor} has {expected}: choose another reference"
        )
    shape = adm.image_shape(path)
    own = (data.channels, data.input_size, data.input_size)
    if shape is not None and shape[1:] != own:
        raise ValueError(f"{path} has images of shape {shape[1:]}, but {data.name} has {own}: choose another reference")


def check_pixels(data: DataSource) -> None:
    """ValueError if a data set holds latents: taken for images, they would be drawn and scored as what they are not."""
    if not data.pixels:
        raise ValueError(
            f"data set {data.name!r} holds latents, and there is no decoder here to draw or score images of them: "
            "a run on them is trained to its end without scores; decode elsewhere, or choose a data set of pixels"
        )


def _check_extractor_fits(extractor: str, data: DataSource) -> None:
    if extractor == "digits" and data.name != "digits":
        raise ValueError(f"evaluation.extractor is digits, but the data set is {data.name!r}: choose inception")
    if extractor == "inception" and data.channels != 3:
        raise ValueError(
            f"evaluation.extractor is inception, which needs 3 channels, but {data.name} has {data.channels}: choose digits"
        )


def _check_counts(config: EvaluationConfig, data: DataSource) -> None:
    """Too few images for a metric: Kernel distance subsets, one image per part of the Inception Score, a covariance."""
    least = max(config.kid_subset_size, EvalProtocol.inception_score_splits, EvalProtocol.neighbours + 1)
    if config.num_samples < least:
        raise ValueError(
            f"evaluation.num_samples is {config.num_samples}, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {config.kid_subset_size}): draw more, or lower evaluation.kid_subset_size"
        )
    shape = adm.image_shape(Path(config.reference)) if config.reference else None
    num_reference = len(data.train) if shape is None else shape[0]
    least = max(config.kid_subset_size, EvalProtocol.neighbours + 1)
    if num_reference < least:
        raise ValueError(
            f"there are {num_reference} images to compare samples with, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {config.kid_subset_size}): lower it, or use a larger set"
        )
    if len(data.heldout) < 2:
        raise ValueError(f"{len(data.heldout)} images are held out, too few for a covariance: hold out more")


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
