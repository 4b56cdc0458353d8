"""Are scores what they claim to be: equal to torch-fidelity's, tied to one protocol, and refused when they would mean nothing?"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from bench import fidelity
from bench.config import DataConfig, EvaluationConfig, RunConfig
from bench.data import DataSource, load_data, to_uint8
from bench.data.source import spread_choice
from bench.demo import write_floor
from bench.evaluate import EvalProtocol, differences, floor_scores, protocol_of, score


@pytest.fixture(scope="module")
def data() -> DataSource:
    return load_data(DataConfig())


@pytest.fixture(scope="module")
def protocol(data: DataSource) -> EvalProtocol:
    return protocol_of(EvaluationConfig(), data)


@pytest.fixture(scope="module")
def floor(protocol: EvalProtocol, data: DataSource) -> dict[str, float]:
    return floor_scores(protocol, data)


def training_images(data: DataSource, count: int) -> tuple[Tensor, Tensor]:
    x, y = data.train.batch(spread_choice(data.train.labels, count))
    return to_uint8(x), y


def noise_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Bare(Dataset[Tensor]):
    """What torch-fidelity takes: items are tensors, not tuples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


# --- scores


def test_scores_are_torch_fidelitys(protocol: EvalProtocol, data: DataSource) -> None:
    """All of torch-fidelity's metrics, called as its documentation says, on the same images."""
    generator = torch.Generator().manual_seed(0)
    x, labels = data.heldout.batch(torch.arange(500))
    samples = to_uint8(x + 0.3 * torch.randn(x.shape, generator=generator))
    train = to_uint8(data.train.batch(torch.arange(len(data.train)))[0])
    fidelity.build_extractor("digits", protocol.extractor_sha256)  # registers it
    theirs = torch_fidelity.calculate_metrics(
        input1=Bare(samples),
        input2=Bare(train),
        feature_extractor=f"digits-{protocol.extractor_sha256}",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=protocol.kid_subset_size,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = score(samples, labels, protocol, data)
    assert ours["fid_train"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)  # float32 means there
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=0.003)  # float32 distances there
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=0.003)
    extractor = fidelity.build_extractor("digits", protocol.extractor_sha256, layers=["features"])
    features = (fidelity.extract_features(images, extractor, 64)["features"] for images in (samples, train))
    raw_kid = fidelity.kernel_distance(*features, subsets=100, subset_size=250, unit_norm=False)
    assert raw_kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-2)  # float32 sums there
    assert ours["n"] == 500


def test_scores_are_the_same_twice_and_leave_the_global_generator_alone(protocol: EvalProtocol, data: DataSource) -> None:
    samples, labels = training_images(data, 500)
    before = torch.get_rng_state()
    assert score(samples, labels, protocol, data) == score(samples, labels, protocol, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_floor_is_far_below_noise(floor: dict[str, float], protocol: EvalProtocol, data: DataSource) -> None:
    noise = score(noise_images(500), torch.arange(500) % 10, protocol, data)
    assert floor.keys() == noise.keys()
    for name in ("fid_train", "fid_heldout"):
        assert 0 < floor[name] < noise[name] / 20
    assert abs(floor["kid"]) < noise["kid"] / 20
    for name in ("precision", "recall", "inception_score", "class_accuracy"):
        assert floor[name] > 2 * noise[name]
    assert floor["class_accuracy"] >= 0.97 and 8 < floor["inception_score"] <= 10
    assert 0 < floor["nearest_neighbour"] < noise["nearest_neighbour"]


def test_copies_of_training_images_are_found_out(floor: dict[str, float], protocol: EvalProtocol, data: DataSource) -> None:
    copies = score(*training_images(data, 500), protocol, data)
    assert copies["nearest_neighbour"] == 0
    assert copies["fid_train"] < floor["fid_train"]  # the training set rewards copying ...
    assert copies["fid_heldout"] == pytest.approx(floor["fid_heldout"])  # ... held-out images do not


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (noise_images(499), torch.arange(499) % 10, r"the protocol asks for torch.uint8 \(500, 1, 8, 8\)"),
        (noise_images(500).float(), torch.arange(500) % 10, "torch.float32"),
        (noise_images(500), torch.arange(499) % 10, "one int64 for each of 500"),
        (noise_images(500), torch.arange(500) // 50, "do not follow the protocol"),
    ],
)
def test_samples_that_are_not_the_protocols_are_refused(
    samples: Tensor, labels: Tensor, message: str, protocol: EvalProtocol, data: DataSource
) -> None:
    with pytest.raises(ValueError, match=message):
        score(samples, labels, protocol, data)


