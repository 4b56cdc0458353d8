"""How good are a run's images?

Lower is better for distances, higher for the rest:

    fid_train, fid_heldout   Frechet distance (arXiv 1706.08500) to the training set (or reference) and to held-out images
    sfid                     Frechet distance of spatial features (arXiv 2103.03841) to those of a reference file that has them
    kid                      Kernel distance to the training set (or the reference's images)
    precision, recall        fidelity and coverage, against the same
    inception_score          of the extractor's classes
    class_accuracy           share of images that the extractor recognises as what was asked for (digits)
    nearest_neighbour        mean RMS pixel distance (pixels in 0..1) to the nearest training image: near 0 is copying

Latents that are compared with a reference file alone have no fid_heldout and no nearest_neighbour.

Ranks share what grows with the number of images: features and the search for neighbours. Rank 0 computes the rest, so
that the scores are the same to the bit for any number of ranks.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from bench import adm, fidelity
from bench.data import DataSource, ImageSet, read_uint8
from bench.data.source import spread_choice
from bench.distance import frechet_distance, mean_and_covariance, nearest_squared, rms_distance
from bench.distributed import World
from bench.protocol import EvalProtocol, check_data, check_samples, differences, protocol_of
from bench.reference import Reference, make_reference

__all__ = ["EvalProtocol", "differences", "floor_scores", "frechet_distance", "protocol_of", "score"]

METRICS = ("fid_train", "fid_heldout", "sfid", "kid", "precision", "recall", "inception_score", "nearest_neighbour")


class Seconds(dict[str, float]):
    """What scoring took, by part: features (of samples), reference (its features), comparison (all that follows)."""

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self[part] = self.get(part, 0.0) + time.perf_counter() - started


class Seen(NamedTuple):
    """What is kept of images that were looked at."""

    features: dict[str, Tensor]  # name -> (n, width) float32 on the CPU; rank 0 has all of them, the others none
    nearest: Tensor  # (n,) float64: squared pixel distance to the nearest training image


def score(
    samples: Tensor,
    labels: Tensor,
    protocol: EvalProtocol,
    data: DataSource,
    device: str = "cpu",
    world: World | None = None,
    references: Path | None = None,
    seconds: Seconds | None = None,
) -> dict[str, float]:
    """The scores of `samples` uint8 (n, C, H, W), asked to be of classes `labels` int64 (n,); n is the protocol's.

    Every value is finite and `n` is among them. All ranks give the same samples and get the same scores. Raises ValueError
    if the samples are not what the protocol says; what fails on one rank ends the call on all. What samples are compared
    with is kept in the folder `references`, for all that come later; `seconds` is told what took how long.
    """
    world, seconds = world or World(), Seconds() if seconds is None else seconds
    prepare(protocol, data, device, world)
    with world.together():
        check_samples(samples, labels, protocol, data)
    seen = look_at(samples, protocol, data, device, world, seconds)
    return score_seen(seen, labels, protocol, data, device, world, references, seconds)


def prepare(protocol: EvalProtocol, data: DataSource, device: str, world: World) -> None:
    """Refuse what cannot be scored before anything is computed; on all ranks, as weights may be missing on one machine."""
    with world.together():
        check_data(protocol, data)
        _extractor(protocol, device)


def look_at(samples: Tensor, protocol: EvalProtocol, data: DataSource, device: str, world: World, seconds: Seconds) -> Seen:
    """All that scores need of these samples, uint8 (n, C, H, W)."""
    features = features_of(samples, protocol, device, world, seconds)
    with seconds.of("comparison"):
        return Seen(features, nearest_squared([samples], data.train, device, world))


def features_of(samples: Tensor, protocol: EvalProtocol, device: str, world: World, seconds: Seconds) -> dict[str, Tensor]:
    """The part of `Seen` for which no other images are read."""
    with seconds.of("features"):
        return _extract(samples, protocol, device, world)


def score_seen(
    seen: Seen,
    labels: Tensor,
    protocol: EvalProtocol,
    data: DataSource,
    device: str,
    world: World,
    references: Path | None,
    seconds: Seconds,
) -> dict[str, float]:
    """The scores of samples that were looked at."""
    with seconds.of("reference"):
        reference = _reference(protocol, data, device, world, references)
    with seconds.of("comparison"):
        num_values = data.channels * data.input_size**2
        names = metrics_of(protocol, data)
        scores = {"nearest_neighbour": rms_distance(seen.nearest, num_values)} if len(data.train) else {}
        with world.together():
            if reference is not None:
                scores |= _compare(seen.features, labels, reference, protocol, device)
                assert scores.keys() == set(names) and all(math.isfinite(value) for value in scores.values()), scores
        shared = {name: world.agree(scores.get(name, 0.0), torch.device("cpu")) for name in names}
    return {**shared, "n": len(labels)}


def metrics_of(protocol: EvalProtocol, data: DataSource) -> list[str]:
    """Those that samples can be scored by."""
    missing = {"fid_heldout": not len(data.heldout), "nearest_neighbour": not len(data.train), "sfid": not protocol.has_spatial}
    names = [name for name in METRICS if not missing.get(name)]
    return [*names, "class_accuracy"] if protocol.extractor == "digits" else names  # its classes are the data's


def why_no_floor(protocol: EvalProtocol, data: DataSource) -> str:
    """In one sentence; empty if there are images enough."""
    if not len(data.heldout):
        return "there are no images to compute a floor from, only a reference file: set evaluation.images to have one"
    for images, name in ((data.heldout, "held-out"), (data.train, "training")):
        if len(images) < protocol.num_samples:
            return (
                f"evaluation.num_samples is {protocol.num_samples}, but there are only {len(images)} {name} images to compute "
                f"a floor from: set it to {len(images)} or less"
            )
    return ""


def floor_scores(protocol: EvalProtocol, data: DataSource, device: str = "cpu") -> dict[str, float]:
    """Real images against real ones at the same n: what a perfect model would score. They do not go through a decoder.

    The first n held-out images stand for samples. For fid_heldout, n training images do instead, spread evenly through
    each class, without randomness.
    """
    count = protocol.num_samples
    if why := why_no_floor(protocol, data):
        raise ValueError(why)
    images, labels = _images(data.heldout, torch.arange(count))
    seen = look_at(images, protocol, data, device, World(), Seconds())
    scores = score_seen(seen, labels, protocol, data, device, World(), None, Seconds())
    chosen, _ = _images(data.train, spread_choice(data.train.labels, count))
    features = _extract(chosen, protocol, device, World())[fidelity.layer(protocol.extractor, "fid")]
    reference = _reference(protocol, data, device, World(), None)
    assert reference is not None and reference.heldout is not None
    scores["fid_heldout"] = frechet_distance(*mean_and_covariance(features), *reference.heldout)
    return scores


def _compare(
    features: dict[str, Tensor], labels: Tensor, reference: Reference, protocol: EvalProtocol, device: str
) -> dict[str, float]:
    """The scores that follow from features alone."""
    pooled, logits = (features[fidelity.layer(protocol.extractor, metric)] for metric in ("fid", "isc"))
    statistics = mean_and_covariance(pooled)
    precision, recall = fidelity.precision_and_recall(pooled, reference.features, protocol.neighbours, device)
    unit_norm = protocol.extractor != "inception"
    scores = {
        "fid_train": frechet_distance(*statistics, *reference.train),
        "kid": fidelity.kernel_distance(pooled, reference.features, protocol.kid_subsets, protocol.kid_subset_size, unit_norm),
        "precision": precision,
        "recall": recall,
        "inception_score": fidelity.inception_score(logits, protocol.inception_score_splits),
    }
    if reference.heldout is not None:
        scores["fid_heldout"] = frechet_distance(*statistics, *reference.heldout)
    if protocol.has_spatial:
        stored, spatial = adm.read_reference(Path(protocol.reference_path)), mean_and_covariance(features[fidelity.SPATIAL])
        assert stored.spatial_mean is not None and stored.spatial_covariance is not None
        scores["sfid"] = frechet_distance(*spatial, stored.spatial_mean, stored.spatial_covariance)
    if protocol.extractor == "digits":
        scores["class_accuracy"] = (logits.argmax(1) == labels.cpu()).double().mean().item()
    return scores


@lru_cache(maxsize=1)
def _extractor(protocol: EvalProtocol, device: str) -> FeatureExtractorBase:
    """Loaded once for all runs that one process scores."""
    layers = fidelity.layers_of(protocol.extractor, (*fidelity.METRICS, *(["sfid"] if protocol.has_spatial else [])))
    return fidelity.build_extractor(protocol.extractor, protocol.extractor_sha256, protocol.extractor_path, layers, device)


def _extract(images: Tensor | ImageSet, protocol: EvalProtocol, device: str, world: World) -> dict[str, Tensor]:
    return fidelity.extract_features(images, _extractor(protocol, device), protocol.feature_batch_size, world)


@lru_cache(maxsize=1)
def _reference(protocol: EvalProtocol, data: DataSource, device: str, world: World, references: Path | None) -> Reference | None:
    """Made or read once for all runs that one process scores; rank 0 gets it."""
    return make_reference(protocol, data, lambda images: _extract(images, protocol, device, world), device, world, references)


def _images(images: ImageSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    return read_uint8(images, indices), images.labels[indices]
