"""Are ADM's reference and sample files read, written and used as ADM does?"""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import adm, fidelity
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, load_data, to_uint8
from bench.data.source import spread_choice
from bench.distance import mean_and_covariance
from bench.evaluate import EvalProtocol, differences, protocol_of, score


@pytest.fixture(scope="module")
def data() -> DataSource:
    return load_data(DataConfig())


@pytest.fixture(scope="module")
def protocol(data: DataSource) -> EvalProtocol:
    return protocol_of(EvaluationConfig(), data)


def training_images(data: DataSource, count: int) -> tuple[Tensor, Tensor]:
    x, y = data.train.batch(spread_choice(data.train.labels, count))
    return to_uint8(x), y


def write_reference(path: Path, width: int = 64, **changes: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(100, width)).astype(np.float32)
    arrays = {"mu": features.mean(0), "sigma": np.cov(features.T), "mu_s": np.zeros(3), "sigma_s": np.eye(3), **changes}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def test_adm_sample_files_are_nhwc_and_read_back(tmp_path: Path) -> None:
    samples = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    path = tmp_path / "samples.npz"
    adm.write_samples(path, samples, torch.arange(5))
    with np.load(path, allow_pickle=False) as archive:
        assert archive["arr_0"].shape == (5, 4, 6, 3) and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"][2, 1, 3], samples[2, :, 1, 3])
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(adm.read_images(path), samples)
    assert adm.image_shape(path) == (5, 3, 4, 6)
    first = path.read_bytes()
    adm.write_samples(path, samples, torch.arange(5))
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]
    with pytest.raises(ValueError, match="give uint8"):
        adm.write_samples(path, samples.float())


def test_adm_reference_takes_the_place_of_the_training_set(tmp_path: Path, protocol: EvalProtocol, data: DataSource) -> None:
    """A reference made of the held-out images: distances to it are those to the held-out set."""
    extractor = fidelity.build_extractor("digits", protocol.extractor_sha256)
    features = fidelity.extract_features(data.heldout, extractor, protocol.feature_batch_size)["features"]
    mean, covariance = mean_and_covariance(features)
    images = to_uint8(data.heldout.batch(torch.arange(500))[0]).permute(0, 2, 3, 1).numpy()
    path = tmp_path / "reference.npz"
    np.savez(path, mu=mean.numpy(), sigma=covariance.numpy(), arr_0=images)
    with_reference = protocol_of(EvaluationConfig(reference=str(path)), data)
    assert differences(with_reference, protocol) == ["reference", "reference_sha256"]
    samples, labels = training_images(data, 500)
    plain, scores = (score(samples, labels, p, data) for p in (protocol, with_reference))
    assert scores["fid_train"] == scores["fid_heldout"] == plain["fid_heldout"]
    assert scores["precision"] < plain["precision"] == 1
    assert scores["nearest_neighbour"] == 0


def test_adm_reference_without_images_leaves_neighbours_to_the_training_set(
    tmp_path: Path, protocol: EvalProtocol, data: DataSource
) -> None:
    write_reference(tmp_path / "reference.npz")
    with_reference = protocol_of(EvaluationConfig(reference=str(tmp_path / "reference.npz")), data)
    samples, labels = training_images(data, 500)
    plain, scores = (score(samples, labels, p, data) for p in (protocol, with_reference))
    changed = {name for name in plain if plain[name] != scores[name]}
    assert changed == {"fid_train"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(32), "sigma": np.eye(32)}, "statistics of 32 features, but digits has 64"),
        ({"sigma": np.eye(3)}, r"mu and sigma .* are \(64,\) and \(3, 3\)"),
        ({"mu": np.full(64, np.nan)}, "not finite"),
        ({"arr_0": np.zeros((300, 8, 8, 3), np.uint8)}, r"images of shape \(3, 8, 8\), but digits has \(1, 8, 8\)"),
        ({"arr_0": np.zeros((300, 8, 8, 1))}, "must be uint8"),
        ({"arr_0": np.zeros((249, 8, 8, 1), np.uint8)}, "there are 249 images to compare"),
        ({"mu": np.array([None] * 64)}, "cannot be read"),
    ],
)
def test_adm_reference_that_does_not_fit_is_refused(
    tmp_path: Path, data: DataSource, changes: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "reference.npz"
    write_reference(path, **changes)
    with pytest.raises(ValueError, match=message):
        protocol_of(EvaluationConfig(reference=str(path)), data)


def test_adm_refuses_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        adm.read_reference(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    with pytest.raises(ValueError, match="has no mu and sigma"):
        adm.read_reference(path)
    with pytest.raises(ValueError, match="has no images in arr_0"):
        adm.read_images(path)
