"""Are distances between sets of images right, also where covariances are rank-deficient?"""

import pytest
import torch
from torch import Tensor

from bench.data.source import TensorImages
from bench.distance import mean_and_covariance, nearest_neighbour, nearest_squared
from bench.evaluate import frechet_distance


def noise_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_features(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) + seed


def test_frechet_distance_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = random_features(300, 16, 1), random_features(200, 16, 2)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (a, b)), verbose=False)
    ours = frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_of_diagonal_covariances_has_a_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
    var_a, var_b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([16.0, 4.0, 0.0])
    expected = 9 + 4 + (1 - 4) ** 2 + 0 + 3**2
    assert frechet_distance(mean_a, var_a.diag(), mean_b, var_b.diag()) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_rank_deficient_covariances() -> None:
    features = random_features(10, 64, 3)  # covariance of rank 9
    mean, covariance = mean_and_covariance(features)
    assert torch.linalg.matrix_rank(covariance) == 9
    scale = covariance.trace().item()
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-11 * scale
    # Scaling a covariance by 4 doubles its root: tr(A + 4 A - 4 A) = tr A.
    assert frechet_distance(mean, covariance, mean, 4 * covariance) == pytest.approx(scale, rel=1e-9)
    zero = torch.zeros_like(covariance)
    assert frechet_distance(mean, covariance, mean, zero) == pytest.approx(scale, rel=1e-12)
    assert frechet_distance(mean, zero, mean + 1, zero) == pytest.approx(64)


def test_frechet_distance_of_covariances_in_different_subspaces_has_no_cross_term() -> None:
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    cov_a, cov_b = basis[:, :8] @ basis[:, :8].T, 3 * basis[:, 8:12] @ basis[:, 8:12].T
    mean = torch.zeros(20)
    assert frechet_distance(mean, cov_a, mean, cov_b) == pytest.approx(8 + 12, rel=1e-12)


def test_frechet_distance_is_symmetric() -> None:
    a, b = (mean_and_covariance(random_features(12, 16, seed)) for seed in (1, 2))
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)


def test_frechet_distance_refuses_what_is_no_covariance() -> None:
    mean = torch.zeros(2)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(mean, torch.diag(torch.tensor([1.0, -1.0])), mean, torch.eye(2))


def test_nearest_neighbour_is_the_rms_pixel_distance() -> None:
    train = TensorImages(torch.tensor([[0, 0], [255, 255]], dtype=torch.uint8).reshape(2, 1, 1, 2), torch.tensor([0, 0]))
    samples = torch.tensor([[0, 51], [255, 204], [255, 255]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    assert nearest_neighbour(samples, train) == pytest.approx(2 * 0.2 / 2**0.5 / 3, rel=1e-12)


def test_nearest_neighbour_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TensorImages(noise_images(50), torch.zeros(50, dtype=torch.int64))
    samples = noise_images(70)[50:]
    whole = nearest_neighbour(samples, train)
    monkeypatch.setattr("bench.distance.NEIGHBOUR_CHUNK", 7)
    assert nearest_neighbour(samples, train) == whole


class CountedImages(TensorImages):
    """Knows how often it was asked."""

    num_reads = 0

    def pixels(self, indices: Tensor) -> Tensor:
        CountedImages.num_reads += 1
        return super().pixels(indices)


def test_nearest_squared_is_exact_in_any_parts_and_reads_the_training_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against integers; of so many values that float32 would round. Some images are as far apart as images can be."""
    monkeypatch.setattr("bench.distance.NEIGHBOUR_CHUNK", 7)
    colours = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, samples = colours[:40].clone(), colours[30:]  # ten are copies
    images[0], samples[11:13] = 255, 0
    train = CountedImages(images, torch.zeros(40, dtype=torch.int64))
    expected = (samples.long()[:, None] - images.long()[None]).square().sum((2, 3, 4)).amin(1)
    assert (expected == 0).sum() == 10
    for lengths in ([30], [8, 0, 21, 1]):
        CountedImages.num_reads = 0
        found = nearest_squared(list(samples.split(lengths)), train)
        assert found.dtype == torch.float64 and found.tolist() == expected.tolist()
        assert CountedImages.num_reads == 6  # of 40 images in chunks of 7
    none = CountedImages(images[:0], torch.zeros(0, dtype=torch.int64))
    assert nearest_squared([samples], none).tolist() == [float("inf")] * 30
    assert CountedImages.num_reads == 6
