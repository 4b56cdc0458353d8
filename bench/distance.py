"""How far apart are two sets of images?

Frechet distance (arXiv 1706.08500) between features, and the pixel distance that shows copies of training images.
"""

import torch
from torch import Tensor

from bench.data import ImageSet, read_uint8
from bench.distributed import World

NEIGHBOUR_CHUNK = 500  # images on either side of a block of the distance matrix


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), for means (D,) and covariances A and B (D, D), in float64.

    With symmetric roots, tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), the sum of the singular values of A^(1/2) B^(1/2).
    Singular values rather than roots of eigenvalues: where covariances are rank-deficient, rounding errors of 1e-16 would
    become 1e-8 each under the root.
    """
    mean_a, cov_a, mean_b, cov_b = (tensor.double() for tensor in (mean_a, cov_a, mean_b, cov_b))
    cross = torch.linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # it is a squared distance: below 0 by rounding alone


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> mean (D,) and covariance (D, D) with n - 1 degrees of freedom, in float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def nearest_neighbour(samples: Tensor, train: ImageSet, device: str = "cpu", world: World | None = None) -> float:
    """Mean over samples (uint8 (n, C, H, W)) of the RMS pixel distance, pixels in 0..1, to the nearest training image."""
    return rms_distance(nearest_squared([samples], train, device, world), samples[0].numel())


def rms_distance(squared: Tensor, num_values: int) -> float:
    """Mean RMS distance, pixels in 0..1, from squared distances (n,) of images of `num_values` pixels in 0..255."""
    return (squared / num_values).sqrt().mean().item() / 255.0


def nearest_squared(samples: list[Tensor], train: ImageSet, device: str = "cpu", world: World | None = None) -> Tensor:
    """(n,) float64: squared distance, in pixels of 0..255, of each sample to the nearest training image; infinity if there is
    none. Samples come in parts, uint8 (n_i, C, H, W), and the training images are read once for all of them.

    Exact: squares of integers are summed in float64, so that a copy has distance 0 and neither order nor parts count. Ranks
    share the training images; all get the distances.
    """
    world = world or World()
    with world.together():
        chunks = [chunk.flatten(1).to(device) for part in samples for chunk in part.split(NEIGHBOUR_CHUNK)]
        nearest = [torch.full((len(chunk),), float("inf"), dtype=torch.float64, device=device) for chunk in chunks]
        chosen = torch.arange(len(train)).split(NEIGHBOUR_CHUNK) if len(train) else ()
        for indices in chosen[world.rank :: world.size]:
            real = read_uint8(train, indices).flatten(1).to(device).double()
            squares = real.square().sum(1)
            for chunk, found in zip(chunks, nearest, strict=True):
                # |x - r|^2 = |x|^2 + (|r|^2 - 2 x.r): what does not depend on r is added at the end
                torch.minimum(found, torch.addmm(squares, chunk.double(), real.T, alpha=-2).amin(1), out=found)
        of_samples = torch.cat([chunk.double().square().sum(1) + found for chunk, found in zip(chunks, nearest, strict=True)])
    return world.gather(of_samples.cpu()[None]).amin(0)  # over ranks


def _root(covariance: Tensor) -> Tensor:
    """R (D, rank) with R R^T = covariance, by symmetric eigendecomposition; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = values[-1].clamp(min=0.0)
    if values[0] < -1e-6 * largest:
        raise ValueError(
            f"a covariance has the eigenvalue {values[0].item():.3g} (largest {largest.item():.3g}): give a true one"
        )
    kept = values > largest * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()
