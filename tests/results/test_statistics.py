"""Means over seeds, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from pdlab.results.statistics import MeanInterval, mean_interval, student_t


def test_an_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3027 / 3**0.5)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert mean_interval([5.0]) == MeanInterval(5.0, None)
    assert mean_interval([]) is None


def test_the_quantiles_go_on_beyond_the_table() -> None:
    assert student_t(21) == pytest.approx(2.0796, abs=5e-4)
    assert student_t(60) == pytest.approx(2.0003, abs=1e-4)
    assert student_t(10_000) == pytest.approx(1.9602, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_it_holds_the_mean_95_times_of_100(count: int) -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(3.0, 2.0, (4000, count))
    held = sum(abs(found.mean - 3.0) <= (found.half or 0.0) for row in draws.tolist() if (found := mean_interval(row)) is not None)
    assert held / len(draws) == pytest.approx(0.95, abs=0.012)
