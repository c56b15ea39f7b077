"""Several calibrations of one instance as one."""

from __future__ import annotations

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.profile import BesideSeen, FrontCosts, InstanceProfile, Interference, MeasuredPoint, Overheads, Point, TransferFit
from pdlab.proof.calibrate import grid
from pdlab.proof.calibrate.fit import errors, fit
from pdlab.proof.calibrate.pool import pooled
from tests.cost.test_measured import PROFILE

BOUNDS = grid.Bounds(step_tokens=512, seqs=16, max_tokens=2048, kv_tokens=20000)


def seconds(point: Point) -> float:
    return 1e-3 + 1e-4 * point.tokens * point.prompts * (1 + point.cached / 5000) + 1e-3 * point.batch * (1 + point.context / 5000)


def profile(factor: float, request_s: float) -> InstanceProfile:
    points = [*grid.knots(BOUNDS), *grid.held_out(BOUNDS)]
    measured = [MeasuredPoint(point=point, seconds=(factor * seconds(point),)) for point in points]
    steps = fit(measured)
    changes = {
        "steps": steps,
        "points": tuple(measured),
        "errors": errors(steps, measured),
        "overheads": Overheads(request_s=request_s, handoff_s=1e-3 / factor),
        "transfer": TransferFit(transport="shm", bytes_per_s=factor * 1e9),
        "beside": Interference(decode_beside_decode_s=factor),
        "front": FrontCosts(token_s=factor),
        "warnings": (f"measured at {factor}", "the fit is poor for prompts"),
    }
    return PROFILE.model_copy(update=changes)


def test_a_machine_that_was_faster_and_slower_is_taken_at_its_median_or_mean() -> None:
    made = pooled([profile(0.9, 0.001), profile(1.0, 0.002), profile(1.2, 0.009)])
    middle, mean = profile(1.0, 0.002), profile((0.9 + 1.0 + 1.2) / 3, 0.002)
    for part in ("prefill", "decode", "added"):
        for row, expected in zip(getattr(made.steps, part).seconds, getattr(mean.steps, part).seconds, strict=True):
            assert row == pytest.approx(expected)
    assert made.overheads == middle.overheads
    assert made.transfer == middle.transfer
    assert made.beside == middle.beside
    assert made.front == middle.front
    assert all(len(m.seconds) == 3 for m in made.points)
    assert made.warnings[:3] == ("measured at 0.9", "measured at 1.0", "measured at 1.2")
    assert sum("the fit is poor for prompts" in line for line in made.warnings) <= 1  # of the pooled fit


def test_what_neighbours_cost_is_of_all_that_was_seen() -> None:
    def told(*decode_s: float) -> InstanceProfile:
        seen = tuple(BesideSeen(load="prefill", few_tokens=48, many_tokens=192, few_s=0.0, many_s=0.0, decode_s=s) for s in decode_s)
        return PROFILE.model_copy(update={"points": profile(1.0, 0.0).points, "beside_seen": seen})

    made = pooled([told(0.001, 0.002), told(-0.003, -0.004), told(0.0)])
    assert made.beside == Interference()
    assert len(made.beside_seen) == 5
    assert pooled([told(0.001, 0.002), told(0.003)]).beside == Interference(decode_beside_prefill_s=0.002)


def test_only_profiles_of_one_instance_are_pooled() -> None:
    other = PROFILE.model_copy(update={"engine": PROFILE.engine.model_copy(update={"max_seqs": 99})})
    with pytest.raises(UsageError, match="are not of the same instance"):
        pooled([PROFILE, other])
