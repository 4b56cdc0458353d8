"""Does one step, and the loop around it, do what the released training loop does, for every method?"""

import json
import math

import pytest
import torch
from helpers import assert_close, golden, golden_method
from training import RUNS, UNMEASURED, differing, drawn, gradient_of, rows, state_of, tiny_trainer

from bench.data import DataSource
from bench.data.source import TensorImages
from bench.distributed import World
from bench.job import make_config
from bench.randomness import Batch
from bench.switches import SWITCHES
from bench.trainer import Trainer
from methods.released import to_released

every_method = pytest.mark.parametrize("method", RUNS)


@pytest.mark.parametrize("plain", [(), *((name,) for name in SWITCHES), tuple(SWITCHES)], ids=",".join)
def test_six_steps_of_the_released_training_loop(plain):
    tensors, facts = golden("dit_traj")
    images = torch.rand(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(16) % 10
    data = DataSource("random", 10, 4, 8, TensorImages(images, labels), TensorImages(images, labels), lambda: "")
    half_life = 8 * math.log(0.5) / math.log(facts["ema_decay"])  # of 8 images a step, without warm-up
    settings = [
        "diffusion.schedule=linear",
        "train.lr=1e-3",
        "train.batch_size=8",
        f"train.ema_half_life_images={half_life}",
        "train.ema_warmup=0",
        "budget.amount=48",
        "system.device=cpu",
        *([f"system.plain={','.join(plain)}"] if plain else []),
    ]
    method = golden_method("dit")
    trained = Trainer(method, make_config({}, settings), data, cost=UNMEASURED)
    for step in range(6):
        x0, noise, t, y = (tensors[name][step] for name in ("x", "noise", "t", "y"))
        losses = trained.step(Batch(x0, noise, t, y, method.intervals[0]))
        expected = {"loss": tensors["loss"], "grad_norm": tensors["grad_norm"]}
        expected |= {"mse": tensors["mse"].mean(dim=1), "vb": tensors["vb"].mean(dim=1)}
        for name, values in expected.items():
            assert float(losses[name]) == pytest.approx(float(values[step]), rel=1e-5), f"{name} at step {step}"
    final = to_released(method)
    with trained.ema.applied():
        averaged = {name: tensor.clone() for name, tensor in to_released(method).items()}
    names = [name.removeprefix("final.") for name in tensors if name.startswith("final.")]
    assert "blocks.1.attn.qkv.weight" in names
    for name in names:
        assert_close(final[name], tensors[f"final.{name}"])
        assert_close(averaged[name], tensors[f"ema.{name}"])
    assert (final["blocks.1.attn.qkv.weight"] - averaged["blocks.1.attn.qkv.weight"]).abs().max() > 1e-3


@every_method
def test_every_method_trains_in_bf16_too(method, tmp_path):
    trained = tiny_trainer(method, "train.precision=bf16", "train.ema_half_life_images=20", folder=tmp_path / "bf16")
    before = state_of(trained)
    trained.fit()
    assert all(tensor.isfinite().all() for tensor in state_of(trained).values())
    assert {p.dtype for p in trained.method.parameters()} == {torch.float32}
    moved = set(differing(before, state_of(trained)))
    assert {f"model.{name}" for name, p in trained.method.named_parameters() if p.requires_grad} <= moved
    full = tiny_trainer(method, folder=tmp_path / "fp32")
    full.fit()
    pairs = list(zip(rows(tmp_path / "bf16", "train"), rows(tmp_path / "fp32", "train"), strict=True))
    assert any(low["loss"] != high["loss"] for low, high in pairs)
    for low, high in pairs:
        assert low["loss"] == pytest.approx(high["loss"], rel=0.1)


@every_method
def test_micro_batches_change_only_the_rounding(method):
    whole, cut = tiny_trainer(method), tiny_trainer(method, "train.micro_batches=4")
    if method == "dit_moe":  # its balance loss is of a micro-batch: the one term that is no mean over images
        for of in (whole, cut):
            of.method.balance_weight = 0.0
    for step in range(3):
        batch = drawn(whole, step, step % len(whole.method.intervals))
        one, other = whole.step(batch), cut.step(batch)
        assert one.keys() == other.keys()
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-4), name
        if step == 0:
            for (name, p), q in zip(whole.method.named_parameters(), cut.method.parameters(), strict=True):
                of_one, of_other = gradient_of(whole, p), gradient_of(cut, q)
                assert (of_one is None) == (of_other is None), name
                if of_one is not None:
                    assert (of_one - of_other).abs().max() <= 1e-5 * (1 + of_one.abs().max()), name
    assert cut.steps_done == 3 == sum(cut.updates)
    assert {int(state["step"]) for state in cut.optimizer.state.values()} <= {1, 2, 3}
    counts = {int(state["step"]) for state in whole.optimizer.state.values()}
    assert counts == {int(state["step"]) for state in cut.optimizer.state.values()}


