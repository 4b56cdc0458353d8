"""Does every method keep the contract that trainer, sampler and evaluator rely on?"""

import pytest
import torch
from helpers import NUM_TIMESTEPS, TINY, VARIANTS, assert_close, batch, randomise, tiny

from bench.intervals import partition
from bench.method import Method
from methods import METHODS

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def loss_of(method, x, t, y, interval, progress=0.0):
    prediction = method(x, t, y, interval, progress)
    return prediction.output.square().mean() + sum(prediction.penalties.values(), torch.zeros(()))


def test_every_method_is_tested():
    assert {name for name, _ in VARIANTS.values()} == METHODS.keys()
    assert all(issubclass(method, Method) for method in METHODS.values())


@every_variant
def test_intervals_partition_the_schedule(variant):
    intervals = tiny(variant).intervals
    assert intervals == partition(len(intervals), NUM_TIMESTEPS)


@every_variant
def test_specialised_network_equals_the_training_pass(variant):
    method = tiny(variant)
    for interval in method.intervals:
        x, t, y = batch(interval, seed=interval.index)
        prediction = method(x, t, y, interval)
        assert prediction.output.shape == (6, TINY.out_channels, TINY.input_size, TINY.input_size)
        assert prediction.output.std() > 1e-3
        assert_close(method.specialise(interval)(x, t, y), prediction.output, 1e-6)


@every_variant
def test_specialising_changes_nothing(variant):
    method = tiny(variant)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    needs_gradient = [p.requires_grad for p in method.parameters()]
    for interval in method.intervals:
        method.specialise(interval)(*batch(interval))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert [p.requires_grad for p in method.parameters()] == needs_gradient


@every_variant
def test_output_depends_on_everything_it_should(variant):
    method = tiny(variant).requires_grad_(False)
    interval = method.intervals[0]
    x, t, y = batch(interval)
    output = method(x, t, y, interval).output
    other_t = (t + 1 - interval.start) % interval.length + interval.start
    for changed in ((x + 0.1, t, y), (x, other_t, y), (x, t, (y + 1) % (TINY.num_classes + 1))):
        difference = (method(*changed, interval).output - output).abs().amax(dim=(1, 2, 3))
        assert (difference > 1e-6).all()


@every_variant
def test_sample_does_not_depend_on_its_neighbours(variant):
    method = tiny(variant).requires_grad_(False)
    interval = method.intervals[-1]
    x, t, y = batch(interval)
    whole = method(x, t, y, interval).output
    denoiser = method.specialise(interval)
    for i in range(len(t)):
        assert_close(denoiser(x[i : i + 1], t[i : i + 1], y[i : i + 1]), whole[i : i + 1])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(method(x[order], t[order], y[order], interval).output, whole[order])


@every_variant
def test_gradients_reach_every_trainable_parameter(variant):
    method = tiny(variant)
    for interval in method.intervals:
        for seed in range(2):
            loss_of(method, *batch(interval, size=16, seed=seed), interval).backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@every_variant
def test_a_step_lowers_the_loss(variant):
    method = tiny(variant)
    interval = method.intervals[0]
    x, t, y = batch(interval)
    optimiser = torch.optim.SGD(method.param_groups(lr=1e-4), lr=1e-4)
    for group in optimiser.param_groups:
        group["lr"] = 1e-4
    before = loss_of(method, x, t, y, interval)
    before.backward()
    optimiser.step()
    assert loss_of(method, x, t, y, interval) < before


@every_variant
def test_state_dict_goes_round(variant):
    method, other = tiny(variant, seed=0), tiny(variant, seed=1)
    interval = method.intervals[-1]
    x, t, y = batch(interval)
    assert (method(x, t, y, interval).output - other(x, t, y, interval).output).abs().max() > 1e-3
    other.load_state_dict(method.state_dict())
    assert torch.equal(method(x, t, y, interval).output, other(x, t, y, interval).output)


