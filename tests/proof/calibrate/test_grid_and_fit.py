"""What is measured, and what becomes of it, with step times from a formula in place of an engine."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.cost.profile import FitError, MeasuredPoint, Point
from pdlab.proof.calibrate import fit, grid, rounds
from pdlab.proof.calibrate.grid import Bounds

BOUNDS = Bounds(step_tokens=2048, seqs=64, max_tokens=4096, kv_tokens=20000)


def law(point):
    """Seconds of a step: fixed, by token, by pair of tokens, by prompt, by sequence; less where nothing ends."""
    chunk = point.tokens * 1e-4 + 1e-8 * point.tokens * (point.cached + point.tokens / 2)
    prompts = point.prompts if point.tokens else 0
    return (4e-3 if point.ends else 3e-3) + prompts * chunk + 2e-4 * max(0, prompts - 1) + point.batch * (5e-4 + 1e-8 * point.context)


def measured(points, noise=0.0):
    rng = random.Random(1)
    return [MeasuredPoint(point=p, seconds=tuple(law(p) * (1 + rng.uniform(-noise, noise)) for _ in range(5))) for p in points]


@settings(deadline=None, max_examples=50)
@given(step_tokens=st.integers(96, 9000), seqs=st.integers(2, 600), max_tokens=st.integers(96, 20000), kv_tokens=st.integers(96, 100000))
def test_any_instance_gets_a_grid_that_it_can_run_and_that_can_be_fitted(step_tokens, seqs, max_tokens, kv_tokens):
    bounds = Bounds(step_tokens, seqs, max_tokens, kv_tokens)
    knots, held = grid.knots(bounds), grid.held_out(bounds)
    assert all(bounds.holds(p) for p in [*knots, *held])
    assert not {p.model_copy(update={"held_out": False}) for p in held} & set(knots)
    steps = fit.fit(measured(knots))
    assert all(seconds > 0 for seconds in fit.predicted(steps, [*knots, *held]))


def test_a_law_of_tokens_and_pairs_is_found_again():
    steps = fit.fit(measured(grid.knots(BOUNDS)))
    found = fit.errors(steps, measured(grid.held_out(BOUNDS)))
    assert [e.kind for e in found] == list(fit.KINDS)
    assert max(e.worst for e in found) < 0.02
    assert steps.unfinished_chunk_saving_s == pytest.approx(1e-3)


def test_noise_of_a_few_percent_stays_that():
    steps = fit.fit(measured(grid.knots(BOUNDS), noise=0.05))
    assert max(e.mean for e in fit.errors(steps, measured(grid.held_out(BOUNDS)))) < 0.05


def test_bad_moments_lengthen_all_steps_of_their_kind():
    usual = measured(grid.knots(BOUNDS))
    slowed = [
        m.model_copy(update={"seconds": (*m.seconds, 7 * m.median_s)}) if m.point.kind == "decode" and m.point.batch == 4 else m
        for m in usual
    ]
    decodes = [(m, s) for m, s in zip(usual, slowed, strict=True) if m.point.kind == "decode"]
    longer = sum(s.mean_s for _, s in decodes) / sum(m.mean_s for m, _ in decodes)
    before, after = fit.fit(usual), fit.fit(slowed)
    assert longer > 1.05
    for row, slow in zip(before.decode.seconds, after.decode.seconds, strict=True):
        assert slow == pytest.approx([longer * seconds for seconds in row])
    assert after.prefill == before.prefill
    assert fit.errors(after, slowed) == pytest.approx(fit.errors(before, usual)), "which are of usual times"


def test_without_mixed_points_decodes_share_the_fixed_part():
    steps = fit.fit(measured([p for p in grid.knots(BOUNDS) if p.kind in ("prefill", "cached", "decode")]))
    assert steps.additive
    found = {e.kind: e for e in fit.errors(steps, measured(grid.held_out(BOUNDS)))}
    assert found["mixed"].mean < 0.05


def test_what_decodes_add_to_a_prompt_is_measured_up_to_the_longest_that_a_step_takes():
    """It grows ever less with the prompt's tokens. A step of 256 had none of more than 64 beside decodes once."""

    def saturating(points):
        return [
            MeasuredPoint(point=p, seconds=(law(p) + (1e-3 * p.batch * p.tokens / (p.tokens + 40) if p.tokens else 0.0),)) for p in points
        ]

    bounds = Bounds(step_tokens=256, seqs=16, max_tokens=1024, kv_tokens=8656)
    steps = fit.fit(saturating(grid.knots(bounds)))
    long = saturating([Point(tokens=n, batch=b, context=120) for n in (150, 200, 240) for b in (3, 10)])
    for computed_s, step in zip(fit.predicted(steps, [m.point for m in long]), long, strict=True):
        assert computed_s == pytest.approx(step.median_s, rel=0.03)


def test_a_poor_fit_is_warned_of():
    good, bad = (FitError(kind=kind, points=3, mean=mean, worst=0.1) for kind, mean in (("decode", 0.01), ("mixed", 0.2)))
    assert fit.warnings([good, bad]) == ["the fit is poor for mixed: 20.0 % on average and 10.0 % at worst on what was held out"]


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_monotone_never_falls_and_keeps_the_sum(values):
    made = fit.monotone(values)
    assert all(a <= b for a, b in pairwise(made))
    assert sum(made) == pytest.approx(sum(values))


@settings(deadline=None, max_examples=50)
@given(setup=st.floats(0, 1e-2), per_byte=st.floats(1e-12, 1e-7))
def test_a_line_is_found_again(setup, per_byte):
    points = [(float(n), setup + per_byte * n) for n in (1000, 5000, 20000, 100000)]
    intercept, slope = fit.slope(points)
    assert intercept == pytest.approx(setup, rel=1e-3, abs=1e-9)
    assert slope == pytest.approx(per_byte, rel=1e-3)


def test_every_point_comes_once_and_then_as_time_allows():
    order = []
    now_s = 0.0

    def seconds(point):
        nonlocal now_s
        order.append(point)
        now_s += law(point)
        return law(point)

    points = [Point(tokens=n) for n in range(1, 9)]
    progress = []
    timed = rounds.measure(seconds, points, budget_s=5.0, progress=progress.append, clock=lambda: now_s)
    assert sorted(order[:8], key=points.index) == points
    assert order[:8] != points
    assert [len(m.seconds) for m in timed] == [rounds.MOST] * 8
    assert progress[-1] == 1.0
    assert len(order) == 8 * rounds.MOST
    assert [len(m.seconds) for m in rounds.measure(seconds, points, budget_s=1e-9, clock=lambda: now_s)] == [1] * 8


def test_drift_is_told_with_its_sign():
    early, late, same = (MeasuredPoint(point=Point(tokens=8), seconds=(s,)) for s in (0.1, 0.12, 0.102))
    assert rounds.drift([early], [late]) == "the machine drifted: the same steps took 20 % longer at the end than at the beginning"
    assert rounds.drift([late], [early]).endswith("took 17 % less at the end than at the beginning")
    assert rounds.drift([early], [same]) == ""


def test_a_slow_engine_gets_shorter_steps():
    assert grid.affordable(BOUNDS, 1e-6, 1e-4, 60.0) == BOUNDS
    slow = grid.affordable(BOUNDS, 1e-3, 1e-2, 5.0)
    assert 256 <= slow.step_tokens < 2048
