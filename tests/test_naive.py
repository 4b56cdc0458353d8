"""Do the plain versions compute what the methods compute, and is none of them a method of a run?"""

from pathlib import Path

import pytest
import torch
from helpers import (
    LAYOUT_OF_GOLDEN,
    NUM_TIMESTEPS,
    PUBLISHED,
    TINY,
    VARIANTS,
    assert_close,
    batch,
    golden,
    golden_interval,
    golden_method,
    tiny,
)
from training import drawn, tiny_trainer

import methods
from bench.job import OPTIONS, make_config
from methods import METHODS, naive
from methods.initial import option_defaults
from methods.naive import NAIVE, expert_mlp, mix, mixture
from methods.naive_updates import LoopedAdamW, LoopedEMA, loop_updates

OURS = [variant for variant, (method, _) in VARIANTS.items() if method in NAIVE]
FLOAT32_ONLY = ("switch_dit", "switch_dit one of four")  # their gates are float32 whatever the weights are
IN_DTYPES = [(variant, torch.float32) for variant in OURS]
IN_DTYPES += [(variant, torch.float64) for variant in OURS if variant not in FLOAT32_ONLY]
every_variant = pytest.mark.parametrize("variant", OURS)


def plain_twin(variant, ours):
    name, options = VARIANTS[variant]
    twin = NAIVE[name](TINY, num_timesteps=NUM_TIMESTEPS, **options)
    twin.load_state_dict(ours.state_dict())
    return twin


def loss_of(method, x, t, y, interval):
    prediction = method(x, t, y, interval, 0.25)
    return prediction, prediction.output.square().mean() + sum(prediction.penalties.values(), torch.zeros(()))


def test_there_is_a_plain_version_of_each_method_with_the_same_options():
    assert NAIVE.keys() == set(PUBLISHED)
    for name, plain in NAIVE.items():
        assert option_defaults(plain) == option_defaults(METHODS[name])


def test_no_run_can_choose_a_plain_version():
    assert not set(NAIVE.values()) & set(METHODS.values())
    assert not [name for name in (*METHODS, *OPTIONS) if "naive" in name.lower()]
    assert "naive" not in Path(methods.__file__).read_text()
    with pytest.raises(ValueError, match="not known"):
        make_config({"method": "naive"})


@every_variant
def test_plain_code_overrides_all_that_computes(variant):
    plain, ours = NAIVE[VARIANTS[variant][0]], METHODS[VARIANTS[variant][0]]
    assert plain.forward is not ours.forward and plain.specialise is not ours.specialise


@pytest.mark.parametrize(("variant", "dtype"), IN_DTYPES)
def test_outputs_penalties_and_gradients_are_equal(variant, dtype):
    ours = tiny(variant).to(dtype)
    plain = plain_twin(variant, ours).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7  # gates, routers and time are float32 in both
    for interval in ours.intervals:
        x, t, y = batch(interval, size=12, seed=interval.index)
        x = x.to(dtype)
        prediction, loss = loss_of(ours, x, t, y, interval)
        expected, plain_loss = loss_of(plain, x, t, y, interval)
        assert_close(prediction.output, expected.output, tolerance)
        assert prediction.penalties.keys() == expected.penalties.keys()
        for name, penalty in prediction.penalties.items():
            assert_close(penalty.double(), expected.penalties[name].double(), 1e-6)
        assert_close(plain.specialise(interval)(x, t, y), expected.output, tolerance)
        loss.backward()
        plain_loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        other = gradients[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            # the parity tolerance of the golden gradients, in the units of each parameter's own gradient
            scale = other.norm() / other.numel() ** 0.5
            assert (parameter.grad - other).abs().max() <= max(1e-3 * scale, 1e-9), name


@every_variant
def test_continuous_time_too(variant):
    ours = tiny(variant)
    plain = plain_twin(variant, ours)
    interval = ours.intervals[-1]
    x, t, y = batch(interval)
    t = (t + 0.5) / NUM_TIMESTEPS
    prediction, expected = ours(x, t, y, interval), plain(x, t, y, interval)
    assert_close(prediction.output, expected.output)
    for name, penalty in prediction.penalties.items():
        assert_close(penalty, expected.penalties[name])


@every_variant
def test_plain_versions_run_in_bf16(variant):
    ours = tiny(variant)
    plain, interval = plain_twin(variant, ours), ours.intervals[0]
    x, t, y = batch(interval)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, loss = loss_of(plain, x, t, y, interval)
    loss.backward()
    error = (prediction.output.float() - plain(x, t, y, interval).output).abs()
    assert error.median() < 0.03 * prediction.output.float().std()  # the median: a near-tie may be routed otherwise


@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_plain_versions_reproduce_the_golden_outputs(name):
    plain, tensors = plain_of_golden(name), golden(name)[0]
    interval = golden_interval(plain, name)
    x, t, y = tensors["x"], tensors["t"], tensors["y"]
    assert_close(plain.specialise(interval)(x, t, y), tensors["out_eval"])


def plain_of_golden(name):
    """The plain version, with the very weights and options of the method that was read."""
    ours = golden_method(name)
    (key,) = [key for key, method in METHODS.items() if type(ours) is method]
    plain = object.__new__(NAIVE[key])
    plain.__dict__ = ours.__dict__
    return plain


def test_mixing_makes_the_weighted_sum():
    stacked = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]])
    assert torch.equal(mix(stacked, torch.tensor([2.0, 0.5])), torch.tensor([[7.0, 14.0]]))


