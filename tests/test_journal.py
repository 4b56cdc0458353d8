"""Does a run stop at a number that is not finite, say where it is, and keep its records in order?"""

import json
import math

import pytest
import torch
from training import differing, drawn, rows, state_of, tiny_trainer

from bench import checkpoint, cli, shares
from bench.distributed import World
from bench.intervals import Interval
from bench.journal import Diverged, Journal, Record
from bench.method import Prediction
from bench.randomness import draw_batch


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dense", "dit_moe", "remix_dit"])
def test_a_bad_image_stops_training_before_anything_changes(method, bad, tmp_path):
    trained = tiny_trainer(method, "train.ema_half_life_images=20", folder=tmp_path)
    trained.step(drawn(trained))
    before, names = state_of(trained), sorted(path.name for path in tmp_path.rglob("*"))
    batch = drawn(trained, 1)
    batch.x0[[2, 5], 0, 1, 1] = bad
    batch.t[:] = torch.tensor([0, 1, 7, 3, 4, 9, 6, 2])
    with pytest.raises(Diverged, match=r"^loss term 'mse' is (nan|-?inf) at step 1, for timesteps 7, 9$") as caught:
        trained.step(batch)
    assert (caught.value.term, caught.value.step, caught.value.timesteps) == ("mse", 1, [7, 9])
    assert not differing(before, state_of(trained)) and trained.steps_done == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


@pytest.mark.parametrize("num_bad", [3, 31])
def test_exactly_the_timesteps_without_a_finite_loss_are_named(num_bad, monkeypatch):
    trained = tiny_trainer("dense", "train.batch_size=80", "budget.amount=800")
    forward = type(trained.method).forward

    def breaks_early(self, x, t, y, interval, progress=0.0):
        output = forward(self, x, t, y, interval, progress).output
        return Prediction(torch.where((t < num_bad)[:, None, None, None], math.nan, output), {})

    monkeypatch.setattr(type(trained.method), "forward", breaks_early)
    batch = drawn(trained)
    batch = batch._replace(t=torch.arange(80) % 40)
    with pytest.raises(Diverged) as caught:
        trained.step(batch)
    assert caught.value.timesteps == list(range(num_bad))
    listed = "0, 1, 2" if num_bad == 3 else ", ".join(map(str, range(20))) + " and 11 more"
    assert str(caught.value) == f"loss term 'mse' is nan at step 0, for timesteps {listed}"


def test_a_penalty_that_is_not_finite_is_named():
    trained = tiny_trainer("dit_moe")
    trained.method.balance_weight = math.inf
    with pytest.raises(Diverged, match=r"^loss term 'penalty/balance' is inf at step 0, a batch of timesteps \d+, "):
        trained.step(drawn(trained))


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    trained = tiny_trainer("dense")
    next(trained.method.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"^loss term 'grad_norm' is (inf|nan) at step 0, a batch"):
        trained.step(drawn(trained))


def test_of_steps_looked_at_together_the_first_is_named():
    """And of its intervals the one whose loss it is."""
    fine, bad = torch.tensor(1.0), torch.tensor(math.nan)
    losses = [(2, fine, fine), (3, fine, bad), (3, bad, bad), (4, bad, bad)]
    for of_run, named in ((losses, "'loss' is nan at step 3"), (losses[:2] + losses[3:], "'grad_norm' is nan at step 3")):
        journal = Journal(None, World())
        for step, loss, norm in of_run:
            journal.record(Record(Interval(0, 0, 40), step, {"loss": loss, "grad_norm": norm}, {}, torch.tensor([7])))
        with pytest.raises(Diverged, match=f"^loss term {named}, a batch of timesteps 7$"):
            journal.check_finite()


def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    trained = tiny_trainer("dense", folder=tmp_path)

    def draw(step, *rest):
        batch = draw_batch(step, *rest)
        return batch._replace(x0=batch.x0 * math.nan) if step == 6 else batch

    monkeypatch.setattr(shares, "draw_batch", draw)
    with pytest.raises(Diverged, match="at step 6"):
        trained.fit()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step-000000004.safetensors"]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path, "train"))


def test_a_diverged_run_says_so_and_exits_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)  # the command replaces it: restored after the test
    small = ["model.depth=1", "model.width=16", "model.num_heads=2", "budget.amount=640", "train.lr=1e30", "heldout.points=1"]
    assert cli.main(["train", "--runs", str(tmp_path), *small]) == 1
    assert "training diverged: loss term" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    failure = json.loads((folder / "failure.json").read_text())
    assert failure["state"] == "diverged" and "at step" in failure["cause"] and "timesteps" in failure["cause"]
    assert not (folder / "done").exists() and not (folder / "checkpoints").exists()
