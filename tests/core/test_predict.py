from __future__ import annotations

import random

import pytest

from pdlab.core.predict import DecodePredictor, PrefillPredictor, learn
from pdlab.core.types import StepTime

PREFILL = tuple((n, 0.01 + 1e-4 * n + 1e-8 * n * n) for n in (128, 512, 2048, 8192))
DECODE = tuple((b, t, 0.01 + 1e-3 * b + 1e-6 * t) for b in (1, 8, 32) for t in (1000, 50_000))


def prefill_step(tokens: int, slower: float = 1.0, cached: int = 0) -> StepTime:
    squared = tokens * (2 * cached + tokens)
    return StepTime(0, 0, tokens, squared, slower * (0.01 + 1e-4 * tokens + 1e-8 * squared))


def decode_step(batch: int, context: int, slower: float = 1.0) -> StepTime:
    return StepTime(batch, context, 0, 0, slower * (0.01 + 1e-3 * batch + 1e-6 * context))


def test_prefill_is_fitted_by_a_quadratic_that_extrapolates():
    predictor = PrefillPredictor(PREFILL)
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


def test_a_few_points_are_not_taken_for_a_curve():
    """As where an engine had no time to measure more. Two points lie on many parabolas, some of which say minutes for a long prompt."""
    one, two = PrefillPredictor([(64, 0.2)]), PrefillPredictor([(1, 0.05), (64, 0.25)])
    assert one.seconds(640) == pytest.approx(2.0, rel=0.1)
    assert two.seconds(640) == pytest.approx(0.05 + 640 * 0.2 / 63, rel=0.1)
    flat = DecodePredictor([(1, 128, 0.02), (2, 256, 0.021)])
    assert 0.02 < flat.seconds(16, 2048) < 0.06


def test_decode_is_linear_in_batch_and_context():
    predictor = DecodePredictor(DECODE)
    assert predictor.seconds(16, 20_000) == pytest.approx(0.046)


def test_of_whom_nothing_is_known_it_says_no_time_and_notes_that_it_was_asked():
    blind: set[str] = set()
    prefill, decode = PrefillPredictor([], "p0", blind), DecodePredictor([], "d0", blind)
    assert not blind
    assert prefill.seconds(1000) == decode.seconds(10, 1000) == 0.0
    assert blind == {"p0", "d0"}
    learn(prefill, decode, prefill_step(100))
    blind.clear()
    assert prefill.seconds(1000) > 0.0
    assert not blind


@pytest.mark.parametrize("slower", [0.4, 1.0, 2.5, 6.0])
def test_a_profile_is_corrected_by_the_steps_that_are_told(slower: float):
    """Twenty requests' worth of them, each a third off by chance."""
    draw = random.Random(5)
    prefill, decode = PrefillPredictor(PREFILL), DecodePredictor(DECODE)
    for _ in range(20):
        learn(prefill, decode, prefill_step(draw.randrange(50, 3000), slower * draw.uniform(0.8, 1.25), cached=draw.choice([0, 1000])))
        learn(prefill, decode, decode_step(draw.randrange(1, 33), draw.randrange(100, 50_000), slower * draw.uniform(0.8, 1.25)))
    for tokens in (100, 1000, 6000):
        assert prefill.seconds(tokens) == pytest.approx(prefill_step(tokens, slower).seconds, rel=0.2)
    for batch, context in ((1, 500), (16, 20_000)):
        assert decode.seconds(batch, context) == pytest.approx(decode_step(batch, context, slower).seconds, rel=0.2)


def test_without_a_profile_the_steps_are_what_is_fitted():
    draw = random.Random(6)
    prefill, decode = PrefillPredictor([]), DecodePredictor([])
    for _ in range(20):
        learn(prefill, decode, prefill_step(draw.randrange(50, 3000), draw.uniform(0.9, 1.1)))
        learn(prefill, decode, decode_step(draw.randrange(1, 33), draw.randrange(100, 50_000), draw.uniform(0.9, 1.1)))
    for tokens in (100, 1000, 2500):
        assert prefill.seconds(tokens) == pytest.approx(prefill_step(tokens).seconds, rel=0.2)
    for batch, context in ((4, 5000), (16, 20_000)):
        assert decode.seconds(batch, context) == pytest.approx(decode_step(batch, context).seconds, rel=0.2)


def test_steps_as_the_profile_says_change_nothing():
    """Else equal instances would part for nothing, and ties break by chance."""
    prefill = PrefillPredictor(PREFILL)
    before = prefill.seconds(777)
    for _ in range(50):
        learn(prefill, DecodePredictor(DECODE), prefill_step(500, 1.04))
    assert prefill.seconds(777) == before


def test_beside_decodes_their_share_is_taken_off_a_prompt():
    prefill, decode = PrefillPredictor(PREFILL), DecodePredictor(DECODE)
    alone = prefill_step(1000)
    for _ in range(30):
        learn(prefill, decode, StepTime(32, 50_000, 1000, 1_000_000, alone.seconds + 32e-3 + 0.05))
    assert prefill.seconds(1000) == pytest.approx(alone.seconds, rel=0.01)


def test_one_stalled_step_is_soon_forgotten():
    prefill = PrefillPredictor(PREFILL)
    for _ in range(10):
        learn(prefill, DecodePredictor(()), prefill_step(1000))
    learn(prefill, DecodePredictor(()), prefill_step(1000, 100.0))
    assert prefill.seconds(1000) < 1.5 * prefill_step(1000).seconds
    for _ in range(8):
        learn(prefill, DecodePredictor(()), prefill_step(1000))
    assert prefill.seconds(1000) == pytest.approx(prefill_step(1000).seconds, rel=0.05)


def test_what_is_slow_no_more_is_predicted_quick_again():
    decode = DecodePredictor(())
    for slower in (3.0, 1.0):
        for _ in range(20):
            learn(PrefillPredictor(()), decode, decode_step(8, 8000, slower))
        assert decode.seconds(8, 8000) == pytest.approx(decode_step(8, 8000, slower).seconds, rel=0.1)
