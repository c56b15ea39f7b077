"""What steps take undisturbed, from repeats that were disturbed now and then."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pdlab.cost.profile import CoreSpeed, MeasuredPoint, Point
from pdlab.proof.calibrate.undisturbed import SHARE, calmed, unsteadiness

LOOP_S = 2.5e-5
UNSTEADY = CoreSpeed(prefill_loop_s=LOOP_S, decode_loop_s=2 * LOOP_S, prefill_share=0.25, decode_share=0.5)


def prompt(number: int) -> Point:
    return Point(tokens=number)


def repeats(
    share: float, disturbed: float, points: int = 30, noise: float = 0.03, seed: int = 1, kind: Callable[[int], Point] = prompt
) -> list[MeasuredPoint]:
    """Points of 0.1 s, 0.2 s and so on, five repeats each, so much of them while the loop takes 1.8 times as long."""
    rng, found = random.Random(seed), []
    for number in range(1, points + 1):
        slower = [0.8 if rng.random() < disturbed else 0.0 for _ in range(5)]
        seconds = tuple(0.1 * number * (1 + share * more) * (1 + rng.gauss(0, noise)) for more in slower)
        found.append(MeasuredPoint(point=kind(number), seconds=seconds, loop_s=tuple(LOOP_S * (1 + more) for more in slower)))
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_the_share_is_found_and_what_steps_take_undisturbed(share: float) -> None:
    measured = repeats(share, 0.4)
    found = unsteadiness(measured)
    assert (found.prefill_loop_s, found.decode_loop_s) == pytest.approx((LOOP_S, 0.0))
    assert found.prefill_share == pytest.approx(share, abs=0.04)
    assert found.decode_share == pytest.approx(SHARE)
    calm = [m.mean_s / (0.1 * m.point.tokens) for m in calmed(measured, found)]
    assert sum(calm) / len(calm) == pytest.approx(1.0, abs=0.02)
    if share:
        raw = [m.mean_s / (0.1 * m.point.tokens) for m in measured]
        assert sum(raw) / len(raw) > 1 + 0.8 * share * 0.4 * 0.8


def test_steps_with_prompts_and_those_that_only_decode_have_a_share_each() -> None:
    decodes = [
        m.model_copy(update={"loop_s": tuple(1.1 * took_s for took_s in m.loop_s)})  # a processor that lowers its clock for them
        for m in repeats(0.5, 0.4, kind=lambda number: Point(batch=number, context=64))
    ]
    mixed = repeats(0.2, 0.4, kind=lambda number: Point(tokens=8, batch=number, context=64), seed=2)
    found = unsteadiness([*repeats(0.2, 0.4), *mixed, *decodes])
    assert (found.prefill_share, found.decode_share) == pytest.approx((0.2, 0.5), abs=0.04)
    assert (found.prefill_loop_s, found.decode_loop_s) == pytest.approx((LOOP_S, 1.1 * LOOP_S))
    for kind in (decodes, mixed):
        calm = [m.mean_s / (0.1 * m.point.batch) for m in calmed(kind, found)]
        assert sum(calm) / len(calm) == pytest.approx(1.0, abs=0.02)


def test_without_a_disturbance_the_share_is_the_one_from_elsewhere_and_changes_nothing() -> None:
    measured = repeats(0.5, 0.0)
    found = unsteadiness(measured)
    assert (found.prefill_share, found.decode_share) == pytest.approx((SHARE, SHARE))
    assert calmed(measured, found) == measured


def test_where_nobody_looked_nothing_is_known() -> None:
    plain = [MeasuredPoint(point=Point(tokens=8), seconds=(1.0, 2.0))]
    assert unsteadiness(plain) == CoreSpeed()
    assert calmed(plain, UNSTEADY) == plain
    assert CoreSpeed().slower(9.0, prefill=True) == 1.0


def test_steps_take_longer_by_a_share_of_what_the_loop_does_and_never_less_than_undisturbed() -> None:
    assert [UNSTEADY.slower(loops * LOOP_S, prefill=True) for loops in (0.9, 1.0, 2.0)] == [1.0, 1.0, 2.0]
    assert [UNSTEADY.slower(loops * LOOP_S, prefill=False) for loops in (0.9, 1.0, 3.0)] == [1.0, 1.0, 1.5]
    assert [UNSTEADY.longer(2.0, prefill=prefill) for prefill in (True, False)] == [1.25, 1.5]
