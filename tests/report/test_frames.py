"""Frames say what the terminal's tables say."""

from __future__ import annotations

import pytest

from pdlab.report.frames import bottlenecks, checks_frame, figures_frame, instances_frame, pairs_frame, ranking_frame, runs_frame
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import checks
from tests.support.measured_runs import measured, simulated


@pytest.fixture(scope="module")
def compared() -> Comparison:
    sims = {policy: simulated(policy) for policy in ("least_loaded", "round_robin")}
    return compare([pair for name, sim in sims.items() for pair in ((name, sim), (f"{name} 1", measured(sim, 1.08)))])


def test_runs_stand_side_by_side_and_a_star_needs_several_seeds() -> None:
    slow, fast = simulated(rate=8), simulated(rate=2)
    runs = [("8", slow.summary), ("2", fast.summary)]
    frame = runs_frame(runs)
    assert list(frame) == ["8", "2"] and list(frame.index[:2]) == ["SLO attainment", "goodput, req/s"]
    assert not any("★" in words for words in frame.to_numpy().ravel()), "one run tells nothing of chance"
    assert list(frame.loc["bottleneck"]) == [run.summary["bottleneck"]["resource"] for run in (slow, fast)]
    assert bottlenecks(runs).splitlines()[1] == f"2: {frame.loc['bottleneck', '2']}, {fast.summary['bottleneck']['evidence']}"
    others = [(name, run.summary | {"run": run.summary["run"] | {"seed": 99}}) for name, run in (("8", slow), ("2", fast))]
    again = runs_frame([*runs, *others])
    assert list(again) == ["8", "2"] and again.loc["goodput, req/s", "8"].endswith("★")


def test_checks_have_a_row_each_run_and_policy_and_say_what_missed(compared: Comparison) -> None:
    frame = checks_frame(list(checks("small", compared)))
    assert list(frame.index) == [("small", "least_loaded"), ("small", "round_robin")]
    assert list(frame) == ["TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99", "E2E mean", "E2E p99"]
    assert frame.loc[("small", "round_robin"), "E2E mean"] == "-7.4% missed"
    assert frame.loc[("small", "round_robin"), "E2E p99"] == "-7.4%"


def test_a_comparison_has_its_policies_side_by_side(compared: Comparison) -> None:
    frame = figures_frame(compared)
    assert list(frame.columns.levels[0]) == ["least_loaded", "round_robin"]
    assert frame.loc["E2E mean", ("least_loaded", "error")] == "-7.4 %"
    group = compared.groups[0]
    assert instances_frame(group).loc[("decode-0", "requests"), "measured"] == "120"
    assert pairs_frame(group).loc["E2E", "median error"] == "-7.4 %"
    ranking = ranking_frame(compared)
    assert list(ranking) == ["simulated", "measured", "same order"] and "E2E mean" in ranking.index
    assert " > " in ranking.loc["E2E mean", "simulated"]
