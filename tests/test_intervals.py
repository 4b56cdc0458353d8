"""Do the intervals cover every timestep once, and are they drawn in proportion?"""

import itertools

import pytest

from bench.intervals import Interval, interval_at_step, interval_of, partition, steps_per_interval


@pytest.mark.parametrize(
    ("count", "num_timesteps"), [(1, 1), (1, 1000), (3, 1000), (7, 1000), (8, 1000), (999, 1000), (1000, 1000)]
)
def test_partition_covers_every_timestep_once(count, num_timesteps):
    intervals = partition(count, num_timesteps)
    assert [i.index for i in intervals] == list(range(count))
    assert intervals[0].start == 0
    assert intervals[-1].stop == num_timesteps
    assert all(a.stop == b.start for a, b in itertools.pairwise(intervals))
    lengths = {i.length for i in intervals}
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert [i.start for i in intervals] == [i * num_timesteps // count for i in range(count)]
    for t in range(num_timesteps):
        interval = interval_of(t, intervals)
        assert interval.start <= t < interval.stop


def test_every_count_up_to_the_number_of_timesteps_works():
    for count in range(1, 51):
        intervals = partition(count, 50)
        assert sum(i.length for i in intervals) == 50
        assert all(i.length >= 1 for i in intervals)


@pytest.mark.parametrize("count", [0, -1, 51])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match="choose a count from 1 to 50"):
        partition(count, 50)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timesteps_outside_the_schedule_are_refused(t):
    with pytest.raises(ValueError, match=f"timestep {t} lies outside"):
        interval_of(t, partition(4))


def test_interval_knows_its_timesteps():
    interval = Interval(1, 10, 20)
    assert interval.length == 10
    assert 10 in interval
    assert 19 in interval
    assert 9 not in interval
    assert 20 not in interval
    assert 12.5 not in interval


@pytest.mark.parametrize("count", [1, 2, 5, 8, 1000])
def test_counts_of_equal_intervals_never_differ_by_more_than_one(count):
    intervals = partition(count, 1000)
    counts = [0] * count
    for step in range(min(3 * count + count // 2, 2500)):
        counts[interval_at_step(step, intervals, seed=3).index] += 1
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("count", [3, 7, 11, 48, 999])
def test_counts_of_a_partition_never_differ_by_more_than_one(count):
    intervals = partition(count)
    for num_steps in (1, count - 1, count, 5 * count + 2):
        counts = steps_per_interval(num_steps, intervals, seed=0)
        assert max(counts) - min(counts) <= 1


def test_hand_made_intervals_of_very_different_lengths_are_drawn_in_proportion():
    intervals = (Interval(0, 0, 10), Interval(1, 10, 40), Interval(2, 40, 100))
    counts = steps_per_interval(3000, intervals, seed=1)
    assert counts == pytest.approx([300, 900, 1800], abs=5)


def test_order_depends_on_the_seed_and_the_step_alone():
    intervals = partition(8)
    order = [interval_at_step(step, intervals, seed=0).index for step in range(64)]
    assert [interval_at_step(step, intervals, seed=0).index for step in reversed(range(64))] == order[::-1]
    assert [interval_at_step(step, intervals, seed=1).index for step in range(64)] != order
    cycles = [order[i : i + 8] for i in range(0, 64, 8)]
    assert all(sorted(cycle) == list(range(8)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


def test_counts_add_up():
    assert sum(steps_per_interval(123, partition(7), seed=0)) == 123
    assert steps_per_interval(0, partition(3), seed=0) == [0, 0, 0]
