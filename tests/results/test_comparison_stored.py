"""A folder of results of both worlds, read again; figures against the bar."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import BAR, Check, checks, load_checks, run_of, stored
from tests.measured import measured, simulated


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


def test_results_are_put_together_by_layout_and_rate(tmp_path: Path) -> None:
    for policy, rate in (("least_loaded", 8), ("round_robin", 8), ("round_robin", 4)):
        sim = simulated(policy, rate=rate)
        sim.save(tmp_path / f"{policy}-{rate}-sim")
        measured(sim, 1.01).save(tmp_path / f"{policy}-{rate}-real-1")
    found = stored(tmp_path)
    groups = {run: [group.policy for group in comparison.groups] for run, comparison in found.items()}
    assert groups == {"2p1d, 8 req/s": ["least_loaded", "round_robin"], "2p1d, 4 req/s": ["round_robin"]}
    assert found["2p1d, 8 req/s"].rankings and not any(group.notes for one in found.values() for group in one.groups)


def test_runs_are_named_by_what_was_run() -> None:
    rows = [{"role": "mixed", "count": 2}, {"role": "decode"}]
    assert run_of({"cluster": {"instances": rows}, "workload": {"rate": 0.5}}) == "2mixed1d, 0.5 req/s"
    assert run_of({"cluster": {"instances": rows[1:]}, "workload": {}}) == "1d"


def test_checks_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = list(against(1.01, 1.03).values())
    plain = [{k: None if v != v else v for k, v in asdict(check).items()} for check in written]
    (tmp_path / "checks.json").write_text(json.dumps(plain))
    assert load_checks(tmp_path / "checks.json") == written


def test_what_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pdlab validate writes it"):
        load_checks(tmp_path / "checks.json")
    (tmp_path / "checks.json").write_text("[{}]")
    with pytest.raises(UsageError, match="not the checks"):
        load_checks(tmp_path / "checks.json")
    with pytest.raises(UsageError, match="no result is stored there"):
        stored(tmp_path)


def test_a_comparison_has_checks_for_each_policy() -> None:
    sims = {policy: simulated(policy) for policy in ("least_loaded", "round_robin")}
    found: Comparison = compare([item for name, sim in sims.items() for item in ((name, sim), (f"{name} real", measured(sim, 1.0)))])
    assert [check.policy for check in checks("r", found)] == ["least_loaded"] * 6 + ["round_robin"] * 6
