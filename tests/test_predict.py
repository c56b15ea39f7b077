from __future__ import annotations

import pytest

from pdlab.predict import DecodePredictor, PrefillPredictor


def test_prefill_is_fitted_by_a_quadratic_that_extrapolates():
    predictor = PrefillPredictor([(n, 0.01 + 1e-4 * n + 1e-8 * n * n) for n in (128, 512, 2048, 8192)])
    assert predictor.seconds(4096) == pytest.approx(0.01 + 0.4096 + 1e-8 * 4096**2)
    assert predictor.seconds(100_000) == pytest.approx(0.01 + 10 + 100, rel=1e-6)


def test_noise_never_makes_a_longer_queue_look_shorter():
    """Concave measurements would give a falling quadratic, by which an endless queue takes no time."""
    predictor = PrefillPredictor([(128, 0.02), (1024, 0.12), (4096, 0.4), (8192, 0.7)])
    seconds = [predictor.seconds(n) for n in (100, 10_000, 100_000, 1_000_000)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 10.0
    falling = PrefillPredictor([(100, 0.2), (200, 0.1)])
    assert 0.1 < falling.seconds(10**6) < 0.2


def test_decode_is_linear_in_batch_and_context():
    predictor = DecodePredictor([(b, t, 0.01 + 1e-3 * b + 1e-6 * t) for b in (1, 8, 32) for t in (1000, 50_000)])
    assert predictor.seconds(16, 20_000) == pytest.approx(0.046)


def test_without_a_profile_everything_takes_no_time():
    assert PrefillPredictor([]).seconds(1000) == DecodePredictor([]).seconds(10, 1000) == 0.0
