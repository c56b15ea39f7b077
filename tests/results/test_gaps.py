from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.results.gaps import Gaps

RUN = st.tuples(
    st.integers(1, 300),
    st.floats(1e-5, 2.0),
    st.floats(-1e-8, 1e-4),
    st.integers(1, 400),
)


def listed(runs: list[tuple[int, float, float, int]]) -> np.ndarray:
    return np.concatenate([np.repeat(first + slope * np.arange(steps), count) for count, first, slope, steps in runs])


@settings(max_examples=60, deadline=None)
@given(st.lists(RUN, min_size=1, max_size=12))
def test_runs_count_as_if_every_gap_were_listed(runs: list[tuple[int, float, float, int]]) -> None:
    gaps, every = Gaps(), listed(runs)
    for run in runs:
        gaps.add_run(*run)
    assert gaps.count == every.size
    assert gaps.sum_s == pytest.approx(every.sum(), rel=1e-9)
    assert gaps.max == pytest.approx(every.max(), rel=1e-12)
    assert gaps.min == pytest.approx(every.min(), rel=1e-12)
    assert gaps.histogram()[1].sum() == every.size
    assert (gaps.histogram()[1] >= 0).all()
    for q in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(every, q, method="inverted_cdf")
        assert gaps.quantile(q) == pytest.approx(exact, rel=0.0051)


def test_buffer_flushes_itself_and_steep_runs_stay_bounded() -> None:
    gaps = Gaps()
    for _ in range(20_000):
        gaps.add_run(2, 0.01, 1e-5, 30)
    gaps.add_run(1, 1e-6, 1.0, 1000)  # crosses nearly every bin
    assert gaps.count == 20_000 * 60 + 1000
    assert gaps.max == pytest.approx(999 + 1e-6)


def test_nothing_seen_is_nan_and_zero_gaps_are_kept() -> None:
    gaps = Gaps()
    assert gaps.count == 0
    assert math.isnan(gaps.mean)
    assert math.isnan(gaps.quantile(0.5))
    assert math.isnan(gaps.max)
    gaps.add(0.0, 5)
    assert (gaps.count, gaps.mean, gaps.quantile(0.5), gaps.max) == (5, 0.0, 0.0, 0.0)


def test_state_survives_json() -> None:
    gaps = Gaps()
    gaps.add_run(3, 0.02, 1e-6, 100)
    gaps.add(0.5)
    other = Gaps.restore(json.loads(json.dumps(gaps.state())))
    assert other.state() == gaps.state()
    assert other.quantile(0.9) == gaps.quantile(0.9)
    empty = Gaps.restore(json.loads(json.dumps(Gaps().state())))
    assert empty.count == 0


def test_the_deviation_is_exact_also_of_runs_and_after_a_restore() -> None:
    gaps, seen = Gaps(), []
    for count, first, slope, steps in ((1, 0.01, 0.0, 1), (3, 0.02, 1e-4, 200), (2, 0.5, -1e-3, 50)):
        gaps.add_run(count, first, slope, steps)
        seen += [first + slope * k for k in range(steps) for _ in range(count)]
    for one in (gaps, Gaps.restore(gaps.state())):
        assert one.std == pytest.approx(np.std(seen), rel=1e-9)
    old = gaps.state()
    del old["squares_s2"]  # as it was stored before
    assert Gaps.restore(old).std == pytest.approx(np.std(seen), rel=0.01)
    assert math.isnan(Gaps().std)
