"""Axes as they are written, and the points between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.grid import Grid, worded
from pdlab.search.sweep import plan_sweep

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.yaml"


@pytest.fixture(scope="module")
def base() -> Experiment:
    return Experiment.load(QUICKSTART)


def test_values_are_yaml_and_may_be_mappings(base: Experiment) -> None:
    grid = Grid.read(["workload.rate=4,8.5,1e1", "policy=round_robin,{dispatch: prefix_aware, handoff: least_kv}"])
    assert grid.axes[0].values == (4, 8.5, 10.0)
    assert grid.axes[1].values == ("round_robin", {"dispatch": "prefix_aware", "handoff": "least_kv"})
    assert worded(grid.axes[1].values[1]) == "{dispatch: prefix_aware, handoff: least_kv}"
    points, impossible = grid.points(base)
    assert not impossible
    assert [(p.experiment.workload.rate, p.experiment.policy) for p in points] == [(r, p) for r, p in (point.values for point in points)]
    assert len(points) == len(grid) == 6


def test_a_combination_that_cannot_be_is_left_out_with_its_reason(base: Experiment) -> None:
    grid = Grid.read(["transfer.mode=pull,push", "transfer.granularity=request,layer"])
    points, impossible = grid.points(base)
    assert [point.values for point in points] == [("pull", "request"), ("push", "request"), ("push", "layer")]
    assert [point.values for point in impossible] == [("pull", "layer")]
    assert "granularity layer is for mode push" in impossible[0].reason


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["workload.rat=8"], "--grid workload.rat=8: workload.rat: unknown key; nearest is rate"),
        (["workload.rate=8,fast"], "--grid workload.rate=fast: workload.rate: must be a number, not 'fast'"),
        (["workload.rate=8,-1", "workload.requests=5,6"], "--grid workload.rate=-1: workload.rate: must be above 0, not -1"),
        (["workload.rate="], "--grid workload.rate=: it has no values; write workload.rate=value,value"),
        (["workload.rate=8,[1"], "--grid workload.rate=8,[1: "),
        (["workload.rate"], "--grid workload.rate: write key.path=value,value, such as workload.rate=4,8,16"),
        (["workload..rate=1"], "--grid workload..rate=1: write key.path=value,value"),
        (["workload.rate=8,9", "workload.rate=10"], "--grid workload.rate: the key is there twice; write all of its values after one"),
        (["workload.rate=8,9,8"], "--grid workload.rate=8,9,8: 8 is there twice"),
        (["policy=random", "policy.dispatch=random"], "--grid policy.dispatch: it and policy are one inside the other"),
        (
            ["cluster.instances.7.count=1"],
            "--grid cluster.instances.7.count=1: cluster.instances.7.count: 7 is not an index into a list of 2",
        ),
        (["seed=1,2"], "--grid seed=1,2: seed is no axis: --seeds N says how many seeds each point has"),
        (["device=cpu,cuda"], "--grid device: a simulation does not use it"),
        ([], "a sweep needs an axis at least: --grid key.path=value,value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_it(base: Experiment, texts: list[str], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        Grid.read(texts).points(base)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


def test_values_of_which_none_goes_with_the_others_are_a_mistake(base: Experiment) -> None:
    with pytest.raises(UsageError, match="no point of the grid is possible"):
        Grid.read(["transfer.mode=push", "transfer.reserve=after_prefill"]).points(base.with_(transfer={"mode": "pull"}))


def test_seeds_and_runs_have_bounds(base: Experiment) -> None:
    grid = Grid.read(["workload.rate=4,8"])
    with pytest.raises(UsageError, match="--seeds 0: each point needs a seed at least"):
        plan_sweep(base, grid, 0)
    with pytest.raises(UsageError, match="2 points x 5 seeds are 10 runs, more than 9: take fewer values, or give --force"):
        plan_sweep(base, grid, 5, most=9)
    assert len(plan_sweep(base, grid, 5, most=None).runs) == 10


def test_all_points_have_the_same_seeds_and_so_the_same_requests(base: Experiment) -> None:
    sweep = plan_sweep(base, Grid.read(["policy=random,round_robin"]), 3)
    assert [run.seed for run in sweep.runs] == [7, 8, 9, 7, 8, 9]
    assert len({run.key for run in sweep.runs}) == 6
