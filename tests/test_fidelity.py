"""Are features extracted safely: in order, finite, from the weights that were named and without executing anything?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from bench import evaluate, fidelity
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, balanced_order, load_data, to_uint8
from bench.data.digits_classifier import WEIGHTS_SHA256
from bench.distance import mean_and_covariance
from bench.evaluate import metrics_of, protocol_of, score


def noise_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    images = noise_images(7)
    forwards, backwards = (
        fidelity.extract_features(images, fidelity.build_extractor("digits", WEIGHTS_SHA256, layers=layers), 3)
        for layers in (["features", "logits"], ["logits", "features"])
    )
    assert forwards["features"].shape == (7, 64) and forwards["logits"].shape == (7, 10)
    for name, features in forwards.items():
        assert torch.equal(features, backwards[name])


def test_features_of_whole_batches_are_the_same_in_parts() -> None:
    """What lets ranks extract whole blocks and gather."""
    extractor = fidelity.build_extractor("digits", WEIGHTS_SHA256)
    images = noise_images(12)
    whole = fidelity.extract_features(images, extractor, 4)
    parts = [fidelity.extract_features(images[start : start + 4], extractor, 4) for start in (0, 4, 8)]
    for name, features in whole.items():
        assert torch.equal(features, torch.cat([part[name] for part in parts]))


class BrokenExtractor(FeatureExtractorBase):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("broken", ["features"])
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = images.float().flatten(1)
        return (torch.where(features == 0, torch.nan, features),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)


def test_features_that_are_not_finite_are_refused() -> None:
    images = torch.ones(4, 1, 2, 2, dtype=torch.uint8)
    images[1, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="'features' of 1 of 4 images are not finite"):
        fidelity.extract_features(images, BrokenExtractor(), 2)


def test_images_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float32.*to_uint8"):
        fidelity.extract_features(torch.zeros(4, 1, 2, 2), BrokenExtractor(), 2)


def test_extractor_must_have_the_weights_that_the_protocol_names() -> None:
    with pytest.raises(ValueError, match="the protocol names 00"):
        fidelity.build_extractor("digits", "0" * 64)


# --- Kernel distance


def features_like(extractor: str, count: int, seed: int) -> Tensor:
    """Positive features, after a ReLU, of the extractor's width; Inception's are means over 64 places."""
    generator = torch.Generator().manual_seed(seed)
    width = fidelity.FEATURE_WIDTHS[extractor]
    spread = 0.3 + torch.rand(width, generator=generator)
    places = torch.randn(count, 64 if extractor == "inception" else 1, width, generator=generator)
    return (places * spread + 0.1 * seed).relu().mean(1)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("extractor", ["digits", "inception"])
def test_kernel_distance_is_torch_fidelitys_power_of_three(extractor: str, unit_norm: bool) -> None:
    """Its sums, of kernels of 1 and more, nearly cancel: roundings of 1e-16 are all that may remain of the cube's way."""
    samples, reference = features_like(extractor, 80, 1), features_like(extractor, 130, 2)
    ours = fidelity.kernel_distance(samples, reference, 7, 60, unit_norm)
    a, b = (normalize(f.double()) if unit_norm else f.double() for f in (samples, reference))
    gamma = 1.0 if unit_norm else None
    settings = {"kid_subsets": 7, "kid_subset_size": 60, "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": gamma}
    theirs = kid_features_to_metric(a, b, **settings, rng_seed=fidelity.SUBSET_SEED, verbose=False)
    largest = max(float((f @ f.T).max() * (gamma or 1 / f.shape[1]) + 1) ** 3 for f in (a, b))
    assert abs(theirs[KEY_METRIC_KID_MEAN]) > 1e-5 * largest
    assert ours == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-12, abs=1e-15 * largest)
    assert fidelity.kernel_distance(samples, reference, 7, 60, unit_norm) == ours


def test_the_kernel_takes_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy hands the exponent back, as its own power is what is slow: for each subset, for three matrices."""
    cubed: list[tuple[int, ...]] = []
    plain = fidelity._Cubed.__rpow__

    def counted(self: Any, base: np.ndarray) -> np.ndarray:
        cubed.append(base.shape)
        return plain(self, base)

    monkeypatch.setattr(fidelity._Cubed, "__rpow__", counted)
    fidelity.kernel_distance(features_like("digits", 40, 1), features_like("digits", 50, 2), 4, 30, True)
    assert cubed == [(30, 30)] * 3 * 4
    assert (np.arange(-3.0, 4.0) ** fidelity._Cubed()).tolist() == [-27, -8, -1, 0, 1, 8, 27]


# --- Inception


def random_inception(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights of torch-fidelity's Inception as PyTorch initialises them: built without its download."""
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        return dict(FeatureExtractorInceptionV3("random", ["2048"], verbose=False).state_dict())


