"""Does a step in memory that is kept give what one in new memory gives, and is nothing left of the step before?"""

import copy
import math

import pytest
import torch
from helpers import assert_close, batch, tiny
from training import differing, state_of, tiny_trainer

from bench.switches import without
from methods.bases import LEAST_VALUES, Bases, Kept, cut, inner

VARIANTS = ["remix_dit", "remix_dit local", "remix_dit one_hot"]


def step_of(method, interval, seed=0, num_passes=1):
    x, t, y = batch(interval, seed=seed)
    with method.one_step(interval):
        for _ in range(num_passes):
            prediction = method(x, t, y, interval)
            (prediction.output.square().mean() + sum(prediction.penalties.values(), torch.zeros(()))).backward()


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def stacked(method):
    return [p for block in method.network.blocks for linear in block.bases().values() for p in linear.parameters()]


def use_new_memory(monkeypatch):
    monkeypatch.setattr(Kept, "like", lambda self, name, wanted: torch.full_like(wanted, math.nan, requires_grad=False))


@pytest.mark.parametrize(
    "settings", [(), ("options.coefficients=local", "train.micro_batches=2"), ("train.intervals_per_step=4",)]
)
def test_training_is_the_same_to_the_bit_as_in_new_memory(settings, monkeypatch):
    kept, new = (tiny_trainer("remix_dit", "train.ema_half_life_images=30", *settings) for _ in range(2))
    kept.fit()
    use_new_memory(monkeypatch)
    new.fit()
    assert kept.steps_done == 12 and not differing(state_of(kept), state_of(new))


