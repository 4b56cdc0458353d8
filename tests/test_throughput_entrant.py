"""Is what is timed the trainer's own step, and the sampler's, in plain code as in ours?"""

import pytest
import torch
from timing import PLAIN, SIZE
from torch._dynamo.utils import counters
from training import UNMEASURED

from bench.throughput.contest import Contestant, Setup
from bench.throughput.entrant import Entrant, draw_batches, sampling_step, synthetic_latents, training_step
from methods import METHODS
from methods.naive import NAIVE
from methods.naive_updates import LoopedAdamW, LoopedEMA


def test_a_training_step_is_the_trainers(monkeypatch):
    setup = Setup()
    contestant = Contestant("remix_dit:bases=2,experts=3", SIZE, 4)
    entrant = Entrant(contestant, setup, UNMEASURED, PLAIN)
    trainer = entrant.trainer
    steps = trainer.steps_done
    before = {name: average.clone() for name, average in trainer.ema.averages.items()}
    seen = []
    step = trainer.step
    monkeypatch.setattr(trainer, "step", lambda batch: seen.append(batch) or step(batch))
    for _ in range(6):
        entrant.train()
    assert trainer.steps_done == steps + 6 and len(seen) == 6
    assert {batch.interval.index for batch in seen} == {0, 1, 2}  # all experts in turn
    assert all(batch.x0.shape == (4, 4, 32, 32) and batch.t.min() >= batch.interval.start for batch in seen)
    assert any(not torch.equal(before[name], average) for name, average in trainer.ema.averages.items())


def test_plain_contestants_are_plain_all_through():
    setup = Setup()
    contestant = Contestant("dense", SIZE, 4, plain=True)
    entrant = Entrant(contestant, setup, UNMEASURED, PLAIN)
    assert type(entrant.trainer.method) is NAIVE["dense"]
    assert isinstance(entrant.trainer.optimizer, LoopedAdamW) and isinstance(entrant.trainer.ema, LoopedEMA)


@pytest.mark.parametrize("method", METHODS)
def test_plain_and_ours_train_alike(method):
    """What is compared in speed computes the same: losses of the real steps agree."""
    losses = []
    for plain in (False, True):
        contestant, setup = Contestant(method, SIZE, 4, plain=plain and method in NAIVE), Setup()
        entrant = Entrant(contestant, setup, UNMEASURED, PLAIN)
        losses.append([float(entrant.train()["loss"]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_sampling_step_is_the_samplers(scale):
    contestant, setup = Contestant("dense", SIZE, 4), Setup(guidance_scale=scale)
    entrant = Entrant(contestant, setup, UNMEASURED, PLAIN)
    config, data, method = entrant.trainer.config, entrant.trainer.data, entrant.trainer.method
    sizes, specialise = [], method.specialise

    def counted(interval):
        denoiser = specialise(interval)
        return lambda x, t, y: sizes.append((len(x), y.tolist(), t.unique().tolist())) or denoiser(x, t, y)

    method.specialise = counted
    step = sampling_step(method, config, data, torch.device("cpu"))
    sample = step()
    assert sample.shape == (4, 4, 32, 32) and not sample.requires_grad and torch.isfinite(sample).all()
    labels = [0, 1, 2, 3]
    assert [size[:2] for size in sizes] == [(4, labels) if scale == 1 else (8, labels + [1000] * 4)]


def test_a_flow_is_given_its_own_times():
    setup = Setup(guidance_scale=1.0, settings=("diffusion.objective=flow", "evaluation.sampler=euler"))
    entrant = Entrant(Contestant("dense", SIZE, 4), setup, UNMEASURED, PLAIN)
    config, data, method = entrant.trainer.config, entrant.trainer.data, entrant.trainer.method
    times, specialise = [], method.specialise
    method.specialise = lambda interval: lambda x, t, y: times.append(t) or specialise(interval)(x, t, y)
    sampling_step(method, config, data, torch.device("cpu"))()
    assert len(times) == 1 and times[0].dtype == torch.float32 and times[0].tolist() == pytest.approx([0.5] * 4, abs=0.01)


def test_experts_with_parameters_of_their_own_have_all_their_states():
    """Else the peak of memory would be without those that no batch met."""
    trainer = Entrant(Contestant("multi_expert:experts=6", SIZE, 4), Setup(), UNMEASURED, PLAIN).trainer
    assert all(trainer.optimizer.state[parameter] for parameter in trainer.parameters)
    shared = Entrant(Contestant("remix_dit:experts=6", SIZE, 4), Setup(), UNMEASURED, PLAIN).trainer
    assert (trainer.steps_done, shared.steps_done) == (6, 4)


def test_cuda_graphs_are_recorded_before_anything_is_timed(monkeypatch):
    """A first call is as it is, the second records, the third replays: of each expert."""
    monkeypatch.setattr("bench.throughput.contest.check_device", lambda setting, device: None)
    monkeypatch.setattr("bench.trainer.compile_blocks", lambda method, setting, device: None)
    monkeypatch.setattr("bench.trainer.begin_step", lambda setting: None)
    monkeypatch.setattr(torch, "compile", lambda denoiser, **_: denoiser)
    contestant = Contestant("multi_expert:experts=2", SIZE, 4, compiled="cuda_graphs")
    assert Entrant(contestant, Setup(), UNMEASURED, PLAIN).trainer.updates == [3, 3]


def test_batches_lie_ready():
    data = synthetic_latents()
    contestant, setup = Contestant("dense", SIZE, 4), Setup()
    trainer = Entrant(contestant, setup, UNMEASURED, PLAIN).trainer
    drawn = []
    trainer.step = lambda batch: drawn.append(batch)
    step = training_step(trainer, draw_batches(trainer, data))
    for _ in range(4):
        step()
    assert drawn[0].x0 is drawn[2].x0 and drawn[0].x0 is not drawn[1].x0  # nothing is drawn while time is taken


@pytest.mark.parametrize("method", ["dense", "remix_dit"])
def test_who_rests_holds_no_gradients(method):
    entrant = Entrant(Contestant(method, SIZE, 4), Setup(), UNMEASURED, PLAIN)
    parameters = list(entrant.trainer.method.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    entrant.train()
    assert any(parameter.grad is not None for parameter in parameters)
    assert bool(entrant.trainer.outer) == (method == "remix_dit")
    entrant.rest()
    assert all(parameter.grad is None for parameter in parameters) and not entrant.trainer.outer


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # dynamo looks at it
def test_compiled_both_steps_are_compiled():
    """And train as the same uncompiled."""
    plain, compiled = (Contestant("dense", "1x32x2/4", 4, compiled=how) for how in ("none", "blocks"))
    torch.compiler.reset()
    counters.clear()
    entrant = Entrant(compiled, Setup(), UNMEASURED, PLAIN)
    assert entrant.trainer.config.system.compile == "blocks"
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 2  # a block while it trains, and the network that samples
    reference = Entrant(plain, Setup(), UNMEASURED, PLAIN)
    losses = [[float(each.train()["loss"]) for _ in range(2)] for each in (entrant, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (
        torch.isfinite(entrant.sample()).all() and counters["stats"]["unique_graphs"] == graphs
    )  # all is warm, and nothing else is
    torch.compiler.reset()
