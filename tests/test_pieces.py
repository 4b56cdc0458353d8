"""Does what is timed together fit into memory, and is each beside its baselines wherever the two fit?"""

from typing import Any

import pytest
from timing import PLAIN, SIZE

from bench.throughput import measure
from bench.throughput.contest import Contestant, Group, Setup, contestants, groups_of
from bench.throughput.count import Count, count_of
from bench.throughput.entrant import Entrant
from bench.throughput.measure import Task, measure_all
from bench.throughput.pieces import Need, bytes_together, pieces
from bench.throughput.rows import SAMPLING, TRAINING, Row

AGAINST = ("naive", "dense")


def group() -> Group:
    """dtr, dtr in plain code, and dense."""
    (found,) = groups_of(contestants(["dtr"], [SIZE], [4], ["fp32"], "none"), AGAINST, together=False)
    assert [name(each) for each in found.contestants] == ["dtr naive", "dtr", "dense"]
    return found


def name(contestant: Contestant) -> str:
    return contestant.method + " naive" * contestant.plain


def cut(needs: dict[str, Need], free: float) -> list[list[str]]:
    """Of the group above, with 5% of what is free left alone."""
    found = pieces(group().contestants, AGAINST, lambda each: needs[name(each)], free / 0.95)
    return [[name(each) for each in piece] for piece in found]


def test_only_one_runs_and_the_others_hold_their_states() -> None:
    assert bytes_together([Need(10, 1), Need(4, 3), Need(6, 2)]) == 1 + 3 + 2 + 9
    assert bytes_together([Need(10, 1)]) == 10 and bytes_together([]) == 0


def test_all_are_together_if_they_fit() -> None:
    needs = {"dtr naive": Need(10, 1), "dtr": Need(5, 1), "dense": Need(4, 1)}
    assert cut(needs, 12.0) == [["dtr naive", "dtr", "dense"]]


def test_else_one_is_beside_one_baseline_after_the_other() -> None:
    needs = {"dtr naive": Need(10, 1), "dtr": Need(5, 1), "dense": Need(4, 1)}
    assert cut(needs, 11.0) == [["dtr naive", "dtr"], ["dtr", "dense"]]


def test_a_baseline_that_fits_alone_only_is_timed_alone() -> None:
    needs = {"dtr naive": Need(10, 1), "dtr": Need(5, 1), "dense": Need(4, 1)}
    assert cut(needs, 10.0) == [["dtr naive"], ["dtr", "dense"]]


def test_what_fits_nowhere_is_by_itself_and_takes_nobody_with_it() -> None:
    needs = {"dtr naive": Need(100, 1), "dtr": Need(5, 1), "dense": Need(4, 1)}
    assert cut(needs, 10.0) == [["dtr naive"], ["dtr", "dense"]]
    assert cut({who: Need(100, 1) for who in needs}, 10.0) == [["dtr naive"], ["dtr"], ["dense"]]


# Rows


def rows_with(monkeypatch: pytest.MonkeyPatch, needs: dict[str, Need], free: float) -> dict[tuple[str, str], Row]:
    """Of the group above, timed for real where `needs` allow it; plain code needs as much as ours unless they say so."""

    def count(contestant: Contestant, setup: Setup) -> Count:
        return Count(count_of(contestant, setup).cost, needs.get(name(contestant), needs[contestant.method]))

    monkeypatch.setattr(measure, "count_of", count)
    monkeypatch.setattr(measure, "free_bytes", lambda device: free)
    monkeypatch.setattr(measure, "measure_peak", lambda device, precision: 1e12)
    (rows,) = measure_all(contestants(["dtr"], [SIZE], [4], ["fp32"], "none"), Task(Setup(), PLAIN, AGAINST, 2))
    assert len(rows) == 6
    return {(row["what"], row["method"] + " naive" * (row["code"] == "naive")): row for row in rows}


