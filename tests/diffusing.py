"""What do the tests of the diffusion mathematics share? What the released code computed, its network, and closeness.

`golden` and `linear` are fixtures, offered to all tests by conftest.py.
"""

import helpers
import pytest
import torch
from torch import Tensor

from bench.diffusion import Schedule, make_schedule


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return helpers.golden("diffusion")[0]


@pytest.fixture(scope="module")
def linear() -> Schedule:
    return make_schedule("linear")


def fake_network(x: Tensor, t: Tensor) -> Tensor:
    """The network of the golden tensors: x (B, C, H, W), original timesteps (B,) -> (B, 2C, H, W)."""
    t = t.float().view(-1, 1, 1, 1)
    return torch.cat([0.8 * torch.sin(x) + 0.1 * x * torch.cos(t / 100), torch.tanh(0.3 * x + t / 1000 - 0.5)], dim=1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
