"""Is the measured cost of every method what one counts by hand from its sizes? All counts here are multiply-accumulates."""

import pytest
import torch
from helpers import VARIANTS, tiny
from torch.nn import functional as F

from bench import flops
from bench.flops import count_flops, measure
from bench.intervals import partition
from methods import METHODS
from methods.backbone import Shape
from methods.grouped import grouped_linear, looped_mm

SHAPE = Shape(depth=3, width=24, num_heads=3, patch_size=2, input_size=6, channels=2, num_classes=5, mlp_ratio=2.5)
L, D, N, H = SHAPE.depth, SHAPE.width, SHAPE.num_tokens, SHAPE.mlp_width
T = 40

PATCH = N * D * SHAPE.channels * SHAPE.patch_size**2
TIME = 256 * D + D * D
ATTENTION = N * D * 3 * D + 2 * N * N * D + N * D * D
MLP = 2 * N * D * H
BLOCK = 6 * D * D + ATTENTION + MLP  # its modulation first
FINAL = 2 * D * D + N * D * SHAPE.patch_size**2 * SHAPE.out_channels
DENSE = PATCH + TIME + L * BLOCK + FINAL
NO_INPUT_GRADIENT = PATCH + 256 * D  # neither images nor sinusoids get a gradient: backward costs these once, the rest twice


def measured(method: str, shape: Shape = SHAPE, **options):
    return measure(METHODS[method](shape, num_timesteps=T, **options), (shape.channels,) + 2 * (shape.input_size,))


def assert_macs(cost, forward: int, train: int, fixed: int) -> None:
    """Forward and training cost of an image, and what a training step costs beside its images."""
    assert cost.forward_macs_per_image == forward
    assert cost.train_flops_per_image == 2 * train
    assert cost.train_flops_per_pass == 2 * fixed
    assert cost.train_flops(10) == 2 * (10 * train + fixed)


@pytest.mark.parametrize(("method", "options"), [("dense", {}), ("dtr", {}), ("dtr", {"routing": "random"})])
def test_dense_and_masked(method, options):
    assert_macs(measured(method, **options), DENSE, 3 * DENSE - NO_INPUT_GRADIENT, 0)


@pytest.mark.parametrize("experts", [1, 3])
def test_an_expert_of_a_family_costs_what_a_dense_network_costs(experts):
    assert_macs(measured("multi_expert", experts=experts), DENSE, 3 * DENSE - NO_INPUT_GRADIENT, 0)


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (5, 1)])
def test_switch_dit(experts, top_k):
    """Per image and block: a gate, its experts mixed into one linear, and that linear on every token. Per step, without
    gradients: embedding and gates of all timesteps, and the cost matrix of the assignment between L*M slots."""
    switch = D * experts + experts * (D * D + D) + N * D * D
    forward = DENSE + L * switch
    fixed = T * (TIME + L * D * experts) + T * (L * experts) ** 2
    assert_macs(measured("switch_dit", experts=experts, top_k=top_k), forward, 3 * forward - NO_INPUT_GRADIENT, fixed)
    plain = measured("switch_dit", experts=experts, top_k=top_k, prior_weight=0.0)
    # Without the prior the gates learn from the images alone, at the same cost, and no other timestep is looked at.
    assert_macs(plain, forward, 3 * forward - NO_INPUT_GRADIENT, 0)


@pytest.mark.parametrize("shape", [SHAPE, Shape(**{**SHAPE.__dict__, "width": 20, "num_heads": 2, "mlp_ratio": 1.35})])
@pytest.mark.parametrize(("experts", "top_k", "shared"), [(4, 2, 2.0), (6, 1, 0.0)])
def test_dit_moe(shape, experts, top_k, shared):
    """Every token passes its router, k SwiGLU experts (three D x H matrices each) and the shared one. The second shape's
    experts have rows that grouped products cannot take."""
    D, H = shape.width, shape.mlp_width
    mixture = N * D * experts + top_k * N * 3 * D * H + N * 3 * D * int(shared * D)
    backbone = dense_macs(shape) - L * 2 * N * D * H
    forward = backbone + L * mixture
    cost = measured("dit_moe", shape, experts=experts, top_k=top_k, shared_width=shared)
    assert_macs(cost, forward, 3 * forward - N * D * 8 - 256 * D, 0)
    assert shape is SHAPE or H * 4 % 16


def dense_macs(shape: Shape) -> int:
    D = shape.width
    block = 6 * D * D + 4 * N * D * D + 2 * N * N * D + 2 * N * D * shape.mlp_width
    return N * D * 8 + 256 * D + D * D + shape.depth * block + 2 * D * D + N * D * 4 * shape.out_channels