def test_balance_loss_of_micro_batches_is_their_mean():
    whole, cut = tiny_trainer("dit_moe"), tiny_trainer("dit_moe", "train.micro_batches=4")
    batch = drawn(whole)
    with torch.no_grad():
        parts = [cut.method(cut.objective.noised(p.x0, p.t, p.noise), p.t, p.y, p.interval) for p in map(batch.part, quarters())]
    expected = torch.stack([part.penalties["balance"] for part in parts]).mean()
    assert float(cut.step(batch)["penalty/balance"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(whole.step(batch)["penalty/balance"]) != pytest.approx(float(expected), rel=1e-5)


def quarters() -> list[slice]:
    return [slice(start, start + 2) for start in range(0, 8, 2)]


def test_micro_batches_that_do_not_fit_a_rank_are_refused():
    with pytest.raises(ValueError, match=r"^4 images per rank cannot be cut into 8 micro-batches: choose [^\n]*$"):
        tiny_trainer("dense", "train.micro_batches=8", world=World(0, 2))
    with pytest.raises(ValueError, match=r"^train.batch_size 8 cannot be shared equally by 3 ranks: [^\n]*$"):
        tiny_trainer("dense", world=World(0, 3))


def test_penalties_are_logged_by_name_and_are_part_of_what_is_minimised(tmp_path):
    for method, name in (("switch_dit", "diffusion_prior"), ("dit_moe", "balance"), ("remix_dit", "mixing_prior")):
        tiny_trainer(method, folder=tmp_path / method).fit()
        written = rows(tmp_path / method, "train")
        assert all(math.isfinite(row[f"penalty/{name}"]) for row in written) and written[0][f"penalty/{name}"] > 0
        assert written[0]["loss"] == pytest.approx(written[0]["mse"] + written[0]["vb"], rel=1e-5)  # the penalty is beside it
    annealed = [row["penalty/mixing_prior"] for row in rows(tmp_path / "remix_dit", "train") if row["interval"] == 0]
    assert annealed[-1] < annealed[0] / 3
    without = tiny_trainer("dit_moe", "options.balance_weight=0")
    with_it = tiny_trainer("dit_moe", "options.balance_weight=10")
    for of in (without, with_it):
        of.step(drawn(of))
    router = "network.blocks.0.mlp.router.weight"
    gradients = [dict(of.method.named_parameters())[router].grad for of in (without, with_it)]
    assert not torch.allclose(*gradients)


@every_method
def test_experts_get_equal_steps_and_the_metrics_say_which(method, tmp_path):
    trained = tiny_trainer(method, folder=tmp_path)
    trained.fit()
    assert sum(trained.updates) == 12 == trained.steps_done and max(trained.updates) - min(trained.updates) <= 1
    assert trained.images_seen == 96
    counted = [0] * len(trained.method.intervals)
    for row in rows(tmp_path, "train"):
        counted[row["interval"]] += row["num_steps"]
        place = trained.method.intervals[row["interval"]]
        assert (row["start"], row["stop"]) == (place.start, place.stop) and row["lr"] == 1e-3
    assert counted == trained.updates
    last = json.loads((tmp_path / "progress.json").read_text())
    assert (last["step"], last["images_seen"]) == (12, 96)
    measured = rows(tmp_path, "heldout")
    assert [row["step"] for row in measured] == [0] * 4 + [6] * 4 + [12] * 4
    assert [row["bin"] for row in measured] == [0, 1, 2, 3] * 3


# Learning rate


def test_learning_rate_rises_and_falls_as_declared(tmp_path):
    asked = ("train.lr_schedule=cosine", "train.lr_final=0.1", "train.lr_warmup_images=32", "system.log_every=1")
    tiny_trainer("remix_dit", *asked, folder=tmp_path).fit()
    for row in rows(tmp_path, "train"):
        step = row["step"] - 1  # the rate of the step that led here
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 12))
        assert row["lr"] == pytest.approx(1e-3 * min(1, (step + 1) * 8 / 32) * cosine, rel=1e-6)
    trained = tiny_trainer("remix_dit", *asked)
    trained.fit()
    rates = [group["lr"] for group in trained.optimizer.param_groups]
    assert rates[1] == pytest.approx(10 * rates[0])  # the coefficients' own rate follows the same rule
