"""Independent multi-expert: one full network per interval of timesteps.

Papers: the interval experts of eDiff-I (arXiv 2211.01324) and MEME, and the multi-expert baseline of Remix-DiT's
Table 1 (arXiv 2412.05628, section 4.2).

    E equal intervals, t in the t*E // T-th    `bench.intervals.partition`
    expert of a timestep                       `MultiExpert.forward`

The experts share nothing and never communicate. The budget is the sum over experts: at equal images each of E experts
gets 1/E of the updates.

Deviations: from scratch, each expert draws its own initial weights (Remix-DiT's baseline starts every expert from one
pre-trained network: `load_dense`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from bench.intervals import Interval, partition
from bench.method import Denoiser, Method, Prediction, check_timesteps, load_exactly
from methods.backbone import DiT, Shape


class MultiExpert(Method):
    """`experts` backbones, the i-th over the i-th of as many intervals."""

    independent_experts = True
    intervals_cost_alike = True

    def __init__(self, shape: Shape, *, num_timesteps: int = 1000, experts: int = 4) -> None:
        super().__init__()
        self.intervals = partition(experts, num_timesteps)
        self.num_timesteps = num_timesteps
        self.networks = nn.ModuleList([DiT(shape) for _ in self.intervals])

    def forward(self, x: Tensor, t: Tensor, y: Tensor, interval: Interval, progress: float = 0.0) -> Prediction:
        check_timesteps(t, interval, self.num_timesteps)
        return Prediction(self.networks[interval.index](x, t, y), {})

    @contextmanager
    def one_step(self, interval: Interval) -> Iterator[list[nn.Parameter]]:
        """Gradients arrive at one expert alone."""
        yield [p for p in self.networks[interval.index].parameters() if p.requires_grad]

    def specialise(self, interval: Interval) -> Denoiser:
        return self.networks[interval.index]

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Every expert starts as a copy."""
        for network in self.networks:
            load_exactly(network, state, "the dense state")

    def num_active_parameters(self) -> int:
        return sum(p.numel() for p in self.networks[0].parameters())
