"""Are things timed in turns, and are ratios and the device's peak what they say? No test is of a speed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timing import Time
from torch.autograd import DeviceType

from bench.throughput.clock import speed_ratio, spread_of, time_in_turns
from bench.throughput.peak import measure_peak, vendor_peak
from bench.throughput.trace import NUM_STEPS, table_of


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


def test_what_a_turn_begins_with_is_not_timed_on_a_gpu(monkeypatch):
    """The first call of a turn takes longer: the allocator has the blocks of the one before."""
    time, last = Time(monkeypatch), []

    def run(name):
        time.work(name, 1.0 if last == [name] else 5.0)()
        last[:] = [name]

    runs = {name: lambda name=name: run(name) for name in "ab"}
    assert time_in_turns(runs, 2, lambda: None, 2.0)[0] == {"a": [5.0, 5.0], "b": [5.0, 5.0]}
    time.log.clear()
    seconds, _ = time_in_turns(runs, 2, lambda: time.log.append("-"), 2.0, opening=True)
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "".join(time.log) == "a-a-b-b-" + "a-aa-b-bb-" * 2


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
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        MemoryError(),
        RuntimeError("[enforce] can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    ],
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


def test_each_rests_after_its_own_turn():
    log = []
    runs = {who: lambda who=who: log.append(who) for who in "ab"}
    time_in_turns(runs, 1, lambda: None, rest=lambda who: log.append(f"{who} rests"))
    assert log == ["a", "a rests", "b", "b rests"] * 2


# The peak


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
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_the_vendors_figure_where_it_is_known(name, flops):
    assert vendor_peak(name, "bf16") == flops
    assert vendor_peak(name, "fp32") is None


# Where the time goes


def averaged(key, device_type, device_time, annotation=False):
    own = {"self_device_time_total": device_time, "self_cpu_time_total": 1000.0 * (device_type == DeviceType.CPU)}
    return SimpleNamespace(key=key, device_type=device_type, is_user_annotation=annotation, count=NUM_STEPS, **own)


def test_on_a_gpu_a_kernel_counts_once():
    """Not again in the operation that starts it, nor in a range around it."""
    averages = [
        averaged("aten::mm", DeviceType.CPU, 6000.0 * NUM_STEPS),
        averaged("gemm", DeviceType.CUDA, 6000.0 * NUM_STEPS),
        averaged("copy", DeviceType.CUDA, 2000.0 * NUM_STEPS),
        averaged("Optimizer.step", DeviceType.CUDA, 9000.0 * NUM_STEPS, annotation=True),
    ]
    rows = [line.split() for line in table_of(averages, on_gpu=True).splitlines()[1:]]
    assert rows == [["gemm", "6.000", "75.0%", "1.0"], ["copy", "2.000", "25.0%", "1.0"]]
    assert table_of(averages, on_gpu=False).splitlines()[1].split()[0] == "aten::mm"


def test_torchs_own_averages_have_what_is_asked_for():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.randn(8, 8) @ torch.randn(8, 8)
    averages = list(profiler.key_averages())
    assert "aten::mm" in table_of(averages, on_gpu=False)
    assert len(table_of(averages, on_gpu=True).splitlines()) == 1  # no kernel
