"""Is the average of the weights the one that is declared: half-life in images, warm-up, each expert on its own updates?"""

import pytest
import torch
from torch import nn
from training import drawn, state_of, tiny_trainer

from bench.ema import EMA


def one_weight(value: float = 0.0) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def take(module: nn.Linear, ema: EMA, value: float, num_images: int) -> float:
    """The average after the weight became `value` by a step on `num_images` images."""
    nn.init.constant_(module.weight, value)
    module.weight.grad = torch.ones_like(module.weight)
    ema.update(num_images)
    return float(ema.averages["weight"])


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_after_one_half_life_half_of_the_old_weights_remains_whatever_the_batch_size(batch_size):
    module = one_weight()
    ema = EMA(module, half_life_images=100, warmup=0)
    for _ in range(100 // batch_size):
        average = take(module, ema, 1.0, batch_size)
    assert average == pytest.approx(0.5, rel=1e-5)
    for _ in range(200 // batch_size):
        average = take(module, ema, 1.0, batch_size)
    assert average == pytest.approx(1 - 0.5**3, rel=1e-5)


def test_warm_up_shortens_the_half_life_to_a_part_of_the_images_seen():
    module = one_weight()
    ema = EMA(module, half_life_images=100, warmup=0.25)
    expected = 0.0
    for step in range(1, 101):
        value = float(step % 7)
        half_life = min(100.0, 0.25 * 10 * step)  # until 400 images were seen
        expected += (1 - 0.5 ** (10 / half_life)) * (value - expected)
        assert take(module, ema, value, 10) == pytest.approx(expected, rel=1e-5)
        assert ema.decay(10, 10 * step) == 0.5 ** (10 / half_life)
    assert ema.decay(10, 390) < ema.decay(10, 400) == ema.decay(10, 4000) == 0.5**0.1


def test_no_half_life_means_the_weights_themselves():
    module = one_weight(3.0)
    ema = EMA(module, half_life_images=0, warmup=0.05)
    module.weight.grad = torch.ones_like(module.weight)
    ema.update(10)
    assert ema.averages == {} and ema.images_seen == {"weight": 10}
    with ema.applied():
        assert module.weight.item() == 3.0


def test_negative_settings_are_refused():
    for half_life, warmup in ((-1, 0), (1, -0.1)):
        with pytest.raises(ValueError, match=r"must not be negative[^\n]*$"):
            EMA(one_weight(), half_life, warmup)


def test_the_averages_are_applied_and_taken_back_even_after_an_error():
    trained = tiny_trainer("dense", "train.ema_half_life_images=30")
    for step in range(3):
        trained.step(drawn(trained, step))
    before = state_of(trained)
    parameters = dict(trained.method.named_parameters())
    for error in (None, RuntimeError("inside")):
        try:
            with trained.ema.applied():
                for name, parameter in trained.method.named_parameters():
                    assert parameter is parameters[name] and torch.equal(parameter, before[f"ema.{name}"]), name
                if error:
                    raise error
        except RuntimeError as raised:
            assert raised is error
        after = state_of(trained)
        assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [name for name in parameters if not torch.equal(before[f"ema.{name}"], before[f"model.{name}"])]
    assert moved == list(parameters)


def test_training_goes_on_from_the_weights_and_not_from_the_averages():
    plain, looked_at = (tiny_trainer("multi_expert", "train.ema_half_life_images=30") for _ in range(2))
    for step in range(4):
        plain.step(drawn(plain, step, step % 3))
        looked_at.step(drawn(looked_at, step, step % 3))
        with looked_at.ema.applied():
            pass
    assert all(torch.equal(tensor, state_of(looked_at)[name]) for name, tensor in state_of(plain).items())


def test_each_expert_is_averaged_over_its_own_updates_only():
    """By hand: the average of an expert that had m of the steps has seen m batches, and stands still meanwhile."""
    trained = tiny_trainer("multi_expert", "train.ema_half_life_images=20", "train.ema_warmup=0.5")
    expected = {name: p.detach().clone() for name, p in trained.method.named_parameters()}
    updates = [0, 0, 0]
    for step, expert in enumerate([1, 1, 0, 1, 0, 1, 1]):
        trained.step(drawn(trained, step, expert))
        updates[expert] += 1
        half_life = min(20.0, 0.5 * 8 * updates[expert])
        for name, parameter in trained.method.named_parameters():
            if name.startswith(f"networks.{expert}."):
                expected[name] += (1 - 0.5 ** (8 / half_life)) * (parameter.detach() - expected[name])
    for name, average in trained.ema.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
        assert trained.ema.images_seen[name] == 8 * updates[int(name.split(".")[1])]
    assert updates == trained.updates == [2, 5, 0]
    untouched = [name for name in expected if name.startswith("networks.2.")]
    start = dict(tiny_trainer("multi_expert").method.named_parameters())
    assert untouched and all(torch.equal(trained.ema.averages[name], start[name]) for name in untouched)


@pytest.mark.parametrize("method", ["remix_dit", "dit_moe"])
def test_what_is_shared_is_averaged_over_all_updates(method):
    trained = tiny_trainer(method, "train.ema_half_life_images=20")
    for step in range(5):
        trained.step(drawn(trained, step, step % len(trained.method.intervals)))
    assert set(trained.ema.images_seen.values()) == {40}
