"""Is the held-out loss one number that methods, seeds, ranks and points in training can be compared by?"""

import math

import pytest
import torch
from training import NUM_TIMESTEPS, RUNS, rows, tiny_config, tiny_data, tiny_trainer

from bench import heldout
from bench.distributed import World
from bench.heldout import heldout_losses, make_heldout_set, probe_of
from bench.intervals import interval_of, partition
from bench.method import Method, Prediction
from bench.objective import make_objective

CPU = torch.device("cpu")
DATA = tiny_data()
ITEMS = ("x0", "noise", "timestep", "t", "y")


class Knowing(Method):
    """Gives each noised image of a held-out set the answer that it is asked for, plus an error of its timestep."""

    def __init__(self, held, objective, target, intervals, error=lambda t: 0.0 * t):
        super().__init__()
        self.intervals = partition(intervals, NUM_TIMESTEPS)
        self.noised, self.target = objective.noised(held.x0, held.t, held.noise), target
        self.error, self.asked = error, []

    def specialise(self, interval):
        def denoise(x, t, y):
            self.asked.append(len(x))
            index = t if not t.is_floating_point() else (t * NUM_TIMESTEPS).long()
            assert all(interval_of(int(i), self.intervals) == interval for i in index)
            rows = [(self.noised == image).all(dim=(1, 2, 3)).nonzero()[0, 0] for image in x]
            answer = self.target[torch.stack(rows)] + self.error(t.float())[:, None, None, None]
            return torch.cat([answer, torch.zeros_like(answer)], dim=1)

        return denoise

    def forward(self, x, t, y, interval, progress=0.0):
        return Prediction(self.specialise(interval)(x, t, y), {})


def knowing(*settings, intervals=1, error=lambda t: 0.0 * t):
    config = tiny_config("dense", *settings)
    flow = config.diffusion.objective == "flow"
    held = make_heldout_set(config.heldout, DATA, NUM_TIMESTEPS, flow)
    objective = make_objective(config.diffusion, config.model, tiny_trainer("dense").method)
    target = held.noise - held.x0 if flow else held.noise
    return Knowing(held, objective, target, intervals, error), objective, held


@pytest.mark.parametrize("settings", [(), ("diffusion.objective=flow",), ("diffusion.loss_weight=min_snr",)])
def test_a_perfect_network_gets_nought_and_a_known_error_its_square(settings):
    assert heldout_losses(*knowing(*settings), World(), CPU) == [0.0] * 4
    losses = heldout_losses(*knowing(*settings, error=lambda t: torch.full_like(t, 0.5)), World(), CPU)
    assert losses == pytest.approx([0.25] * 4, rel=1e-6)


def test_bins_hold_their_own_timesteps():
    method, objective, held = knowing("heldout.bins=5", "heldout.images_per_bin=4", error=lambda t: t)
    expected = [torch.tensor([start, start + 2, start + 4, start + 6]).double().square().mean() for start in range(0, 40, 8)]
    assert heldout_losses(method, objective, held, World(), CPU) == pytest.approx([float(e) for e in expected], rel=1e-6)


@pytest.mark.parametrize("intervals", [1, 3, 7, 40])
def test_it_does_not_depend_on_how_the_schedule_is_split(intervals):
    one = heldout_losses(*knowing(error=lambda t: t.sin()), World(), CPU)
    assert heldout_losses(*knowing(error=lambda t: t.sin(), intervals=intervals), World(), CPU) == pytest.approx(one, rel=1e-12)


def test_every_method_and_seed_has_the_same_items():
    trainers = [tiny_trainer(method, f"seed={seed}") for method in RUNS for seed in (0, 7)]
    trainers.append(tiny_trainer("dense", "train.batch_size=4", "train.lr=1", "diffusion.schedule=linear"))
    for trained in trainers:
        assert all(torch.equal(getattr(trained.heldout, item), getattr(trainers[0].heldout, item)) for item in ITEMS)
        assert trained.heldout.bins == trainers[0].heldout.bins
    held = trainers[0].heldout
    assert len(held.t) == 12 and torch.equal(held.timestep.sort().values, held.timestep)
    assert torch.bincount(held.timestep * 4 // NUM_TIMESTEPS).tolist() == [3, 3, 3, 3]
    heldout_images = DATA.heldout.batch(torch.arange(12))[0]
    assert torch.equal(held.x0, heldout_images)


@pytest.mark.parametrize("intervals", [1, 3])
def test_ranks_share_the_work_and_no_item_is_left_or_done_twice(intervals, monkeypatch):
    monkeypatch.setattr(heldout, "BLOCK", 2)
    settings = {"intervals": intervals, "error": lambda t: t.cos()}
    alone = heldout_losses(*knowing(**settings), World(), CPU)
    parts, done = [], []

    class Keeping(World):
        def sum(self, tensor):
            parts.append(tensor.clone())
            return tensor

    for rank in range(3):
        method, *rest = knowing(**settings)
        heldout_losses(method, *rest, Keeping(rank, 3), CPU)
        done.append(sum(method.asked))
    assert sum(done) == 12 and min(done) > 0

    class Summed(World):
        def sum(self, tensor):
            return torch.stack(parts).sum(dim=0)

    assert heldout_losses(*knowing(**settings), Summed(0, 3), CPU) == alone


@pytest.mark.parametrize("method", RUNS)
def test_it_is_the_plain_error_of_the_averaged_weights(method, tmp_path):
    """By another way: the training pass, image by image, with the averages in place."""
    trained = tiny_trainer(method, "train.ema_half_life_images=40", folder=tmp_path)
    trained.fit()
    held = trained.heldout
    with trained.ema.applied(), torch.no_grad():
        x_t = trained.objective.noised(held.x0, held.t, held.noise)
        errors = []
        for i in range(len(held.t)):
            interval = interval_of(int(held.t[i]), trained.method.intervals)
            output = trained.method(x_t[i : i + 1], held.t[i : i + 1], held.y[i : i + 1], interval).output
            errors.append((output[:, :2] - held.noise[i : i + 1]).square().mean())
    expected = torch.stack(errors).view(4, 3).mean(dim=1)
    measured = rows(tmp_path, "heldout")
    assert [row["loss"] for row in measured[-4:]] == pytest.approx(expected.tolist(), rel=1e-4)
    assert [(row["start"], row["stop"], row["n"]) for row in measured[:4]] == [(s, s + 10, 3) for s in (0, 10, 20, 30)]
    assert [row["loss"] for row in measured[:4]] != [row["loss"] for row in measured[-4:]]
    assert all(p.grad is None or math.isfinite(float(p.grad.norm())) for p in trained.method.parameters())


def test_more_bins_than_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"^heldout.bins is 41, more than the 40 timesteps: choose fewer$"):
        tiny_trainer("dense", "heldout.bins=41")


def test_the_probe_covers_the_schedule():
    _, objective, held = knowing()
    probe = probe_of(held, objective, CPU)
    assert torch.equal(probe.t, held.t) and torch.equal(probe.y, held.y)
    assert torch.equal(probe.x, objective.noised(held.x0, held.t, held.noise))
