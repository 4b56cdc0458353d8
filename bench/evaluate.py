"""How good are a run's images, under which frozen protocol?

A protocol is all that determines a score, and has a hash; scores of different hashes are never set side by side.
Lower is better for distances, higher for the rest:

    fid_train, fid_heldout   Frechet distance (arXiv 1706.08500) to the training set (or reference) and to held-out images
    kid                      Kernel distance to the training set (or the reference's images)
    precision, recall        fidelity and coverage, against the same
    inception_score          of the extractor's classes
    class_accuracy           share of images that the extractor recognises as what was asked for (digits)
    nearest_neighbour        mean RMS pixel distance (pixels in 0..1) to the nearest training image: near 0 is copying

Ranks share what grows with the number of images: features and the search for neighbours. Rank 0 computes the rest, so
that the scores are the same to the bit for any number of ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from bench import adm, fidelity
from bench.config import EvaluationConfig, content_hash
from bench.data import UINT8_RULE, DataSource, ImageSet, to_uint8
from bench.data.source import hash_file, spread_choice
from bench.distance import frechet_distance, mean_and_covariance, nearest_neighbour
from bench.distributed import World

__all__ = ["EvalProtocol", "differences", "floor_scores", "frechet_distance", "protocol_of", "score"]

METRICS = ("fid_train", "fid_heldout", "kid", "precision", "recall", "inception_score", "nearest_neighbour")
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
    extractor_path: str = field(default="", compare=False)
    reference_path: str = field(default="", compare=False)

    @property
    def content(self) -> dict[str, Any]:
        """What counts, by name: no paths."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}

    @property
    def hash(self) -> str:
        return content_hash(self.content)


def protocol_of(config: EvaluationConfig, data: DataSource) -> EvalProtocol:
    """The protocol that a configuration and a data set make; ValueError in one sentence if they cannot be scored so."""
    _check_extractor_fits(config.extractor, data)
    if config.sampler != "ddim" and config.eta != 0:
        raise ValueError(f"evaluation.eta is {config.eta}, which only the ddim sampler has: set it to 0 for {config.sampler}")
    protocol = EvalProtocol(
        extractor=config.extractor,
        extractor_sha256=fidelity.weights_hash(config.extractor, config.extractor_weights),
        data=data.name,
        data_sha256=data.content_hash,
        reference="adm" if config.reference else "train",
        reference_sha256=_reference_hash(config, data),
        num_samples=config.num_samples,
        sampler=config.sampler,
        steps=config.steps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        guidance_channels=config.guidance_channels,
        seed=config.seed,
        block_size=config.block_size,
        kid_subset_size=config.kid_subset_size,
        kid_kernel="(x.y/width + 1)^3" if config.extractor == "inception" else "(x.y + 1)^3 of features of unit length",
        extractor_path=config.extractor_weights,
        reference_path=config.reference,
    )
    _check_counts(protocol, data)
    return protocol


