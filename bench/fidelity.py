"""What does torch-fidelity compute for us, and how is it kept from surprising us?

Features go through its extractor machinery; Inception Score, Kernel distance, precision and recall through its
functions of features, so that each image is looked at once. Its cache is never used: it is keyed by names alone, lies
outside the project and is read by executing pickles. Nothing is fetched.

    Inception Score, arXiv 1606.03498    Kernel distance, arXiv 1801.01401    precision and recall, arXiv 1904.06991
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from bench.data import digits_classifier
from bench.data.source import ImageSet, hash_file, read_uint8
from bench.distributed import World
from bench.precision import full_precision

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0
INCEPTION_HINT = (
    f"fetch {INCEPTION_FILE} from torch-fidelity's release v0.2.0 on a machine with a network and give its path "
    "in evaluation.extractor_weights"
)
FEATURE_WIDTHS = {"digits": digits_classifier.FEATURE_WIDTH, "inception": 2048}
SPATIAL = "spatial"
SPATIAL_CHANNELS = 7  # of 17 x 17: 2023 features, about as many as pooled ones
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
PRECISION_RECALL_BATCH = 2000  # rows of the distance matrix held at a time
METRICS = ("isc", "fid", "kid", "prc")  # as torch-fidelity calls them
SUBSET_SEED = 2020  # torch-fidelity's default: which subsets the Kernel distance takes, how the Inception Score shuffles


class DigitsExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """The digits classifier, as torch-fidelity wants it: uint8 (n, 1, 8, 8) -> the features of `features_list`, in its order."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.network = digits_classifier.load_classifier()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.network(images)
        by_name = {"features": features, "logits": logits}
        return tuple(by_name[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class InceptionExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """torch-fidelity's Inception, uint8 (n, 3, H, W), with the features `spatial` (n, 2023) whose statistics are mu_s and sigma_s
    in ADM's files: the first channels of a 1x1 convolution in one of its blocks (TensorFlow's mixed_6/conv), channels last.
    """

    def __init__(self, name: str, features_list: list[str], **how: Any) -> None:
        super().__init__(name, features_list)
        self.inception = FeatureExtractorInceptionV3(name, [each for each in features_list if each != SPATIAL], **how)
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _: Any, __: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        by_name = self.inception.convert_features_tuple_to_dict(self.inception(images)) | {SPATIAL: self.spatial}
        return tuple(by_name[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return SPATIAL if metric == "sfid" else str(FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric))

    @staticmethod
    def can_be_compiled() -> bool:
        return False


EXTRACTORS: dict[str, type[Any]] = {"digits": DigitsExtractor, "inception": InceptionExtractor}


def layer(extractor: str, metric: str) -> str:
    """The name of the features that `metric` (isc, fid, kid, prc; of inception sfid, too) looks at."""
    return str(EXTRACTORS[extractor].get_default_feature_layer_for_metric(metric))


def layers_of(extractor: str, metrics: Sequence[str]) -> list[str]:
    """The names of all features that these metrics look at."""
    return sorted({layer(extractor, metric) for metric in metrics})


def weights_hash(extractor: str, weights: str) -> str:
    """SHA-256 of an extractor's weights; ValueError as by `check_weights`."""
    check_weights(extractor, weights)
    return digits_classifier.WEIGHTS_SHA256 if extractor == "digits" else hash_file(Path(weights))


def check_weights(extractor: str, weights: str) -> None:
    """ValueError if `weights` names no file, or names one where it is not needed."""
    if extractor == "digits":
        if weights:
            raise ValueError(
                f"evaluation.extractor_weights is {weights!r}, but the digits extractor brings its own weights: leave it empty"
            )
        return
    if not weights:
        raise ValueError(f"evaluation.extractor_weights is empty, and Inception's weights are not shipped: {INCEPTION_HINT}")
    if not Path(weights).is_file():
        raise ValueError(f"evaluation.extractor_weights is {weights}, where there is no file: {INCEPTION_HINT}")


def build_extractor(
    extractor: str, sha256: str, weights: str = "", layers: list[str] | None = None, device: str = "cpu"
) -> FeatureExtractorBase:
    """A feature extractor of torch-fidelity's, registered once under a name that carries its weights' hash.

    `layers`: the features wanted, in any order; by default all that `METRICS` need. Raises ValueError if the weights
    do not have the hash `sha256` or are not weights of this extractor.
    """
    if (found := weights_hash(extractor, weights)) != sha256:
        raise ValueError(f"the weights of {extractor} have SHA-256 {found}, but the protocol names {sha256}: give the same file")
    name = f"{extractor}-{sha256}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, EXTRACTORS[extractor])
    layers = layers or layers_of(extractor, METRICS)
    if extractor == "inception":
        _check_loads_without_executing(weights)
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw weights, to be replaced, from the global generator
            built = create_feature_extractor(
                name, layers, cuda=False, feature_extractor_weights_path=weights or None, verbose=False
            )
    except RuntimeError as error:  # from load_state_dict: names or shapes differ
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights} does not hold weights of torch-fidelity's Inception ({reason}): {INCEPTION_HINT}") from None
    return built.to(device)


def extract_features(
    images: Tensor | ImageSet, extractor: FeatureExtractorBase, batch_size: int, world: World | None = None
) -> dict[str, Tensor]:
    """uint8 (n, C, H, W), or a set that need not fit into memory -> name -> (n, width) float32 on the CPU.

    `batch_size` images are looked at together. Ranks share the batches; rank 0 gets all features in order, the others an
    empty dict. Raises ValueError if the images are not uint8 or if a feature is not finite, which torch-fidelity would let
    pass.
    """
    if isinstance(images, Tensor) and images.dtype != torch.uint8:
        raise ValueError(f"images to score are {images.dtype}: convert them with bench.data.to_uint8")

    def read(indices: Tensor) -> Tensor:
        return images[indices] if isinstance(images, Tensor) else read_uint8(images, indices)

    return _share_batches(len(images), read, extractor, batch_size, world or World())


def _share_batches(
    count: int, read: Callable[[Tensor], Tensor], extractor: FeatureExtractorBase, batch_size: int, world: World
) -> dict[str, Tensor]:
    """The features of the images `read(indices)` for indices 0..count-1: a round of batches at a time, one for each rank.

    A batch has the same images whoever takes it, so the number of ranks changes no bit.
    """
    batches = torch.arange(count).split(batch_size)
    num_rounds = -(-len(batches) // world.size)
    # In the last round, a rank that has no batch left repeats an early one: all parts then have one shape. Its rows are cut off.
    mine = [batches[(turn * world.size + world.rank) % len(batches)] for turn in range(num_rounds)]
    with world.together():
        own = [_features_of_batch(read(indices), extractor) for indices in mine]
    rounds: dict[str, list[Tensor]] = {}
    for part in own:
        for name in sorted(part):  # messages go in one order on all ranks
            padding = (0, 0, 0, batch_size - len(part[name]))  # rows below those of the last batch, to be cut off
            gathered = world.gather(F.pad(part[name], padding))
            if world.is_main:
                rounds.setdefault(name, []).append(gathered)
    whole = {name: torch.cat(parts)[:count] for name, parts in rounds.items()}
    with world.together():
        _check_finite(whole)
    return whole


def _features_of_batch(images: Tensor, extractor: FeatureExtractorBase) -> dict[str, Tensor]:
    device = next(extractor.parameters()).device
    with torch.no_grad(), full_precision():
        features = extractor.convert_features_tuple_to_dict(extractor(images.to(device)))
    return {name: of_layer.cpu() for name, of_layer in features.items()}


def _check_finite(features: dict[str, Tensor]) -> None:
    for name, of_layer in features.items():
        num_bad = int((~torch.isfinite(of_layer)).any(dim=1).sum())
        if num_bad:
            raise ValueError(
                f"features {name!r} of {num_bad} of {len(of_layer)} images are not finite: check the extractor's weights"
            )


def inception_score(logits: Tensor, splits: int) -> float:
    """Mean over `splits` parts of shuffled (n, num_classes) logits; at least one image a part."""
    return float(isc_features_to_metric(logits, splits, True, SUBSET_SEED)[KEY_METRIC_ISC_MEAN])


class _Cubed:
    """The exponent 3, to NumPy, as two products: its own power of float64 takes several times as long."""

    __array_ufunc__ = None  # NumPy leaves `array ** this` to us

    def __rpow__(self, base: np.ndarray) -> np.ndarray:
        cubed: np.ndarray = base * base * base
        return cubed


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int, subset_size: int, unit_norm: bool) -> float:
    """Squared maximum mean discrepancy (unbiased, so it can be below 0) under a cubic kernel of (n, width) features.

    The kernel is (x.y / width + 1)^3, made for Inception's features. Features of other networks have other scales, so
    with `unit_norm` they are divided by their length and the kernel is (x.y + 1)^3. In float64: the sums nearly cancel.
    """
    samples, reference = samples.double(), reference.double()
    if unit_norm:
        samples, reference = F.normalize(samples), F.normalize(reference)
    result = kid_features_to_metric(
        samples,
        reference,
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        kid_kernel_poly_degree=_Cubed(),
        kid_kernel_poly_gamma=1.0 if unit_norm else None,
        rng_seed=SUBSET_SEED,
        verbose=False,
    )
    return float(result[KEY_METRIC_KID_MEAN])


def precision_and_recall(samples: Tensor, reference: Tensor, neighbours: int, device: str = "cpu") -> tuple[float, float]:
    """Shares of samples near the reference and the other way round, by `neighbours`-th nearest distances, in float64.

    Four matrices of distances: of 50,000 features of 2048 each 4e13 FLOPs, for which `device` should be a GPU.
    """
    result = prc_features_to_metric(
        samples.to(device).double(),
        reference.to(device).double(),
        prc_neighborhood=neighbours,
        prc_batch_size=PRECISION_RECALL_BATCH,
        save_cpu_ram=True,
        verbose=False,
    )
    return float(result[KEY_METRIC_PRECISION]), float(result[KEY_METRIC_RECALL])


def _check_loads_without_executing(weights: str) -> None:
    """torch-fidelity unpickles the file with no restriction; refuse one that could execute code by that."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights} cannot be read as plain weights ({reason}): {INCEPTION_HINT}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{weights} holds a {type(state).__name__}, not a table of weights: {INCEPTION_HINT}")
