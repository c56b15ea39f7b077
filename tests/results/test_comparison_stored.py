"""Stored runs of both worlds, compared; figures against the bar."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import BAR, Check, all_checks, checks, compared, load_checks, plain, stored
from pdlab.results.run_store import RunStore, StoredRun
from tests.support.measured_runs import measured, simulated


def against(*factors: float) -> dict[str, Check]:
    sim = simulated()
    found = compare([("sim", sim), *((f"real-{k}", measured(sim, factor)) for k, factor in enumerate(factors))])
    return {check.key: check for check in checks("small", found)}


def test_means_have_a_narrower_bar_than_tails() -> None:
    found = against(1.07)
    assert list(found) == list(BAR) and found["ttft_s.p99"].label == "TTFT p99"
    assert found["ttft_s.mean"].error == pytest.approx(1 / 1.07 - 1)
    assert [found[key].holds for key in ("ttft_s.mean", "e2e_s.mean", "ttft_s.p99", "e2e_s.p99")] == [False, False, True, True]


def test_an_error_within_the_spread_of_the_repeats_holds() -> None:
    found = against(0.97, 1.2)
    assert found["e2e_s.mean"].error == pytest.approx(1 / 1.085 - 1) and found["e2e_s.mean"].holds
    assert not against(1.08, 1.09)["e2e_s.mean"].holds


def test_a_missing_figure_does_not_hold() -> None:
    sim = simulated(output=1)  # one token has no TPOT
    found = {check.key: check for check in checks("small", compare([("sim", sim), ("real", measured(sim, 1.0))]))}
    assert math.isnan(found["tpot_s.mean"].error) and not found["tpot_s.mean"].holds and found["ttft_s.mean"].holds


def store_of(*runs: StoredRun) -> RunStore:
    store = RunStore({}, {})
    for run in runs:
        store.put(run)
    return store


def test_runs_are_put_together_by_layout_and_rate(tmp_path: Path) -> None:
    runs = []
    for policy, rate in (("least_loaded", 8), ("round_robin", 8), ("round_robin", 4)):
        sim = simulated(policy, rate=rate)
        runs += [StoredRun("2p1d", policy, rate, "sim", 0, sim), StoredRun("2p1d", policy, rate, "real", 1, measured(sim, 1.01))]
    store_of(*runs).save(tmp_path)
    found = stored(tmp_path)
    groups = {run: [group.policy for group in comparison.groups] for run, comparison in found.items()}
    assert groups == {"2p1d, 8 req/s": ["least_loaded", "round_robin"], "2p1d, 4 req/s": ["round_robin"]}
    assert found["2p1d, 8 req/s"].rankings and not any(group.notes for one in found.values() for group in one.groups)
    assert len(all_checks(found)) == 3 * len(BAR)


def test_simulations_that_know_of_slow_cores_stand_in_place_of_the_one_that_does_not() -> None:
    sim = simulated()
    real = [StoredRun("2p1d", "least_loaded", 8, "real", k, measured(sim, factor)) for k, factor in ((1, 1.1), (2, 1.2))]
    plain_sim = StoredRun("2p1d", "least_loaded", 8, "sim", 0, sim)
    informed = [StoredRun("2p1d", "least_loaded", 8, "sim", run.repeat, measured(run.result, 1.0, run={"world": "sim"})) for run in real]

    def of(runs: list[StoredRun], undisturbed: bool = False) -> float:
        (comparison,) = compared(runs, undisturbed=undisturbed).values()
        return comparison.groups[0].line("e2e_s.mean").error

    assert of([*real, plain_sim]) == pytest.approx(1 / 1.15 - 1)
    assert of([*real, plain_sim, *informed]) == pytest.approx(0, abs=1e-9)
    assert of([*real, *informed]) == pytest.approx(0, abs=1e-9)
    assert of([*real, plain_sim, *informed], undisturbed=True) == pytest.approx(1 / 1.15 - 1)


def test_checks_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = list(against(1.01, 1.03).values())
    store = store_of(StoredRun("2p1d", "least_loaded", 8, "sim", 0, simulated()))
    store.checks = [plain(check) for check in written]
    store.save(tmp_path)
    assert load_checks(tmp_path) == written


def test_what_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    for read in (load_checks, stored):
        with pytest.raises(UsageError, match="no runs are stored there"):
            read(tmp_path)
    store = store_of(StoredRun("2p1d", "least_loaded", 8, "sim", 0, simulated()))
    store.checks = [{}]
    store.save(tmp_path)
    with pytest.raises(UsageError, match="not those of pdlab validate"):
        load_checks(tmp_path)
    with pytest.raises(UsageError, match="no measured result"):
        stored(tmp_path)


def test_a_comparison_has_checks_for_each_policy() -> None:
    sims = {policy: simulated(policy) for policy in ("least_loaded", "round_robin")}
    found: Comparison = compare([item for name, sim in sims.items() for item in ((name, sim), (f"{name} real", measured(sim, 1.0)))])
    assert [check.policy for check in checks("r", found)] == ["least_loaded"] * 6 + ["round_robin"] * 6
