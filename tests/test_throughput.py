"""Does a row say what was timed, and are rates and ratios counted as it says? No test is of a speed."""

import pytest
import torch
from timing import PLAIN, SIZE

from bench.throughput import measure
from bench.throughput.contest import Contestant, Setup, contestants
from bench.throughput.count import count_of
from bench.throughput.entrant import Entrant
from bench.throughput.measure import Task, measure_all
from bench.throughput.rows import SAMPLING, TRAINING

pytestmark = pytest.mark.xdist_group("throughput")  # what its tests look at is made once, not by every worker


def measured(chosen, task):
    return [row for group in measure_all(chosen, task) for row in group]


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu():
    chosen = contestants(["dense"], [SIZE], [4], ["bf16"], "none")
    found = measured(chosen, Task(Setup("cuda"), PLAIN, ["naive"], 2, 0.01))
    assert all(row["step_seconds"] > 0 for row in found)
    assert all(row["peak_memory_bytes"] > 0 for row in found if row["what"] == TRAINING)
