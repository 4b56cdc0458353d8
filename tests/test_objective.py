"""Do the objectives and weightings fit the methods, and train from end to end?"""

import json
import math

import pytest
import torch
from training import RUNS, differing, drawn, rows, saved, state_of, tiny_trainer

from bench import cli
from bench.config import DiffusionConfig
from bench.diffusion import min_snr_weight

SPLIT = [method for method in RUNS if len(tiny_trainer(method).method.intervals) > 1]
WHOLE = [method for method in RUNS if method not in SPLIT]


@pytest.mark.parametrize("method", SPLIT)
@pytest.mark.parametrize(
    ("setting", "name"),
    [("diffusion.objective=flow", "rectified flow"), ("diffusion.loss_weight=uncertainty", "uncertainty weighting")],
)
def test_what_draws_over_the_whole_schedule_is_refused_by_methods_that_split_it(method, setting, name):
    sentence = rf"^{name} draws timesteps over the whole schedule, which this method splits into \d: choose [^\n]*$"
    with pytest.raises(ValueError, match=sentence):
        tiny_trainer(method, setting)
    tiny_trainer(method, "diffusion.loss_weight=min_snr")


def test_one_interval_is_no_split():
    for method in (method for method in SPLIT if "experts" in RUNS[method]):
        trained = tiny_trainer(method, "options.experts=1", "diffusion.loss_weight=uncertainty")
        assert math.isfinite(float(trained.step(drawn(trained))["loss"]))


def test_rectified_flow_has_no_weighting():
    with pytest.raises(ValueError, match=r"which rectified flow does not have: set it to uniform$"):
        DiffusionConfig(objective="flow", loss_weight="min_snr")


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize(
    "setting",
    ["objective=flow", "loss_weight=min_snr", "loss_weight=uncertainty"],
)
def test_every_objective_trains(method, setting, tmp_path):
    trained = tiny_trainer(method, f"diffusion.{setting}", "train.lr=3e-3", "budget.amount=480", folder=tmp_path)
    before = state_of(trained)
    trained.fit()
    written = rows(tmp_path, "train")
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["mse"]) for row in written)
    assert ("vb" in written[0]) == ("flow" not in setting)
    errors = [row["mse"] for row in written]
    assert sum(errors[-10:]) < 0.9 * sum(errors[:10])
    moved = differing(before, state_of(trained))
    assert {f"model.{name}" for name, p in trained.method.named_parameters() if p.requires_grad} <= set(moved)
    learned = {name: tensor for name, tensor in saved(tmp_path)[0].items() if name.startswith("objective.")}
    assert (learned.keys() == {"objective.log_scales"}) == ("uncertainty" in setting)
    if learned:
        assert (learned["objective.log_scales"] != 0).all()


def test_uncertainty_weights_have_a_rate_of_their_own():
    trained = tiny_trainer("dense", "diffusion.loss_weight=uncertainty", "train.lr_schedule=cosine")
    (scales,) = trained.objective.module.parameters()
    (group,) = [group for group in trained.optimizer.param_groups if any(p is scales for p in group["params"])]
    assert group["lr"] == 0.025 and len(group["params"]) == 1
    losses = trained.step(drawn(trained))
    # At zero log-scales: half the loss, and the first Adam step moves every scale by its rate.
    assert float(losses["loss"]) == pytest.approx(0.5 * float(losses["mse"] + losses["vb"]), rel=1e-5)
    assert scales.abs().tolist() == pytest.approx([0.025] * 8, rel=1e-3)


def test_min_snr_weighs_the_squared_error_and_not_the_variational_term():
    plain, weighted = tiny_trainer("dense"), tiny_trainer("dense", "diffusion.loss_weight=min_snr", "diffusion.min_snr_gamma=2")
    batch = drawn(plain)
    x_t = plain.objective.noised(batch.x0, batch.t, batch.noise)
    with torch.no_grad():
        terms = plain.objective.terms(plain.method(x_t, batch.t, batch.y, batch.interval).output, x_t, batch)
    weight = min_snr_weight(weighted.objective.schedule, batch.t, 2)
    assert weight.min() < 0.9
    one, other = plain.step(batch), weighted.step(batch)
    assert float(one["loss"]) == pytest.approx(float((terms["mse"] + terms["vb"]).mean()), rel=1e-5)
    assert float(other["loss"]) == pytest.approx(float((weight * terms["mse"] + terms["vb"]).mean()), rel=1e-5)
    assert torch.equal(one["mse"], other["mse"])  # what is logged stays comparable


def test_a_learned_variance_is_a_choice():
    without = tiny_trainer("dense", "model.learn_sigma=false")
    losses = without.step(drawn(without))
    assert "vb" not in losses and torch.equal(losses["loss"], losses["mse"])


def test_a_rectified_flow_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("warnings.showwarning", None)  # the command replaces it: restored after the test
    settings = [
        "method=dit_moe",
        "options.experts=4",
        "diffusion.objective=flow",
        "evaluation.sampler=euler",
        "evaluation.steps=3",
        "model.depth=1",
        "model.width=16",
        "model.num_heads=2",
        "budget.amount=640",
        "heldout.points=2",
        "heldout.images_per_bin=2",
        "evaluation.num_samples=20",
        "evaluation.block_size=10",
        "evaluation.kid_subset_size=10",
    ]
    assert cli.main(["train", "--runs", str(tmp_path), *settings]) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "done").exists()
    record = json.loads((folder / "eval.json").read_text())[0]
    assert record["network_evaluations_per_sample"] == 3 and math.isfinite(record["metrics"]["fid_train"])
    other = cli.main(["train", "--runs", str(tmp_path / "other"), *settings, "evaluation.sampler=ancestral"])
    assert other == 2 and "does not fit diffusion.objective=flow" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
