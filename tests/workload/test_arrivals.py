"""Each arrival process has the rate and the burstiness it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from pdlab.workload.arrivals import Arrival, draw

COUNT, RATE = 40_000, 8.0
CHANGING: list[dict[str, Any]] = [
    {"process": "ramp", "to_rate": 32.0, "over_s": 1000.0},
    {"process": "ramp", "to_rate": 2.0, "over_s": 500.0},
    {"process": "step", "at_s": [100.0, 300.0], "rates": [40.0, 2.0]},
    {"process": "day", "amplitude": 0.8, "period_s": 600.0},
]


def arrivals(count: int = COUNT, seed: int = 0, **arrival: Any) -> NDArray[np.float64]:
    return draw(Arrival.model_validate(arrival), RATE, count, np.random.default_rng(seed))


def cv(times_s: NDArray[np.float64]) -> float:
    gaps = np.diff(times_s)
    return float(gaps.std() / gaps.mean())


def rate(times_s: NDArray[np.float64], start_s: float, end_s: float) -> float:
    return float(((times_s >= start_s) & (times_s < end_s)).sum()) / (end_s - start_s)


@pytest.mark.parametrize(
    ("arrival", "wanted"),
    [({}, 1.0), *(({"process": "gamma", "cv": value}, value) for value in (0.3, 1.0, 2.0, 4.0)), ({"process": "constant"}, 0.0)],
    ids=str,
)
def test_stationary_processes_have_their_rate_and_cv(arrival: dict[str, Any], wanted: float) -> None:
    times_s = arrivals(**arrival)
    assert (COUNT - 1) / times_s[-1] == pytest.approx(RATE, rel=0.015 * max(1.0, 2 * wanted))
    assert cv(times_s) == pytest.approx(wanted, rel=0.05, abs=1e-9)


def test_a_ramp_passes_through_every_rate_between_and_stays_at_the_last() -> None:
    times_s = arrivals(process="ramp", to_rate=32.0, over_s=1000.0)
    for start_s, wanted in ((0.0, 9.2), (500.0, 21.2), (900.0, 30.8), (1200.0, 32.0)):
        assert rate(times_s, start_s, start_s + 100) == pytest.approx(wanted, rel=0.08)


def test_steps_change_the_rate_at_their_times() -> None:
    times_s = arrivals(process="step", at_s=[100.0, 300.0], rates=[40.0, 2.0])
    assert rate(times_s, 0, 100) == pytest.approx(RATE, rel=0.12)
    assert rate(times_s, 100, 300) == pytest.approx(40.0, rel=0.05)
    assert rate(times_s, 300, 2300) == pytest.approx(2.0, rel=0.05)


def test_a_day_rises_and_falls_around_the_rate() -> None:
    times_s = arrivals(process="day", amplitude=0.8, period_s=600.0)
    phase = times_s % 600.0
    days = times_s[-1] / 600.0
    high = ((phase > 100) & (phase < 200)).sum() / days / 100
    low = ((phase > 400) & (phase < 500)).sum() / days / 100
    mean_high = RATE * (1 + 0.8 * 3 / np.pi)  # of the sine over its middle third
    assert high == pytest.approx(mean_high, rel=0.05)
    assert low == pytest.approx(2 * RATE - mean_high, rel=0.1)
    assert rate(times_s, 0, 600 * int(days)) == pytest.approx(RATE, rel=0.02)


@pytest.mark.parametrize("arrival", CHANGING, ids=str)
def test_cv_makes_a_changing_rate_burstier_and_keeps_its_course(arrival: dict[str, Any]) -> None:
    plain, bursty = arrivals(**arrival), arrivals(**arrival, cv=3.0)
    assert cv(bursty) > 1.5 * cv(plain)
    assert bursty[COUNT // 2] == pytest.approx(plain[COUNT // 2], rel=0.1)


@pytest.mark.parametrize("arrival", [{}, {"process": "gamma", "cv": 2}, {"process": "constant"}, *CHANGING], ids=str)
def test_times_ascend_from_zero_and_equal_seeds_give_equal_times(arrival: dict[str, Any]) -> None:
    times_s = arrivals(500, **arrival)
    assert times_s[0] == 0.0
    assert np.all(np.diff(times_s) >= 0)
    assert np.array_equal(times_s, arrivals(500, **arrival))
    assert arrival.get("process") == "constant" or not np.array_equal(times_s, arrivals(500, seed=1, **arrival))


def test_a_closed_loop_has_no_times() -> None:
    assert not arrivals(10, process="closed", concurrency=4).any()


def test_sessions_begin_slower_but_at_the_same_times() -> None:
    step = Arrival(process="step", at_s=(10.0,), rates=(6.0,)).slower(3.0)
    assert (step.at_s, step.rates) == ((10.0,), (2.0,))
    assert Arrival(process="ramp", to_rate=6.0, over_s=5.0).slower(3.0).to_rate == 2.0


@pytest.mark.parametrize(
    ("arrival", "said"),
    [
        ({"process": "gamma"}, "gamma needs cv"),
        ({"process": "poisson", "cv": 2}, "poisson takes no cv"),
        ({"process": "ramp", "to_rate": 3}, "ramp needs over_s"),
        ({"process": "step", "at_s": [1, 2], "rates": [3]}, "2 times and 1 rates"),
        ({"process": "step", "at_s": [2, 1], "rates": [3, 3]}, "must ascend"),
        ({"process": "day", "amplitude": 1.0}, "less than 1"),
        ({"process": "closed"}, "closed needs concurrency"),
        ({"process": "poison"}, "poisson"),
    ],
)
def test_a_process_says_what_it_lacks(arrival: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Arrival.model_validate(arrival)
