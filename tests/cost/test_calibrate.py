"""The shipped coefficients against the measurements they come from; run with -s to see the errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.cost.base import Cost
from pdlab.cost.calibrate import (
    CLOSED_LOOP,
    STEPS,
    calibrate,
    closed_loop_tpot_s,
    errors,
    fit,
    held_out,
    read_closed_loop,
    read_steps,
    report,
)
from pdlab.cost.catalogue import hardware, model
from pdlab.cost.roofline import Roofline, coefficients

DATA = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.fixture(scope="module")
def low():
    if not (DATA / CLOSED_LOOP).exists():
        pytest.skip(f"no measurements in {DATA / CLOSED_LOOP}")
    return [row for row in read_closed_loop(DATA / CLOSED_LOOP) if row.concurrency <= 64]


@pytest.fixture(scope="module")
def steps():
    if not (DATA / STEPS).exists():
        pytest.skip(f"no measurements in {DATA / STEPS}")
    return {family: read_steps(DATA / STEPS, f"{family}-80gb") for family in ("h100", "a100")}


@pytest.mark.parametrize(("engine", "most"), [("trtllm", 0.10), ("vllm", 0.11), ("sglang", 0.30)])
def test_tpot_error_on_the_older_rows(low, engine, most):
    own = [row for row in low if row.engine == engine]
    misses = np.abs(errors(own, coefficients(f"h100-{engine}")))
    print(f"\n{engine}: TPOT of {len(own)} rows with concurrency <= 64: mean absolute error {misses.mean():.1%}")
    assert len(own) >= 24
    assert misses.mean() <= most


def test_tpot_error_of_all_older_rows(low):
    misses = np.concatenate([errors([r for r in low if r.engine == e], coefficients(f"h100-{e}")) for e in ("trtllm", "vllm", "sglang")])
    assert len(low) > 180
    assert np.abs(misses).mean() <= 0.10


@pytest.mark.parametrize("family", ["h100", "a100"])
def test_step_errors_on_splitwises_table(steps, family):
    rows = steps[family]
    misses = np.abs(errors(rows, coefficients(f"{family}-2023")))
    prefill = np.array([row.prefill for row in rows])
    print(f"\n{family}, splitwise: prefill {misses[prefill].mean():.1%} of {prefill.sum()}, decode {misses[~prefill].mean():.1%}")
    assert misses[prefill].mean() <= 0.16
    assert misses[~prefill].mean() <= 0.08


def test_what_ships_is_what_calibration_finds(steps):
    found = calibrate(DATA)
    assert set(found) == {"h100-2023", "a100-2023"}
    for name, made in found.items():
        shipped = coefficients(name)
        assert made.memory == pytest.approx(shipped.memory, rel=0.01), name
        assert made.compute == pytest.approx(shipped.compute, rel=0.01), name
        assert made.calibrated == shipped.calibrated


@pytest.mark.slow  # ten fits more
def test_the_report_has_each_engine_and_each_phase_fitted_and_held_out(steps):
    lines = report(DATA, {name: coefficients(name) for name in ("h100-2023", "a100-2023")})
    print("\n" + "\n".join(lines))
    assert len(lines) == 3 + 2 * 2 * 2


def test_a_row_that_is_held_out_is_predicted_by_the_others(steps):
    truth = coefficients("h100-2023")
    rows = [replace(row, seconds=row.predict(truth)) for row in steps["h100"][::6]]
    odd = replace(rows[0], seconds=2 * rows[0].seconds)
    alike = [row for row in rows if row.setup != odd.setup]
    misses = held_out([odd, *alike], replace(truth, memory=0.5), ["memory"], folds=2)
    assert misses[0] == pytest.approx(-0.5, abs=0.02)  # it did not pull the fit towards itself
    assert held_out(alike, truth, ["memory"], folds=2) == pytest.approx(0.0, abs=1e-6)


def test_a_fit_recovers_the_coefficients_that_made_the_data(steps):
    truth = coefficients("h100-2023")
    rows = [replace(row, seconds=row.predict(truth)) for row in steps["h100"]]
    free = ("compute", "memory", "layer_s", "sequence_s")
    start = replace(truth, compute=0.4, memory=0.5, layer_s=2e-5, sequence_s=1e-5)
    made = fit(rows, start, free, hold=1e-4)
    for name in free:
        assert getattr(made, name) == pytest.approx(getattr(truth, name), rel=0.02)


class Flat(Cost):
    """A decode step takes 10 ms, a prompt adds 100."""

    def prefill_s(self, chunks):
        return 0.1

    def decode_line(self, batch, context_tokens):
        return 0.01, 0.0, float("inf")

    def mixed_s(self, chunks, batch, context_tokens):
        return 0.11


def test_alone_tpot_is_the_decode_step():
    assert closed_loop_tpot_s(Flat(), 1, 1000, 101) == pytest.approx(0.01)


def test_others_prefills_lengthen_tpot():
    # D = 100 * 0.01 + 9 * D / (D + 0.11) * 0.1, so D^2 - 1.79 D - 0.11 = 0
    assert closed_loop_tpot_s(Flat(), 10, 1000, 101) * 100 == pytest.approx((1.79 + (1.79**2 + 0.44) ** 0.5) / 2, rel=1e-3)


def test_where_prompts_go_first_tpot_meets_fewer_of_them():
    # the prompts' share of a cycle is 10 * 0.1 / (1 + 10 * 0.1) = 1/2, so 3/4 of 9 prefills are met
    assert closed_loop_tpot_s(Flat(), 10, 1000, 101, prefill_first=True) == pytest.approx(0.01 + 9 * 0.75 * 0.1 / 100)


def test_a_roofline_predicts_more_tpot_for_longer_prompts_and_more_requests():
    cost = Roofline(model("llama-3.1-8b"), hardware("h100"))
    assert closed_loop_tpot_s(cost, 8, 1000, 128) < closed_loop_tpot_s(cost, 8, 4000, 128) < closed_loop_tpot_s(cost, 64, 4000, 128)


def test_missing_measurements_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        calibrate(tmp_path)