def test_dit_moe_with_experts_of_the_dense_form():
    """GELU experts: two D x H matrices, and biases that are picked by a product with a one-hot matrix."""
    experts, top_k = 4, 2
    mixture = N * D * experts + top_k * N * (2 * D * H + experts * (H + D))
    forward = DENSE - L * MLP + L * mixture
    one_hot = L * top_k * N * experts * (H + D)  # gets no gradient itself
    cost = measured("dit_moe", experts=experts, top_k=top_k, shared_width=0.0, expert="gelu_mlp")
    assert_macs(cost, forward, 3 * forward - NO_INPUT_GRADIENT - one_hot, 0)


@pytest.mark.parametrize("coefficients", ["global", "local"])
@pytest.mark.parametrize(("bases", "experts"), [(4, 2), (3, 3)])
def test_remix_dit(bases, experts, coefficients):
    """An image costs what it costs the dense network. A step mixes K copies of the four linears of every block once;
    backward, to the bases and to the coefficients, costs that twice."""
    linears = 4 * D * D + 2 * D * H + (3 * D + D + H + D)  # weights and biases
    cost = measured("remix_dit", bases=bases, experts=experts, coefficients=coefficients)
    assert_macs(cost, DENSE, 3 * DENSE - NO_INPUT_GRADIENT, 3 * bases * L * linears)


def test_remix_dit_with_fixed_coefficients_pays_no_gradient_for_them():
    linears = 4 * D * D + 2 * D * H + (3 * D + D + H + D)
    cost = measured("remix_dit", bases=4, experts=2, mixer="one_hot")
    assert_macs(cost, DENSE, 3 * DENSE - NO_INPUT_GRADIENT, 2 * 4 * L * linears)


@pytest.mark.parametrize(("size", "published"), [("S/2", 6.06e9), ("B/2", 23.01e9), ("L/2", 80.71e9), ("XL/2", 118.64e9)])
def test_published_sizes(size, published):
    """The "Gflops" of table 1 of arXiv 2212.09748, at 32x32x4 latents."""
    with torch.device("meta"):
        method = METHODS["dense"](Shape.of_size(size))
    assert measure(method, (4, 32, 32)).forward_macs_per_image == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_that_says_so_costs_the_same_on_all_intervals(variant):
    method = tiny(variant)
    told, method.intervals_cost_alike = measure(method, (2, 4, 4)), False
    assert measure(method, (2, 4, 4)) == told


def test_intervals_are_measured_one_by_one_unless_the_method_says_so():
    class Growing(METHODS["multi_expert"]):
        """The second expert has two blocks more than the first."""

        intervals_cost_alike = False

        def __init__(self):
            super().__init__(SHAPE, num_timesteps=T, experts=2)
            self.networks[1].blocks.extend(self.networks[0].blocks[:2])

    assert measure(Growing(), (2, 6, 6)).forward_macs_per_image == DENSE + BLOCK


def test_measuring_leaves_the_method_as_it_is():
    method = tiny("dit_moe")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    measure(method, (2, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in method.parameters())


# Grouped products


@pytest.mark.parametrize("hidden", [16, 18])
def test_grouped_products_are_counted_the_same_on_every_path(hidden):
    """Aligned (grouped), misaligned (a loop) and on the meta device: 12 rows meet one 8 x hidden matrix each, thrice."""
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    for device in ("cpu", "meta"):
        rows = torch.ones(12, 8, device=device, requires_grad=True)
        weight = torch.ones(3, hidden, 8, device=device, requires_grad=True)

        def step(rows=rows, weight=weight, device=device):
            grouped_linear(rows, weight, None, ends.to(device)).square().sum().backward()

        assert count_flops(step) == 3 * 2 * 12 * 8 * hidden, device
        assert rows.grad.shape == rows.shape and weight.grad.shape == weight.shape
    rows, weight = torch.rand(12, 8), torch.rand(3, hidden, 8)
    product = looped_mm(rows, weight, ends)
    assert torch.allclose(product[:5], F.linear(rows[:5], weight[0])) and torch.allclose(product[5:], rows[5:] @ weight[2].T)


def test_many_intervals_are_measured_by_a_spread_choice(monkeypatch):
    monkeypatch.setattr(flops, "MAX_INTERVALS", 3)
    assert [interval.index for interval in flops._spread(partition(T, T))] == [0, 13, 26]
    method = METHODS["remix_dit"](SHAPE, num_timesteps=T, bases=2, experts=T, prior_weight=0.0)
    cost = measure(method, (2, 6, 6))
    assert cost.forward_macs_per_image == DENSE and cost.train_flops_per_image == 2 * (3 * DENSE - NO_INPUT_GRADIENT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_is_copied_to_be_counted(variant, monkeypatch):
    """The largest networks fill their device once."""
    method = tiny(variant)

    def refuse(*_):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
    twin = flops.on_meta(method)
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    assert not any(tensor.is_meta for tensor in (*method.parameters(), *method.buffers()))
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in method.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype, p.requires_grad) for name, p in twin.named_parameters()}