@every_variant
def test_initial_weights_and_passes_depend_on_the_seed_alone(variant):
    name, options = VARIANTS[variant]

    def build(seed):
        torch.manual_seed(seed)
        return METHODS[name](TINY, num_timesteps=NUM_TIMESTEPS, **options)

    first, second, third = build(0), build(0), build(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    losses = []
    for method in (randomise(first), randomise(second)):
        torch.rand(3)  # the pass draws nothing from the global generator
        method.train()
        loss = loss_of(method, *batch(method.intervals[0]), method.intervals[0])
        loss.backward()
        losses.append([loss] + [p.grad for p in method.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


@every_variant
def test_experts_are_independent_exactly_where_the_method_says_so(variant):
    """Then each can be trained in a job of its own: no two intervals train one parameter, or read what another trains."""
    method = tiny(variant)
    if len(method.intervals) == 1:
        return
    trained = []
    for interval in method.intervals:
        method.zero_grad()
        loss_of(method, *batch(interval, size=16), interval).backward()
        trained.append({name for name, parameter in method.named_parameters() if parameter.grad is not None})
    shared = sum(len(names) for names in trained) - len(set().union(*trained))
    assert method.independent_experts == (shared == 0)
    if method.independent_experts:
        x, t, y = batch(method.intervals[0])
        output = method(x, t, y, method.intervals[0]).output
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                if name not in trained[0]:
                    parameter.add_(1)
        assert torch.equal(method(x, t, y, method.intervals[0]).output, output)


@every_variant
def test_intervals_share_all_parameters_exactly_where_the_method_says_so(variant):
    """Then one step can train several: each parameter has a gradient from every interval."""
    method = tiny(variant)
    learned = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    trained = []
    for interval in method.intervals:
        method.zero_grad()
        loss_of(method, *batch(interval, size=16), interval).backward()
        trained.append({name for name, parameter in method.named_parameters() if parameter.grad is not None})
    assert method.intervals_share_parameters == (len(trained) > 1 and all(names == learned for names in trained))


@every_variant
def test_batch_outside_the_interval_is_refused(variant):
    method = tiny(variant)
    interval = method.intervals[0]
    x, t, y = batch(interval)
    t[3] = interval.stop
    with pytest.raises(ValueError, match="split the batch by interval"):
        method(x, t, y, interval)


@every_variant
def test_continuous_times_in_the_unit_interval_are_accepted(variant):
    method = tiny(variant)
    interval = method.intervals[-1]
    x, _, y = batch(interval)
    t = torch.linspace(interval.start + 0.01, interval.stop - 0.01, 6) / NUM_TIMESTEPS
    prediction = method(x, t, y, interval)
    assert prediction.output.isfinite().all()
    assert_close(method.specialise(interval)(x, t, y), prediction.output, 1e-6)
    if len(method.intervals) == 1:
        method(x, torch.tensor([0.0, 1e-4, 0.5, 0.9, 0.9999, 1.0]), y, interval)  # the ends too
    else:
        with pytest.raises(ValueError, match="split the batch by interval"):
            method(x, t * 0, y, interval)


@every_variant
def test_methods_build_and_run_on_the_meta_device(variant):
    name, options = VARIANTS[variant]
    with torch.device("meta"):
        method = METHODS[name](TINY, num_timesteps=NUM_TIMESTEPS, **options)
        interval = method.intervals[0]
        x, t, y = torch.empty(2, 2, 4, 4), torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
        prediction = method(x, t, y, interval)
        (prediction.output.mean() + sum(prediction.penalties.values(), torch.zeros(()))).backward()
    assert prediction.output.shape == (2, TINY.out_channels, 4, 4)
    assert all(p.is_meta for p in method.parameters())
    real = tiny(variant)
    assert method.num_active_parameters() == real.num_active_parameters() <= sum(p.numel() for p in real.parameters())
    assert {k: v.shape for k, v in method.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


@every_variant
def test_bfloat16_autocast_is_close(variant):
    method = tiny(variant)
    interval = method.intervals[0]
    x, t, y = batch(interval, size=16)
    exact = method(x, t, y, interval)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = method(x, t, y, interval)
        sampled = method.specialise(interval)(x, t, y)
    error = (prediction.output.float() - exact.output).abs().mean()
    assert 0 < error < 0.05 * exact.output.abs().mean()
    assert (sampled.float() - prediction.output.float()).abs().mean() < 0.05 * exact.output.abs().mean()
    for name, penalty in prediction.penalties.items():
        assert abs(penalty - exact.penalties[name]) <= 0.1 * abs(exact.penalties[name]), name
    (prediction.output.float().square().mean() + sum(prediction.penalties.values(), torch.zeros(()))).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in method.parameters() if p.grad is not None)


@every_variant
def test_penalties_are_finite_scalars_with_gradients(variant):
    method = tiny(variant)
    interval = method.intervals[0]
    for name, penalty in method(*batch(interval), interval, 0.5).penalties.items():
        assert penalty.shape == (), name
        assert penalty.isfinite()
        assert penalty.requires_grad
