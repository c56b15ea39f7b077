"""What steps take undisturbed, from repeats that were disturbed now and then."""

from __future__ import annotations

import random

import pytest

from pdlab.cost.profile import Measured, Point, Unsteady
from pdlab.real.calibrate.calm import SHARE, calmed, unsteadiness

LOOP_S = 2.5e-5


def repeats(share: float, disturbed: float, points: int = 30, noise: float = 0.03, seed: int = 1) -> list[Measured]:
    """Points of 0.1 s, 0.2 s and so on, five repeats each, so much of them while the loop takes 1.8 times as long."""
    rng, found = random.Random(seed), []
    for number in range(1, points + 1):
        slower = [0.8 if rng.random() < disturbed else 0.0 for _ in range(5)]
        seconds = tuple(0.1 * number * (1 + share * more) * (1 + rng.gauss(0, noise)) for more in slower)
        found.append(Measured(point=Point(tokens=number), seconds=seconds, loop_s=tuple(LOOP_S * (1 + more) for more in slower)))
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_the_share_is_found_and_what_steps_take_undisturbed(share: float) -> None:
    measured = repeats(share, 0.4)
    found = unsteadiness(measured)
    assert found.loop_s == pytest.approx(LOOP_S)
    assert found.share == pytest.approx(share, abs=0.04)
    calm = [m.mean_s / (0.1 * m.point.tokens) for m in calmed(measured, found)]
    assert sum(calm) / len(calm) == pytest.approx(1.0, abs=0.02)
    if share:
        raw = [m.mean_s / (0.1 * m.point.tokens) for m in measured]
        assert sum(raw) / len(raw) > 1 + 0.8 * share * 0.4 * 0.8


def test_without_a_disturbance_the_share_is_the_one_from_elsewhere_and_changes_nothing() -> None:
    measured = repeats(0.5, 0.0)
    found = unsteadiness(measured)
    assert found.share == pytest.approx(SHARE)
    assert calmed(measured, found) == measured


def test_where_nobody_looked_nothing_is_known() -> None:
    plain = [Measured(point=Point(tokens=8), seconds=(1.0, 2.0))]
    assert unsteadiness(plain) == Unsteady()
    assert calmed(plain, Unsteady(loop_s=LOOP_S, share=0.5)) == plain
    assert Unsteady().longer(9.0) == 1.0
    assert Unsteady(loop_s=LOOP_S, share=0.5).longer(2 * LOOP_S) == 1.5
