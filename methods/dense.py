"""Dense DiT: one network for all timesteps. The control of every comparison.

Paper: Peebles & Xie, arXiv 2212.09748; see `methods/backbone.py` for the equation-to-function map.

Deviations: none.
"""

from collections.abc import Mapping

from torch import Tensor

from bench.intervals import Interval, partition
from bench.method import Denoiser, Method, Prediction, check_timesteps, load_exactly
from methods.backbone import DiT, Shape


class Dense(Method):
    """One backbone over the whole schedule."""

    def __init__(self, shape: Shape, *, num_timesteps: int = 1000) -> None:
        super().__init__()
        self.intervals = partition(1, num_timesteps)
        self.num_timesteps = num_timesteps
        self.network = DiT(shape)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        return Prediction(self.network(x, t, y), {})

    def specialise(self, interval: Interval) -> Denoiser:
        return self.network

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        load_exactly(self.network, state, "the dense state")