@pytest.fixture
def colours(tmp_path: Path) -> DataSource:
    generator = np.random.default_rng(0)
    for part in ("train", "heldout"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / part / name / f"{i}.png")
    return load_data(DataConfig(name="folder", path=str(tmp_path), image_size=8))


def colour_samples(source: DataSource) -> tuple[Tensor, Tensor]:
    """The ten training images, classes in turn."""
    x, y = source.train.batch(balanced_order(source.train.labels))
    return to_uint8(x), y


def inception_config(weights: Path | str) -> EvaluationConfig:
    return EvaluationConfig(extractor="inception", extractor_weights=str(weights), num_samples=10, kid_subset_size=5)


def test_inception_scores_with_weights_from_a_local_file(
    tmp_path: Path, colours: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(random_inception(monkeypatch), weights)
    protocol = protocol_of(inception_config(weights), colours)
    assert str(tmp_path) not in repr(protocol.content)
    samples, labels = colour_samples(colours)
    scores = score(samples, labels, protocol, colours)
    assert "class_accuracy" not in scores
    assert scores["nearest_neighbour"] == 0 and scores["precision"] == 1
    assert scores["fid_train"] < 1e-3 * scores["fid_heldout"]  # the ten training images themselves
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match="the weights of inception have SHA-256"):
        fidelity.build_extractor("inception", protocol.extractor_sha256, str(weights))


def write_reference(path: Path, images: Tensor, extractor: FeatureExtractorBase, **changes: np.ndarray) -> str:
    """As ADM's are, of these images."""
    features = fidelity.extract_features(images, extractor, 50)
    (mean, covariance), (spatial_mean, spatial_covariance) = (
        [of_features.numpy() for of_features in mean_and_covariance(features[name])] for name in ("2048", "spatial")
    )
    arrays = {"mu": mean, "sigma": covariance, "mu_s": spatial_mean, "sigma_s": spatial_covariance} | changes
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)  # type: ignore[arg-type]
    return str(path)


def quick_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    return float((mean_a - mean_b).square().sum() + (cov_a - cov_b).square().sum())


def test_spatial_features_are_compared_with_a_reference_file_that_has_some(
    tmp_path: Path, colours: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(random_inception(monkeypatch), weights)
    sha256 = fidelity.weights_hash("inception", str(weights))
    extractor = fidelity.build_extractor("inception", sha256, str(weights), ["spatial", "2048"])
    samples, labels = colour_samples(colours)
    images = to_uint8(colours.heldout.batch(torch.arange(10))[0])

    seen: list[Tensor] = []
    block = extractor.inception.Mixed_6d
    with block.register_forward_hook(lambda _, given, __: seen.append(block.branch1x1(given[0]))):
        spatial = fidelity.extract_features(samples[:2], extractor, 2)["spatial"].unflatten(1, (17, 17, 7))
    assert torch.equal(spatial[:, 3, 5], seen[0][:, :7, 3, 5])  # row, column, channel; what the block joins to the others

    path = write_reference(tmp_path / "reference.npz", images, extractor)
    monkeypatch.setattr(evaluate, "frechet_distance", quick_distance)  # 2048 features take seconds
    config = replace(inception_config(weights), reference=path)
    scores = score(samples, labels, protocol_of(config, colours), colours)
    features = (fidelity.extract_features(each, extractor, 50)["spatial"] for each in (samples, images))
    expected = quick_distance(*(statistic for of_set in features for statistic in mean_and_covariance(of_set)))
    assert scores["sfid"] == pytest.approx(expected, rel=1e-9) and expected > 0

    with np.load(path) as archive:
        plain = {name: archive[name] for name in archive.files if not name.endswith("_s")}
    np.savez(path, **plain)  # type: ignore[arg-type]
    without = protocol_of(config, colours)
    assert metrics_of(without, colours) == [name for name in scores if name not in ("sfid", "n")]
    write_reference(tmp_path / "reference.npz", images, extractor, mu_s=np.zeros(3), sigma_s=np.eye(3))
    with pytest.raises(ValueError, match=r"has statistics of 3 spatial features, but inception has 2023: choose another"):
        protocol_of(config, colours)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_inception_refuses_missing_foreign_and_executable_weights(
    tmp_path: Path, colours: DataSource, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = rf"{fidelity.INCEPTION_FILE} .*evaluation.extractor_weights"
    for missing in ("", str(tmp_path / "missing.pth")):
        with pytest.raises(ValueError, match=hint):
            protocol_of(inception_config(missing), colours)
    path = tmp_path / "other.pth"
    for content, message in (
        ({"fc.weight": torch.zeros(1)}, "does not hold weights of torch-fidelity's Inception"),
        ([1, 2], "holds a list"),
        (Payload(), "cannot be read as plain weights"),
    ):
        torch.save(content, path)
        sha256 = fidelity.weights_hash("inception", str(path))
        with pytest.raises(ValueError, match=f"{message}.*{hint}"):
            fidelity.build_extractor("inception", sha256, str(path))
    assert "executed" not in capsys.readouterr().out
