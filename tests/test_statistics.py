"""Are intervals, paired differences and marks what statistics says they are?"""

import numpy as np
import pytest
from scipy import stats

from bench.statistics import excludes_zero, half_width, paired_differences, rank


@pytest.mark.parametrize("count", [3, 5, 12])
def test_the_interval_is_students(count: int) -> None:
    values = list(np.random.default_rng(count).normal(size=count))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-12)


def test_the_interval_needs_three_seeds() -> None:
    assert half_width([1.0]) == half_width([1.0, 2.0]) == 0
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)  # t table: 0.975, 2 degrees of freedom


def test_differences_are_taken_at_equal_seeds() -> None:
    assert paired_differences({3: 5.0, 1: 2.0, 7: 9.0}, {1: 1.5, 3: 1.0, 8: 0.0}) == {1: 0.5, 3: 4.0}
    assert paired_differences({1: 1.0}, {2: 1.0}) == {}


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, -1.0, 3.0])
def test_zero_is_excluded_where_a_paired_t_test_rejects_it(shift: float) -> None:
    draw = np.random.default_rng(1)
    one, other = draw.normal(size=5) + shift, draw.normal(size=5)
    differences = list(paired_differences(dict(enumerate(one)), dict(enumerate(other))).values())
    assert excludes_zero(differences) == (stats.ttest_rel(one, other).pvalue < 0.05)


def test_two_differences_prove_nothing() -> None:
    assert not excludes_zero([5.0, 5.1])
    assert excludes_zero([5.0, 5.1, 5.2]) and excludes_zero([-5.0, -5.1, -5.2])


def test_rank_shares_marks_within_the_interval_of_the_holder() -> None:
    texts = ["1", "2", "3", "9"]
    assert rank([1, 2, 3, 9], [0, 0, 0, 0], texts, lower_is_better=True) == ["best", "second", "", ""]
    assert rank([1, 2, 3, 9], [1.5, 0, 0, 0], texts, lower_is_better=True) == ["best", "best", "second", ""]
    assert rank([1, 2, 3, 9], [0, 0, 0, 7], texts, lower_is_better=False) == ["second", "best", "best", "best"]
    assert rank([1, 2, 3, 9], [0, 5, 0, 0], texts, lower_is_better=True) == [
        "best",
        "second",
        "second",
        "",
    ]  # noise is no merit
    assert rank([1, 2], [0, 0], ["1", "1"], lower_is_better=True) == ["best", "best"]
    assert rank([1], [0], ["1"], lower_is_better=True) == [""]
