"""Does the instrument time what it says, in turns, and count ratios, FLOPs and memory as it says? No test is of a speed."""

import math

import numpy as np
import pytest
import torch
from training import UNMEASURED

from bench.throughput import clock, measure
from bench.throughput.clock import speed_ratio, spread_of, time_in_turns
from bench.throughput.contest import Contestant, Setup, baseline_of, config_of, contestants, groups_of, with_baselines
from bench.throughput.entrant import Count, Entrant, Plain, count_of, sampling_step, synthetic_latents, training_step
from bench.throughput.measure import SAMPLING, TRAINING, Task, measure_all
from bench.throughput.memory import Memory
from bench.throughput.peak import measure_peak, vendor_peak
from bench.throughput.pieces import Need
from methods import METHODS
from methods.naive import NAIVE, make_plain
from methods.naive_updates import LoopedAdamW, LoopedEMA, loop_updates

SIZE = "2x16x2/8"
PLAIN = Plain(make_plain, loop_updates)
COUNT = Count(UNMEASURED, Need(0))


def measured(chosen, task):
    return [row for group in measure_all(chosen, task) for row in group]


class Time:
    """A clock that only the work moves on."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def work(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run


# Turns and ratios


def test_contestants_take_turns(monkeypatch):
    time = Time(monkeypatch)
    runs = {name: time.work(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    seconds, failed = time_in_turns(runs, 3, lambda: None)
    assert time.log == ["a", "b", "c"] * 4  # the first round finds out how long they take
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3} and not failed


def test_a_turn_lasts_long_enough(monkeypatch):
    time = Time(monkeypatch)
    seconds, _ = time_in_turns({"short": time.work("s", 0.25), "long": time.work("l", 4.0)}, 2, lambda: None, 1.0)
    assert time.log.count("s") == 1 + 2 * 4 and time.log.count("l") == 1 + 2
    assert seconds == {"short": [0.25] * 2, "long": [4.0] * 2}  # of one call


def test_the_device_is_waited_for_before_and_after_each_turn(monkeypatch):
    time = Time(monkeypatch)
    time_in_turns({"a": time.work("a", 1.0), "b": time.work("b", 1.0)}, 1, lambda: time.log.append("wait"))
    assert "".join(word[0] for word in time.log) == "wawwbwwawwbw"


def test_what_a_device_still_does_counts(monkeypatch):
    time = Time(monkeypatch)
    pending = []

    def wait():
        time.now += sum(pending)
        pending.clear()

    seconds, _ = time_in_turns({"a": lambda: pending.append(2.0)}, 2, wait)
    assert seconds == {"a": [2.0, 2.0]}


def test_ratios_are_taken_within_rounds():
    """The machine is twice as slow in the second round, which a ratio of medians would not see through."""
    own, baseline = [1.0, 2.0, 1.0], [3.0, 6.0, 3.0]
    assert speed_ratio(own, baseline) == (3.0, 3.0, 3.0)
    assert speed_ratio(baseline, own).median == pytest.approx(1 / 3)


def test_the_spread_is_median_and_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert spread_of(values) == (3.0, 2.0, 4.0)
    assert spread_of([7.0]) == (7.0, 7.0, 7.0)
    assert spread_of(values).low == np.quantile(values, 0.25)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), MemoryError(), RuntimeError("[enforce] can't allocate memory")]
)
def test_one_that_runs_out_of_memory_is_left_out(monkeypatch, error):
    time = Time(monkeypatch)

    def fail():
        raise error

    seconds, failed = time_in_turns({"a": time.work("a", 1.0), "b": fail}, 2, lambda: None)
    assert seconds == {"a": [1.0, 1.0]} and failed["b"].startswith("out of memory") and "\n" not in failed["b"]


def test_another_error_is_not_swallowed():
    with pytest.raises(RuntimeError, match="shape"):
        time_in_turns({"a": lambda: (_ for _ in ()).throw(RuntimeError("a wrong shape"))}, 1, lambda: None)


# Contestants


def test_all_methods_are_chosen_unless_some_are_named():
    assert [each.method for each in contestants([], [SIZE], [4], ["fp32"], "none")] == list(METHODS)
    grid = contestants(["dense", "dtr"], ["S/2", "B/2"], [4, 8], ["fp32", "bf16"], "none")
    assert len(grid) == len(set(grid)) == 16
    together = groups_of(grid, [], together=True)
    assert [(group.beside, len(group.contestants)) for group in together] == [("", 4)] * 4
    assert all(len({(each.size, each.batch_size) for each in group.contestants}) == 1 for group in together)


def test_each_method_is_beside_its_baselines_unless_all_are_together():
    chosen = contestants(["dense", "dtr"], [SIZE], [4], ["fp32"], "none")
    apart = groups_of(chosen, ["naive", "dense"], together=False)
    who = [(group.beside, [(each.method, each.plain) for each in group.contestants]) for group in apart]
    assert who == [
        ("dense", [("dense", True), ("dense", False)]),
        ("dtr", [("dtr", True), ("dtr", False), ("dense", False)]),
    ]
    (together,) = groups_of(chosen, ["naive", "dense"], together=True)
    assert len(together.contestants) == 4


def test_baselines_are_timed_once_and_beside_theirs():
    chosen = contestants(["dtr", "dense"], [SIZE], [4], ["bf16"], "none")
    every = with_baselines(chosen, ["naive", "fp32", "dense"])
    assert len(every) == len(set(every)) == 6
    assert {(each.method, each.precision, each.plain) for each in every} == {
        (method, *kind) for method in ("dtr", "dense") for kind in (("bf16", True), ("bf16", False), ("fp32", False))
    }
    assert [each.method for each in every] == ["dtr"] * 3 + ["dense"] * 3


def test_what_a_baseline_is():
    ours = Contestant("dtr:beta=0.5", SIZE, 4, "bf16", "blocks")
    assert baseline_of(ours, "naive") == Contestant("dtr:beta=0.5", SIZE, 4, "bf16", "none", plain=True)
    assert baseline_of(ours, "fp32") == Contestant("dtr:beta=0.5", SIZE, 4, "fp32", "blocks")
    assert baseline_of(ours, "dense") == Contestant("dense", SIZE, 4, "bf16", "blocks")
    assert baseline_of(baseline_of(ours, "naive"), "naive") is None
    assert baseline_of(Contestant("dense", SIZE, 4), "dense") is None
    assert baseline_of(Contestant("dense", SIZE, 4), "fp32") is None


def test_words_become_a_configuration():
    setup = Setup("cpu", 3, 1.25, ("train.beta2=0.95",))
    config = config_of(Contestant("dit_moe:experts=16,top_k=4", "2x24x3/8", 12, "bf16", "blocks"), setup)
    assert (config.method, config.options["experts"], config.options["top_k"]) == ("dit_moe", 16, 4)
    model = config.model
    assert (model.depth, model.width, model.num_heads, model.patch_size, model.size) == (2, 24, 3, 8, "")
    assert (config.train.batch_size, config.train.precision, config.train.threads, config.train.beta2) == (12, "bf16", 3, 0.95)
    assert config.train.ema_half_life_images > 0
    assert (config.evaluation.precision, config.evaluation.guidance_scale) == ("bf16", 1.25)
    assert config.system.compile == "blocks" and config.system.compile_sampling
    assert config_of(Contestant("dense", "XL/2", 1), setup).model.size == "XL/2"


# What is timed


def test_a_training_step_is_the_trainers(monkeypatch):
    setup = Setup()
    contestant = Contestant("remix_dit:bases=2,experts=3", SIZE, 4)
    entrant = Entrant(contestant, setup, COUNT, PLAIN)
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
    entrant = Entrant(contestant, setup, COUNT, PLAIN)
    assert type(entrant.trainer.method) is NAIVE["dense"]
    assert isinstance(entrant.trainer.optimizer, LoopedAdamW) and isinstance(entrant.trainer.ema, LoopedEMA)


@pytest.mark.parametrize("method", METHODS)
def test_plain_and_ours_train_alike(method):
    """What is compared in speed computes the same: losses of the real steps agree."""
    losses = []
    for plain in (False, True):
        contestant, setup = Contestant(method, SIZE, 4, plain=plain and method in NAIVE), Setup()
        entrant = Entrant(contestant, setup, COUNT, PLAIN)
        losses.append([float(entrant.train()["loss"]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_sampling_step_is_the_samplers(scale):
    contestant, setup = Contestant("dense", SIZE, 4), Setup(guidance_scale=scale)
    entrant = Entrant(contestant, setup, COUNT, PLAIN)
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


def test_batches_lie_ready():
    data = synthetic_latents()
    contestant, setup = Contestant("dense", SIZE, 4), Setup()
    trainer = Entrant(contestant, setup, COUNT, PLAIN).trainer
    drawn = []
    trainer.step = lambda batch: drawn.append(batch)
    step = training_step(trainer, data)
    for _ in range(4):
        step()
    assert drawn[0].x0 is drawn[2].x0 and drawn[0].x0 is not drawn[1].x0  # nothing is drawn while time is taken


# Rows


@pytest.fixture(scope="module")
def rows():
    chosen = contestants(["dit_moe:experts=4"], [SIZE], [4], ["fp32"], "none")
    return measured(chosen, Task(Setup(), PLAIN, ["naive", "dense"], 3))


def test_two_rows_of_each_contestant_and_baseline(rows):
    assert {(row["what"], row["method"], row["code"]) for row in rows} == {
        (what, *who)
        for what in (TRAINING, SAMPLING)
        for who in (("dit_moe:experts=4", "ours"), ("dit_moe:experts=4", "naive"), ("dense", "ours"))
    }
    assert all(row["rounds"] == 3 and not row["note"] for row in rows)
    assert all(row["step_seconds_low"] <= row["step_seconds"] <= row["step_seconds_high"] for row in rows)


def test_only_what_has_a_baseline_has_a_ratio(rows):
    for row in rows:
        compared = row["method"].startswith("dit_moe") and row["code"] == "ours"
        assert (row["speed_over_naive"] is not None) == compared
        assert (row["speed_over_dense"] is not None) == compared


def test_rates_follow_from_the_step(rows):
    macs = {row["method"]: row["forward_macs_per_image"] for row in rows}
    assert macs["dense"] == count_of(Contestant("dense", SIZE, 4), Setup()).cost.forward_flops_per_image / 2
    for row in rows:
        per_image = 6 if row["what"] == TRAINING else 2 * 2  # guided: both halves
        steps = 1 if row["what"] == TRAINING else 250
        assert row["images_per_second"] == pytest.approx(4 / row["step_seconds"] / steps)
        assert row["flops_per_second"] == pytest.approx(4 * per_image * macs[row["method"]] / row["step_seconds"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / row["peak_flops_per_second"])
        assert row["vendor_flops_per_second"] is None and row["mfu_of_vendor_peak"] is None


def test_one_that_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def build(contestant, *others):
        if contestant.method == "dtr":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return Entrant(contestant, *others)

    monkeypatch.setattr(measure, "Entrant", build)
    chosen = contestants(["dense", "dtr"], [SIZE], [2], ["fp32"], "none")
    found = {(row["what"], row["method"]): row for row in measured(chosen, Task(Setup(), PLAIN, ["dense"], 1, together=True))}
    assert len(found) == 4
    assert found[TRAINING, "dtr"]["note"].startswith("out of memory: CUDA out of memory. Tried")
    assert found[TRAINING, "dtr"]["step_seconds"] is None and found[TRAINING, "dtr"]["speed_over_dense"] is None
    assert found[TRAINING, "dense"]["step_seconds"] > 0


def test_nothing_is_timed_before_all_is_allowed(monkeypatch):
    monkeypatch.setattr(measure, "Entrant", lambda *_: pytest.fail("built"))
    chosen = contestants(["dense", "dtr:beta=7"], [SIZE], [2], ["fp32"], "none")
    with pytest.raises(ValueError, match="beta"):
        measured(chosen, Task(Setup(), PLAIN))


# The device


def test_memory_is_what_is_there_at_the_peak():
    memory = Memory(torch.device("cpu"))
    if math.isnan(memory.peak_bytes()):
        pytest.skip("this system does not let a process reset its peak")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    assert 60 << 20 < memory.peak_bytes() < 120 << 20
    assert Memory(torch.device("cpu")).peak_bytes() < 32 << 20  # the next starts over


def test_what_a_cpu_has_no_room_for_is_not_begun(monkeypatch):
    monkeypatch.setattr("bench.throughput.entrant.job.build_method", lambda *_: pytest.fail("built"))
    with pytest.raises(MemoryError, match=r"needs about 1000000\.0 GB"):
        Entrant(Contestant("dense", SIZE, 4), Setup(), Count(UNMEASURED, Need(10**15)), PLAIN)


def test_the_peak_is_a_matrix_product():
    assert measure_peak(torch.device("cpu"), "fp32", size=64, repeats=2) > 0


def test_the_peak_counts_two_flops_for_each_product(monkeypatch):
    time = Time(monkeypatch)
    monkeypatch.setattr("bench.throughput.peak.time_turn", lambda run, wait, calls: 0.5)
    assert measure_peak(torch.device("cpu"), "bf16", size=8) == 2 * 8**3 / 0.5
    assert time.log == []


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_the_vendors_figure_where_it_is_known(name, flops):
    assert vendor_peak(name, "bf16") == flops
    assert vendor_peak(name, "fp32") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu():
    chosen = contestants(["dense"], [SIZE], [4], ["bf16"], "none")
    found = measured(chosen, Task(Setup("cuda"), PLAIN, ["naive"], 2, 0.01))
    assert all(row["step_seconds"] > 0 for row in found)
    assert all(row["peak_memory_bytes"] > 0 for row in found if row["what"] == TRAINING)
