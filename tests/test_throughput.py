"""Does a row say what was timed, and are rates and ratios counted as it says? No test is of a speed."""

import weakref

import pytest
import torch
from timing import PLAIN, SIZE

from bench.flops import Cost
from bench.throughput import measure
from bench.throughput.contest import Contestant, Group, Setup, contestants
from bench.throughput.count import count_of
from bench.throughput.entrant import Entrant
from bench.throughput.measure import Task, measure_all
from bench.throughput.rows import FASTER, SAMPLING, TRAINING, Timed, rows_of

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
        assert row["sampling_steps"] == (None if row["what"] == TRAINING else steps)
        assert row["flops_per_second"] == pytest.approx(4 * per_image * macs[row["method"]] / row["step_seconds"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / row["peak_flops_per_second"])
        assert row["vendor_flops_per_second"] is None and row["mfu_of_vendor_peak"] is None


@pytest.mark.parametrize(
    ("peak", "why", "note"), [(1e30, "", ""), (1.0, "", FASTER), (1.0, "no room", f"{{pieces}}: no room; {FASTER}")]
)
def test_more_than_the_peak_is_explained(peak, why, note):
    """A machine's speed changes; so does what `measure_peak` finds."""
    contestant = Contestant("dense", SIZE, 4)
    seconds, notes = ({what: of_each.copy() for what in (TRAINING, SAMPLING)} for of_each in ({contestant: [0.1]}, {}))
    timed = [Timed([contestant], {"fp32": peak}, seconds, notes)] * (2 if why else 1)
    rows = rows_of(contestant, Group("", [contestant]), timed, Cost(0.0, 6e6, 2e6), Setup(), [], why)
    assert [row["note"] for row in rows] == [note.format(pieces="timed in 2 pieces, with the seconds of the first")] * 2


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


def test_a_look_that_runs_out_of_memory_takes_nothing_of_what_was_timed():
    told, seen = [], []

    def look(entrant):
        seen.append(entrant.contestant.plain)
        if entrant.contestant.plain:
            raise torch.OutOfMemoryError("full")

    chosen = contestants(["dense"], [SIZE], [2], ["fp32"], "none")
    rows = measured(chosen, Task(Setup(), PLAIN, ["naive"], 1, watch=told.append, look=look))
    assert len(rows) == 4 and all(row["step_seconds"] > 0 for row in rows) and seen == [True, False]
    assert all(row["peak_memory_bytes"] > 0 for row in rows if row["what"] == TRAINING)
    assert told[-1] == f"not looked at dense {SIZE} batch 2 fp32 naive: out of memory: full"


def test_the_peak_is_measured_again_when_nothing_is_held_any_more(monkeypatch):
    """A GPU that contestants have filled would have no room for the matrices."""
    alive, entrants, peaks = [], [], iter([3.0, 5.0])

    def build(*arguments):
        entrant = Entrant(*arguments)
        entrants.append(weakref.ref(entrant))
        return entrant

    def peak(device, precision):
        alive.append(sum(entrant() is not None for entrant in entrants))
        return next(peaks)

    monkeypatch.setattr(measure, "Entrant", build)
    monkeypatch.setattr(measure, "measure_peak", peak)
    rows = measured(contestants(["dense"], [SIZE], [2], ["fp32"], "none"), Task(Setup(), PLAIN, ["naive"], 1))
    assert alive == [0, 0] and len(entrants) == 2
    assert {row["peak_flops_per_second"] for row in rows} == {5.0}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_turns_begin_with_a_call_that_is_not_timed_on_a_gpu_alone(monkeypatch, device):
    asked = []

    def turns(runs, *others, opening):
        asked.append(opening)
        return {}, {}

    monkeypatch.setattr(measure, "_build", lambda *_: ({}, {}))
    monkeypatch.setattr(measure, "time_in_turns", turns)
    measure._time_entrants(Timed([]), Task(Setup(device), PLAIN), {})
    assert asked == [device == "cuda"] * 2


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