def test_a_group_in_pieces_has_all_ratios_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(
        measure, "Entrant", lambda contestant, *others: built.append(name(contestant)) or Entrant(contestant, *others)
    )
    rows = rows_with(monkeypatch, {"dtr": Need(8e9, 1e9), "dense": Need(8e9, 1e9)}, 9.9e9)
    assert built == ["dtr naive", "dtr", "dtr", "dense"]
    for what in (TRAINING, SAMPLING):
        assert rows[what, "dtr"]["speed_over_naive"] > 0 and rows[what, "dtr"]["speed_over_dense"] > 0
        assert rows[what, "dtr"]["note"] == (
            "timed in 2 pieces, with the seconds of the first: all together need about 10.0 GB, "
            "and of 9.9 GB that are free 9.4 are used at most"
        )
        assert rows[what, "dense"]["note"] == "" and rows[what, "dense"]["step_seconds"] > 0


def test_who_could_not_be_beside_a_baseline_has_no_ratio_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with(monkeypatch, {"dtr": Need(8e9, 1e9), "dense": Need(2e9, 5e8)}, 9e9)
    own = rows[TRAINING, "dtr"]
    assert own["step_seconds"] > 0 and own["speed_over_naive"] is None and own["speed_over_dense"] > 0
    assert own["note"].startswith("not timed beside naive: all together need about")


def test_who_failed_in_one_piece_only_has_the_seconds_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(contestant: Contestant, *others: Any) -> Entrant:
        built.append(name(contestant))
        if built == ["dtr naive", "dtr"]:
            raise MemoryError("none is left")
        return Entrant(contestant, *others)

    monkeypatch.setattr(measure, "Entrant", build)
    rows = rows_with(monkeypatch, {"dtr": Need(8e9, 1e9), "dense": Need(8e9, 1e9)}, 9.9e9)
    for what in (TRAINING, SAMPLING):
        own = rows[what, "dtr"]
        assert own["step_seconds"] > 0 and own["speed_over_naive"] is None and own["speed_over_dense"] > 0
        assert own["note"].startswith("not timed beside naive; timed in 2 pieces")
    assert rows[TRAINING, "dtr"]["memory"]


def test_what_could_not_be_timed_has_a_note_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with(monkeypatch, {"dtr": Need(10e9, 1e9), "dense": Need(2e9, 5e8)}, 9e9)
    for what in (TRAINING, SAMPLING):
        for who in ("dtr", "dtr naive"):
            row = rows[what, who]
            assert row["note"] == "not tried: needs about 10.0 GB, 9.0 GB are free"
            assert row["rounds"] == 0
            numbers = [
                value for key, value in row.items() if isinstance(value, int | float) and key not in ("batch_size", "rounds")
            ]
            assert numbers == []
        assert rows[what, "dense"]["step_seconds"] > 0 and rows[what, "dense"]["note"] == ""


def test_what_plain_code_needs_does_not_refuse_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(
        measure, "Entrant", lambda contestant, *others: built.append(name(contestant)) or Entrant(contestant, *others)
    )
    rows = rows_with(monkeypatch, {"dtr naive": Need(10e9, 1e9), "dtr": Need(5e9, 1e9), "dense": Need(2e9, 5e8)}, 9e9)
    assert built == ["dtr", "dense"]
    for what in (TRAINING, SAMPLING):
        assert rows[what, "dtr naive"]["note"] == "not tried: needs about 10.0 GB, 9.0 GB are free"
        own = rows[what, "dtr"]
        assert own["step_seconds"] > 0 and own["speed_over_naive"] is None and own["speed_over_dense"] > 0
        assert own["note"].startswith("not timed beside naive: all together need about")


@pytest.mark.parametrize(("fails", "goes"), [(TRAINING, SAMPLING), (SAMPLING, TRAINING)])
def test_a_note_is_on_the_row_of_what_could_not_be_timed(monkeypatch: pytest.MonkeyPatch, fails: str, goes: str) -> None:
    def fail() -> None:
        raise MemoryError("none is left")

    def build(contestant: Contestant, *others: Any) -> Entrant:
        entrant = Entrant(contestant, *others)
        if name(contestant) == "dtr":
            setattr(entrant, "train" if fails == TRAINING else "sample", fail)
        return entrant

    monkeypatch.setattr(measure, "Entrant", build)
    rows = rows_with(monkeypatch, {"dtr": Need(1e9, 1e8), "dense": Need(1e9, 1e8)}, 9e9)
    assert rows[fails, "dtr"]["note"] == "out of memory: none is left" and rows[fails, "dtr"]["step_seconds"] is None
    assert rows[goes, "dtr"]["note"] == "" and rows[goes, "dtr"]["step_seconds"] > 0