def test_mixed_weights_and_gradients_stay_where_they_are():
    trained = tiny_trainer("remix_dit")
    places = []
    for step in range(3):
        with trained.method.one_step(trained.method.intervals[step]):
            mixed = [p for of_block in trained.method.mixed for pair in of_block for p in pair]
            assert all(p.grad is None for p in mixed)
            for p in mixed:
                p.grad = torch.ones_like(p)
        places.append([p.data_ptr() for p in mixed] + [p.grad.data_ptr() for p in stacked(trained.method)])
        trained.method.zero_grad(set_to_none=True)
    assert places[0] == places[1] == places[2] and len(set(places[0])) == len(places[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_is_that_of_its_step_however_it_was_cleared(variant, set_to_none):
    """And of one that was not cleared, the sum, as autograd has it."""
    method, other = tiny(variant), tiny(variant)
    first, second = method.intervals[0], method.intervals[1]
    step_of(method, first)
    of_first = gradients(method)
    method.zero_grad(set_to_none=set_to_none)
    step_of(method, second, seed=1, num_passes=2)
    step_of(other, second, seed=1, num_passes=2)
    of_second = gradients(other)
    assert all(torch.equal(grad, of_second[name]) for name, grad in gradients(method).items())
    step_of(other, first)
    with without("mixing"):
        plain = tiny(variant)
        step_of(plain, first)
        step_of(plain, second, seed=1, num_passes=2)
    summed = gradients(other)
    for name, grad in gradients(plain).items():
        assert_close(summed[name], grad, 1e-5)
        assert_close(summed[name], of_first[name] + of_second[name], 1e-5)


def test_a_method_that_moves_gets_memory_of_its_new_kind():
    method, fresh = tiny("remix_dit"), tiny("remix_dit").double()
    interval = method.intervals[2]
    step_of(method, interval)
    method.double().zero_grad()
    for of in (method, fresh):
        with of.one_step(interval) as leaves:
            for leaf in leaves:
                leaf.grad = torch.full_like(leaf, 0.5)
    assert {p.grad.dtype for p in stacked(method)} == {torch.float64}
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(stacked(method), stacked(fresh), strict=True))


def test_what_is_kept_is_no_state_and_not_copied():
    method = tiny("remix_dit")
    names, count = list(method.state_dict()), len(list(method.parameters()))
    step_of(method, method.intervals[0])
    linears = [linear for block in method.network.blocks for linear in block.bases().values()]
    assert all(len(linear.kept.tensors) == 4 for linear in linears)
    assert list(method.state_dict()) == names and len(list(method.parameters())) == count
    twin = copy.deepcopy(method)
    assert not any(linear.kept.tensors for block in twin.network.blocks for linear in block.bases().values())


def test_mixing_for_a_step_is_mixing():
    torch.manual_seed(0)
    bases = Bases(3, 8, 5)
    torch.nn.init.normal_(bases.weight)
    torch.nn.init.normal_(bases.bias)
    mixing = torch.randn(3, requires_grad=True)
    for kept, expected in zip(bases.mix_for_step(mixing), bases.mix(mixing), strict=True):
        assert kept.is_leaf and kept.requires_grad and torch.equal(kept, expected)
    expected_weight = bases.mix_for_step(mixing)[0].detach().clone()
    assert_close(expected_weight, torch.einsum("k,koi->oi", mixing, bases.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bases.mix_for_step(mixing)[0], expected_weight)


def test_gradients_spread_in_float32_under_autocast_too():
    torch.manual_seed(0)
    gradients = []
    for enabled in (False, True):
        bases = Bases(3, 8, 5)
        torch.manual_seed(1)
        bases.initialise()
        mixing = torch.tensor([0.2, 0.3, 0.5])
        pair = bases.mix_for_step(mixing)
        for p in pair:
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            of_mixing = bases.spread(mixing, *pair)
        gradients.append((of_mixing, bases.weight.grad, bases.bias.grad))
    assert all(torch.equal(one, other) and one.abs().sum() > 0 for one, other in zip(*gradients, strict=True))


LARGE, SMALL = (48, LEAST_VALUES // 48 + 1), (48, LEAST_VALUES // 48)


@pytest.mark.parametrize(("shape", "num_pieces"), [(LARGE, 16), (SMALL, 1), ((LEAST_VALUES + 1,), 1), ((LEAST_VALUES,), 16)])
def test_large_linears_are_cut_for_the_threads_of_a_cpu(shape, num_pieces):
    stacked = torch.randn(3, *shape)
    pieces = cut(stacked)
    assert pieces.shape == (num_pieces, 3, stacked[0].numel() // num_pieces) and pieces.data_ptr() == stacked.data_ptr()
    assert torch.equal(pieces.transpose(0, 1).reshape(3, -1), stacked.flatten(1))
    assert len(cut(stacked.to("meta"))) == 1


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_pieces_give_what_the_whole_gives(shape):
    bases, mixing = Bases(3, shape[1], shape[0]).double(), torch.randn(3).double()
    torch.nn.init.normal_(bases.weight)
    torch.nn.init.normal_(bases.bias)
    for pieces, whole in zip(bases.mix_for_step(mixing), bases.mix(mixing), strict=True):
        assert_close(pieces, whole, 1e-12)
    other = torch.randn(shape).double()
    assert_close(inner(bases.weight, other), (bases.weight * other).sum(dim=(1, 2)), 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_names_its_leaves_in_the_order_of_their_use(variant):
    """Backwards, that is the order in which their gradients come and go to other ranks: block by block, mixed weights too."""
    method, interval = tiny(variant), tiny(variant).intervals[0]
    came = []
    with method.one_step(interval) as leaves:
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(lambda leaf: came.append(id(leaf)))
        x, t, y = batch(interval)
        method(x, t, y, interval).output.square().mean().backward()
        parts = [list(map(id, method.network.final.parameters()))]
        for block, mixed in zip(method.network.blocks, method.mixed, strict=True):
            parts.insert(1, [id(p) for p in (*block.modulation.parameters(), *(p for pair in mixed for p in pair))])
    for part in parts:
        assert sorted(came[: len(part)]) == sorted(part) and sorted(map(id, leaves[-len(part) :])) == sorted(part)
        came, leaves = came[len(part) :], leaves[: -len(part)]
    assert len(came) > 5 and set(came) <= set(map(id, leaves))