def test_another_data_set_than_the_protocols_is_refused(protocol: EvalProtocol, data: DataSource) -> None:
    other = dataclasses.replace(data, fingerprint=lambda: "other")
    with pytest.raises(ValueError, match="not the one the protocol was made for"):
        score(noise_images(500), torch.arange(500) % 10, protocol, other)


def test_floor_needs_as_many_heldout_images_as_samples(data: DataSource) -> None:
    with pytest.raises(ValueError, match="num_samples is 501, but there are only 500 held-out images"):
        floor_scores(protocol_of(EvaluationConfig(num_samples=501), data), data)


def test_where_too_few_images_are_held_out_there_is_no_floor_but_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A protocol may ask for more samples than a data set holds out: 50,000 with CIFAR-10, say. Its tables go without the row."""
    write_floor(tmp_path, RunConfig(evaluation=EvaluationConfig(num_samples=501)))
    assert not (tmp_path / "floor.json").exists()
    assert "no floor: evaluation.num_samples is 501, but there are only 500 held-out" in capsys.readouterr().err


# --- the protocol


def test_every_field_of_the_protocol_counts_but_paths(protocol: EvalProtocol) -> None:
    for entry in dataclasses.fields(EvalProtocol):
        value = getattr(protocol, entry.name)
        other = dataclasses.replace(protocol, **{entry.name: f"{value}x" if isinstance(value, str) else value + 1})
        counts = not entry.name.endswith("_path")
        assert (other.hash != protocol.hash) == counts
        assert differences(protocol, other) == ([entry.name] if counts else [])


def test_differences_takes_stored_protocols_too(protocol: EvalProtocol) -> None:
    stored: dict[str, Any] = {**protocol.content, "seed": 7, "not_known_yet": 1}
    assert differences(stored, protocol) == ["not_known_yet", "seed"]


def test_every_sampling_option_reaches_the_protocol(protocol: EvalProtocol, data: DataSource) -> None:
    changes: dict[str, Any] = {
        "num_samples": 400,
        "sampler": "ddim",
        "steps": "10",
        "guidance_scale": 1.5,
        "guidance_channels": 1,
        "seed": 1,
        "block_size": 25,
        "kid_subset_size": 100,
    }
    for name, value in changes.items():
        assert differences(protocol_of(EvaluationConfig(**{name: value}), data), protocol) == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 249}, "num_samples is 249, but the metrics need 250"),
        ({"num_samples": 9, "kid_subset_size": 5}, "num_samples is 9, but the metrics need 10"),
        ({"num_samples": 1298, "kid_subset_size": 1298}, "there are 1297 images to compare samples with"),
        ({"eta": 0.5}, "only the ddim sampler has"),
        ({"extractor": "inception"}, "needs images of 3 channels, but here they have 1"),
        ({"extractor_weights": "file.pth"}, "leave it empty"),
        ({"reference": "missing.npz"}, "there is no file missing.npz"),
    ],
)
def test_a_protocol_that_cannot_be_scored_is_refused(changes: dict[str, Any], message: str, data: DataSource) -> None:
    with pytest.raises(ValueError, match=message):
        protocol_of(EvaluationConfig(**changes), data)


def test_other_data_are_refused_by_the_digits_extractor(data: DataSource) -> None:
    with pytest.raises(ValueError, match="choose inception"):
        protocol_of(EvaluationConfig(), dataclasses.replace(data, name="cifar10"))