def differences(a: EvalProtocol | Mapping[str, Any], b: EvalProtocol | Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two protocols, or the contents of two, differ."""
    left, right = (dict(p.content if isinstance(p, EvalProtocol) else p) for p in (a, b))
    missing = object()
    return sorted(name for name in {*left, *right} if left.get(name, missing) != right.get(name, missing))


def score(
    samples: Tensor, labels: Tensor, protocol: EvalProtocol, data: DataSource, device: str = "cpu", world: World | None = None
) -> dict[str, float]:
    """The scores of `samples` uint8 (n, C, H, W), asked to be of classes `labels` int64 (n,); n is the protocol's.

    Every value is finite and `n` is among them. All ranks give the same samples and get the same scores. Raises ValueError
    if the samples are not what the protocol says; what fails on one rank ends the call on all.
    """
    world = world or World()
    with world.together():
        _check_samples(samples, labels, protocol, data)
        if not torch.equal(labels.cpu(), torch.arange(len(labels)) % data.num_classes):
            raise ValueError(f"the labels of the samples do not follow the protocol ({LABEL_SCHEME}): draw them in that order")
        _extractor(protocol, device)  # its weights may be missing on one machine
    return _score(samples, labels, protocol, data, device, world)


def floor_scores(protocol: EvalProtocol, data: DataSource, device: str = "cpu") -> dict[str, float]:
    """Real images against real ones at the same n: what a perfect model would score.

    The first n held-out images stand for samples. For fid_heldout, n training images do instead, spread evenly through
    each class, without randomness.
    """
    count = protocol.num_samples
    if len(data.heldout) < count:
        raise ValueError(
            f"evaluation.num_samples is {count}, but only {len(data.heldout)} images are held out to compute a floor from: "
            f"set it to {len(data.heldout)} or less"
        )
    if len(data.train) < count:
        raise ValueError(
            f"evaluation.num_samples is {count}, but there are only {len(data.train)} training images to compute a floor from: "
            f"set it to {len(data.train)} or less"
        )
    images, labels = _images(data.heldout, torch.arange(count))
    scores = _score(images, labels, protocol, data, device, World())
    chosen, _ = _images(data.train, spread_choice(data.train.labels, count))
    features = _extract(chosen, protocol, device, World())[fidelity.layer(protocol.extractor, "fid")]
    reference = _reference(protocol, data, device, World())
    assert reference is not None
    scores["fid_heldout"] = frechet_distance(*mean_and_covariance(features), *reference.heldout)
    return scores


@dataclass(frozen=True, eq=False)
class _Reference:
    """What samples are compared with."""

    train: tuple[Tensor, Tensor]  # mean and covariance: of the training set, or the reference file's
    heldout: tuple[Tensor, Tensor]
    features: Tensor  # (m, width): of the training set, or of the reference file's images


@lru_cache(maxsize=1)
def _reference(protocol: EvalProtocol, data: DataSource, device: str, world: World) -> _Reference | None:
    """Computed once for all runs that one process scores, with the help of all ranks; rank 0 gets it."""
    name = fidelity.layer(protocol.extractor, "fid")
    with world.together():
        path = Path(protocol.reference_path)
        images = adm.read_images(path) if protocol.reference == "adm" and adm.image_shape(path) is not None else None
    of_heldout = _extract(data.heldout, protocol, device, world)
    of_train = _extract(data.train if images is None else images, protocol, device, world)
    reference: _Reference | None = None
    with world.together():
        if world.is_main:
            stored = adm.read_reference(path) if protocol.reference == "adm" else None
            train = (stored.mean, stored.covariance) if stored else mean_and_covariance(of_train[name])
            reference = _Reference(train, mean_and_covariance(of_heldout[name]), of_train[name])
    return reference


def _score(
    samples: Tensor, labels: Tensor, protocol: EvalProtocol, data: DataSource, device: str, world: World
) -> dict[str, float]:
    features = _extract(samples, protocol, device, world)
    reference = _reference(protocol, data, device, world)
    scores = {"nearest_neighbour": nearest_neighbour(samples, data.train, device, world)}
    names = [*METRICS, "class_accuracy"] if protocol.extractor == "digits" else METRICS  # its classes are the data's
    with world.together():
        if reference is not None:
            scores |= _compare(features, labels, reference, protocol)
            assert scores.keys() == set(names) and all(math.isfinite(value) for value in scores.values()), scores
    shared = {name: world.agree(scores.get(name, 0.0), torch.device("cpu")) for name in names}
    return {**shared, "n": len(samples)}


def _compare(features: dict[str, Tensor], labels: Tensor, reference: _Reference, protocol: EvalProtocol) -> dict[str, float]:
    """The scores that follow from features alone."""
    pooled, logits = (features[fidelity.layer(protocol.extractor, metric)] for metric in ("fid", "isc"))
    statistics = mean_and_covariance(pooled)
    precision, recall = fidelity.precision_and_recall(pooled, reference.features, protocol.neighbours)
    unit_norm = protocol.extractor != "inception"
    scores = {
        "fid_train": frechet_distance(*statistics, *reference.train),
        "fid_heldout": frechet_distance(*statistics, *reference.heldout),
        "kid": fidelity.kernel_distance(pooled, reference.features, protocol.kid_subsets, protocol.kid_subset_size, unit_norm),
        "precision": precision,
        "recall": recall,
        "inception_score": fidelity.inception_score(logits, protocol.inception_score_splits),
    }
    if protocol.extractor == "digits":
        scores["class_accuracy"] = (logits.argmax(1) == labels.cpu()).double().mean().item()
    return scores


@lru_cache(maxsize=1)
def _extractor(protocol: EvalProtocol, device: str) -> FeatureExtractorBase:
    """Loaded once for all runs that one process scores."""
    return fidelity.build_extractor(protocol.extractor, protocol.extractor_sha256, protocol.extractor_path, device=device)


def _extract(images: Tensor | ImageSet, protocol: EvalProtocol, device: str, world: World) -> dict[str, Tensor]:
    return fidelity.extract_features(images, _extractor(protocol, device), protocol.feature_batch_size, world)


def _images(images: ImageSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    x, labels = images.batch(indices)
    return to_uint8(x), labels


def _reference_hash(config: EvaluationConfig, data: DataSource) -> str:
    """Of the reference file, after a look at whether it fits; of the data set, if there is none."""
    if not config.reference:
        return data.content_hash
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
    return hash_file(path)


def _check_extractor_fits(extractor: str, data: DataSource) -> None:
    if not data.pixels:
        raise ValueError(f"data set {data.name!r} holds latents, which cannot be scored as images: evaluate a data set of pixels")
    if extractor == "digits" and data.name != "digits":
        raise ValueError(f"evaluation.extractor is digits, but the data set is {data.name!r}: choose inception")
    if extractor == "inception" and data.channels != 3:
        raise ValueError(
            f"evaluation.extractor is inception, which needs 3 channels, but {data.name} has {data.channels}: choose digits"
        )


def _check_counts(protocol: EvalProtocol, data: DataSource) -> None:
    """Too few images for a metric: Kernel distance subsets, one image per part of the Inception Score, a covariance."""
    least = max(protocol.kid_subset_size, protocol.inception_score_splits, protocol.neighbours + 1)
    if protocol.num_samples < least:
        raise ValueError(
            f"evaluation.num_samples is {protocol.num_samples}, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {protocol.kid_subset_size}): draw more, or lower evaluation.kid_subset_size"
        )
    shape = adm.image_shape(Path(protocol.reference_path)) if protocol.reference == "adm" else None
    num_reference = len(data.train) if shape is None else shape[0]
    least = max(protocol.kid_subset_size, protocol.neighbours + 1)
    if num_reference < least:
        raise ValueError(
            f"there are {num_reference} images to compare samples with, but the metrics need {least} "
            f"(evaluation.kid_subset_size is {protocol.kid_subset_size}): lower it, or use a larger set"
        )
    if len(data.heldout) < 2:
        raise ValueError(f"{len(data.heldout)} images are held out, too few for a covariance: hold out more")


def _check_samples(samples: Tensor, labels: Tensor, protocol: EvalProtocol, data: DataSource) -> None:
    if data.content_hash != protocol.data_sha256:
        raise ValueError(f"the data set {data.name!r} is not the one the protocol was made for: make the protocol from it again")
    expected = (protocol.num_samples, data.channels, data.input_size, data.input_size)
    if samples.dtype != torch.uint8 or tuple(samples.shape) != expected:
        raise ValueError(f"samples are {samples.dtype} {tuple(samples.shape)}, but the protocol asks for torch.uint8 {expected}")
    if labels.dtype != torch.int64 or len(labels) != len(samples) or labels.ndim != 1:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, but there must be one int64 for each of {len(samples)} samples"
        )