def test_a_mixture_sums_the_chosen_experts():
    layer = tiny("dit_moe no shared").network.blocks[0].mlp
    tokens = torch.randn(1, 3, TINY.width)
    output, _ = mixture(layer, tokens)
    for token in range(3):
        _, chosen, gates = layer.router(tokens[0, token : token + 1])
        (expert,), (gate,) = chosen[0], gates[0]
        assert_close(output[0, token], gate * expert_mlp(layer, int(expert), tokens[0, token]))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_plain_adamw_is_adamw(weight_decay):
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    ours, plain = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    reference = torch.optim.AdamW(ours, lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay)
    looped = LoopedAdamW(plain, 0.01, (0.9, 0.99), weight_decay)
    for step in range(5):
        for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
            gradient = None if index == 1 and step == 2 else torch.randn_like(one)  # as an expert that sits out
            one.grad, other.grad = gradient, gradient
        reference.step()
        looped.step()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "half_life"), [("dense", 40), ("multi_expert", 40), ("remix_dit", 40), ("dense", 0)], ids=lambda given: f"{given}"
)
def test_plain_updates_train_as_ours_do(method, half_life):
    settings = (f"train.ema_half_life_images={half_life}", "train.weight_decay=0.01", "system.plain=outer")
    ours, plain = tiny_trainer(method, *settings), tiny_trainer(method, *settings)
    loop_updates(plain)
    assert isinstance(plain.optimizer, LoopedAdamW) and isinstance(plain.ema, LoopedEMA)
    for step in range(4):
        losses = [trainer.step(drawn(trainer, step, step % len(ours.intervals))) for trainer in (ours, plain)]
        assert_close(losses[0]["loss"], losses[1]["loss"], 1e-5)
    moved = 0.1 * ours.config.train.lr  # AdamW's first steps are signs of gradients, and some gradients are all but zero:
    for name, parameter in plain.method.named_parameters():
        if name.endswith("qkv.bias"):  # that of a key's bias is zero, as softmax does not see it
            continue
        assert_close(dict(ours.method.named_parameters())[name], parameter, moved)
        if name in ours.ema.averages:
            assert_close(ours.ema.averages[name], plain.ema.averages[name], moved)
    assert ours.ema.images_seen == plain.ema.images_seen


def test_the_plain_average_is_the_average():
    ours, plain = tiny_trainer("dense", "train.ema_half_life_images=40"), tiny_trainer("dense", "train.ema_half_life_images=40")
    loop_updates(plain)
    for trainer in (ours, plain):
        torch.manual_seed(0)
        for step in range(3):
            for index, parameter in enumerate(trainer.method.parameters()):
                parameter.data.add_(torch.randn_like(parameter))
                parameter.grad = None if (index % 3, step) == (0, 1) else torch.zeros_like(parameter)
            trainer.ema.update(8)
    for name, average in ours.ema.averages.items():
        assert_close(average, plain.ema.averages[name], 1e-6)
    assert len(set(plain.ema.images_seen.values())) > 1


@pytest.mark.parametrize("routing", ["sliding", "random"])
def test_plain_masks_are_made_once_a_pass_and_without_a_wait(routing, monkeypatch):
    plain = NAIVE["dtr"](TINY, num_timesteps=NUM_TIMESTEPS, routing=routing)
    x, t, y = batch(plain.intervals[0])
    indexed = []
    original = naive.timestep_index
    monkeypatch.setattr(naive, "timestep_index", lambda *arguments: indexed.append(1) or original(*arguments))
    for name in ("tolist", "item"):  # a GPU stands still for these
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("waits for the device"))
    plain.specialise(plain.intervals[0])(x, t, y)
    assert len(indexed) == 1 < len(plain.network.blocks)


def test_plain_windows_are_those_of_the_paper_at_every_timestep():
    for alpha, beta in ((4.0, 0.8), (1.0, 0.5), (0.0, 1.0)):
        plain = NAIVE["dtr"](TINY, num_timesteps=1000, alpha=alpha, beta=beta)
        masks = plain.pass_masks(torch.arange(1000))
        assert masks.shape == (1, 1000, 1, TINY.width) and torch.equal(masks[:, :, 0], plain.masks)
        active = int(beta * TINY.width)
        for timestep in range(1000):
            start = round((timestep / 999) ** alpha * (TINY.width - active))
            assert masks[0, timestep, 0].nonzero().flatten().tolist() == list(range(start, start + active))
