"""Does AdamW step by an outer product as by the same gradient made whole?"""

import copy

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from training import drawn, state_of, tiny_trainer

from bench import adamw
from bench.adamw import AdamW, cut
from bench.distributed import gradient_norm
from bench.method import Outer

SHAPES = [(4, 24, 7), (3, 10), (1, 5, 8), (2, 3, 2, 2)]
KERNELS = {"fused": {"fused": True}, "plain": {"foreach": False}}


def outer_of(shape: tuple[int, ...], source: torch.Generator) -> Outer:
    return Outer(torch.randn(shape[0], generator=source), torch.randn(shape[1:], generator=source))


def whole(gradient: Outer) -> Tensor:
    return torch.einsum("k,...->k...", *gradient)


@pytest.mark.parametrize("num_values", [1, 9, 60, 1 << 19])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_by_outer_products_is_one_by_gradients_made_whole(
    kernel: str, num_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a parameter has a gradient of its own in some steps, or none at all."""
    monkeypatch.setitem(adamw.PIECE, "cpu", num_values)
    source = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=source)) for shape in SHAPES]
    twins = copy.deepcopy(ours)
    outer: dict[nn.Parameter, Outer] = {}
    groups = [{"params": ours[:2], "lr": 1e-2}, {"params": ours[2:], "lr": 3e-3}]
    optimizer = AdamW(groups, outer, betas=(0.9, 0.99), weight_decay=0.1, **KERNELS[kernel])
    expected = torch.optim.AdamW(
        [{"params": twins[:2], "lr": 1e-2}, {"params": twins[2:], "lr": 3e-3}],
        betas=(0.9, 0.99),
        weight_decay=0.1,
        **KERNELS[kernel],
    )
    for step in range(4):
        optimizer.zero_grad()
        assert not outer
        expected.zero_grad()
        for index, (own, twin) in enumerate(zip(ours, twins, strict=True)):
            gradient = outer_of(own.shape, source)
            if (step + index) % 4 == 3:
                continue
            twin.grad = whole(gradient)
            if (step + index) % 4 == 2:
                own.grad = twin.grad.clone()
            else:
                outer[own] = gradient
        assert outer
        assert_close(gradient_norm(ours, outer.values()), gradient_norm(twins), 1e-6)
        optimizer.step()
        expected.step()
        for own, twin in zip(ours, twins, strict=True):
            assert_close(own, twin, 1e-6)
            state, twins_state = optimizer.state[own], expected.state[twin]
            assert state.keys() == twins_state.keys()
            for name in state:
                assert_close(state[name], twins_state[name], 1e-6)
                assert state[name].dtype == twins_state[name].dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_values", [1, 8, 14, 15, 60, 10_000])
def test_pieces_are_all_of_a_parameter_once_each_in_a_row(shape: tuple[int, ...], num_values: int) -> None:
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    found = [values[place] for place in cut(values.shape, num_values)]
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in found]), values.reshape(-1))
    assert all(piece.is_contiguous() for piece in found)
    smallest = values[0, 0].numel()
    assert all(piece.numel() <= max(num_values, smallest) for piece in found)


VARIANTS = [
    (),
    ("options.coefficients=local", "train.micro_batches=2"),
    ("options.mixer=raw", "train.weight_decay=0.1"),
    ("options.mixer=raw", "options.coefficients=local", "options.coefficient_lr=0.1"),
    ("options.mixer=one_hot",),
]


@pytest.mark.parametrize("kernel", ["", "optimizer"], ids=["fused", "plain"])
@pytest.mark.parametrize("settings", VARIANTS, ids=",".join)
def test_a_training_is_the_same_whether_gradients_are_made_whole_or_not(settings: tuple[str, ...], kernel: str) -> None:
    """One after the other: a trainer's switches are those of the process."""
    found = []
    for names in (kernel, f"{kernel},outer"):
        plain = [f"system.plain={names.strip(',')}"] if names else []
        trained = tiny_trainer("remix_dit", "train.ema_half_life_images=30", *settings, *plain)
        trained.fit()
        assert bool(trained.outer) == ("outer" not in names) and trained.steps_done == 12
        found.append((state_of(trained), trained.ema.images_seen))
    (one, seen), (other, seen_whole) = found
    assert one.keys() == other.keys() and seen == seen_whole
    for name, tensor in one.items():
        assert_close(tensor, other[name], 1e-5)


def test_bases_have_no_gradients_of_their_own_in_a_trainers_step() -> None:
    trained = tiny_trainer("remix_dit")
    stacked = [p for block in trained.method.network.blocks for bases in block.bases().values() for p in bases.parameters()]
    for step in range(2):
        trained.step(drawn(trained, step))
        assert set(trained.outer) == set(stacked) and all(p.grad is None for p in stacked), step
    trained.optimizer.zero_grad()
    assert not trained.outer
