from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdlab.report.compare_figures import HELD, SHOWN, distributions, errors, policies, scatter
from pdlab.report.look import LIMIT
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import Check, checks
from tests.support.measured_runs import measured, simulated


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    sims = [(policy, simulated(policy)) for policy in ("least_loaded", "round_robin")]
    return compare([*sims, *((name, measured(run, factor)) for name, run in sims for factor in (0.97, 1.05))])


@pytest.fixture(scope="module")
def against(comparison: Comparison) -> list[Check]:
    return list(checks("2p1d, 8 req/s", comparison))


def test_every_error_is_a_dot_in_the_colour_of_its_verdict(against: list[Check]) -> None:
    against = [replace(against[0], error=0.2, holds=False), *against[1:]]
    (axes,) = errors(against).get_axes()
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [float(np.asarray(dot.get_xdata())[0]) for dot in dots] == [check.error for check in against]
    assert [dot.get_color() for dot in dots] == [HELD if check.holds else LIMIT for check in against]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["", "TTFT mean", "TTFT p99"]
    assert [text.get_text() for text in axes.texts] == ["least_loaded", "round_robin"]
    assert axes.get_title(loc="left") == "2p1d, 8 req/s"


def test_errors_beyond_the_picture_stand_at_its_edge_with_their_number(against: list[Check]) -> None:
    (axes,) = errors([replace(against[0], error=3.0, holds=False), replace(against[1], error=math.nan, holds=False)]).get_axes()
    low, high = axes.get_xlim()
    assert -0.7 < low < high < 0.7
    assert [text.get_text() for text in axes.texts] == ["least_loaded", "+300 %", "missing"]
    (dot,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert low < float(np.asarray(dot.get_xdata())[0]) < high


def test_each_run_has_its_own_axes(against: list[Check], tmp_path: Path) -> None:
    figure = errors([replace(check, run=run) for run in ("a", "b", "c") for check in against])
    assert [axes.get_title(loc="left") for axes in figure.get_axes() if axes.axison] == ["a", "b", "c"]
    figure.savefig(tmp_path / "x.png")
    errors([]).savefig(tmp_path / "x.png")


def test_policies_stand_side_by_side_in_both_worlds(comparison: Comparison) -> None:
    grid = policies(comparison).get_axes()
    assert [axes.get_title(loc="left") for axes in grid] == [label for label, _ in SHOWN]
    assert [label.get_text() for label in grid[0].get_yticklabels()] == ["least_loaded", "round_robin"]
    simulations = [line for line in grid[0].get_lines() if line.get_label() == "simulated"]
    assert [list(line.get_xdata()) for line in simulations] == [[group.line("ttft_s.mean").simulated] for group in comparison.groups]


def test_pictures_can_be_drawn_of_runs_in_which_nothing_completed(tmp_path: Path) -> None:
    sim = simulated("round_robin")
    empty = measured(sim, 1.0)
    empty.records.rows = empty.records.rows[:0]
    empty.summary["instances"] = []
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        empty.summary[key] = dict.fromkeys(empty.summary[key])
    found = compare([("a", sim), ("b", empty)])
    assert not found.groups[0].instances
    for figure in (distributions(found.groups[0]), scatter(found.groups[0]), policies(found), errors(list(checks("r", found)))):
        figure.savefig(tmp_path / "x.png")
