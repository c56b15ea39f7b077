"""Simulated time in which nothing happens costs nothing, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab.core.policy import Policy
from pdlab.core.types import Event, Role, Scale, Tick
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.study import FaultSpec
from pdlab.policies.least_loaded import LeastLoaded
from pdlab.policies.load import build, names
from pdlab.sim import faults, simulate
from pdlab.sim.build import world as world_of
from pdlab.sim.periodic import Periodic
from pdlab.sim.world import World
from pdlab.workload.base import Workload
from tests.support.small_world import small_world, workload

DAY_S = 86_400.0
QUICK = {"name": "autoscale_sla", "tick_s": 0.7}
CASE = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "sim" / "sim_burst_sparse.yaml"


def steps(world: World) -> int:
    """Run it; how many events SimPy had."""
    world.run()
    assert world.leaked_blocks == 0
    return next(world.env._eid)


def sparse(bursts: Sequence[float]) -> Workload:
    arrivals = [at + gap for at in bursts for gap in (0.0, 0.01, 0.4)]
    return workload(arrivals, [300 + 7 * i for i in range(len(arrivals))], 50)


@pytest.mark.parametrize("policy", list(names()))
def test_41_days_take_as_long_as_three_requests(policy: str) -> None:
    near = steps(small_world(workload([0.0, 60.0, 120.0], 300, 50), policy=build(policy, Path())))
    far = steps(small_world(workload([0.0, 11 * DAY_S, 41 * DAY_S], 300, 50), policy=build(policy, Path())))
    assert far < near + 100


@pytest.mark.parametrize("delay_s", [0.0, 1.7])
@pytest.mark.parametrize("policy", ["least_loaded", "llumnix", "freeness", "xllm_slo_aware", "settled_roles", "slo_headroom", QUICK])
@pytest.mark.parametrize("members", [None, (("m-0", Role.MIXED), ("m-1", Role.MIXED))], ids=["PD", "mixed"])
def test_what_comes_after_is_as_if_every_tick_had_been(delay_s: float, policy: Any, members: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[World, int]:
        options = {} if members is None else {"members": members}
        work = sparse([0.0, 71.3, 200.0, 201.55, 300.05])
        world = small_world(work, policy=build(policy, Path()), report_delay_s=delay_s, report_period_s=0.3, **options)
        return world, steps(world)

    skipping, few = run()
    monkeypatch.setattr(Periodic, "_at_rest", lambda *_: 1)
    ticking, many = run()
    assert few < many / 3
    a, b = skipping.records.frame(), ticking.records.frame()
    for name in a.columns:
        if a[name].dtype.kind == "f":
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6, err_msg=name)
        else:
            assert list(a[name].astype(object).fillna("")) == list(b[name].astype(object).fillna("")), name
    for name, x in skipping.instances.items():
        other = ticking.instances[name]
        assert (x.requests, x.role, x.switches) == (other.requests, other.role, other.switches)
        mine, all_of_them = (int((w.samples.column("instance") == w.instances[name].index).sum()) for w in (skipping, ticking))
        assert abs(mine + x.reports_at_rest - all_of_them) <= 1


def sparse_experiment(**rest: Any) -> Experiment:
    return Experiment.parse(
        {
            "model": "llama-3.1-8b",
            "workload": {"source": "synthetic", "requests": 4, "rate": 0.002, "prompt": 700, "output": 60},
            "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "hardware": "h100-sxm"}]},
            **rest,
        }
    )


def test_the_summary_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def summary() -> dict[str, Any]:
        found: dict[str, Any] = simulate(sparse_experiment()).summary
        del found["run"]
        return found

    skipping = summary()
    monkeypatch.setattr(Periodic, "_at_rest", lambda *_: 1)
    assert skipping == summary()


class Clocked(Policy):
    """Scales down when nothing has come for a minute: only time tells it."""

    tick_s = 1.0

    def __init__(self, rests: bool = False) -> None:
        self.rests = rests
        self.ticks = 0

    def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
        self.ticks += 1
        idle = cluster.now > 60.0 and not cluster.live and sum(x.ready for x in cluster.instances) > 1
        return [Scale(-1, Role.MIXED)] if idle else []


def test_a_policy_that_may_act_on_time_alone_is_asked_at_every_tick() -> None:
    members = (("m-0", Role.MIXED), ("m-1", Role.MIXED))
    policy = Clocked()
    world = small_world(workload([0.0, 500.0], 300, 5), policy=policy, members=members)
    world.router.rebalance.autoscale = (1, 2)
    gone_s: list[float] = []
    world.lifecycle.stop, stop = lambda action: (gone_s.append(world.env.now), stop(action)), world.lifecycle.stop  # type: ignore
    world.teller.perform.update({type_: world.lifecycle.stop for type_ in world.teller.perform if type_.__name__ == "Stop"})
    world.run()
    assert policy.ticks >= 500 and gone_s == [61.0]
    resting = Clocked(rests=True)
    small_world(workload([0.0, 40.0], 300, 5), policy=resting, members=members).run()
    assert resting.ticks < 15


def test_one_that_observes_sees_every_tick_unless_it_says_that_it_rests() -> None:
    class Counts(LeastLoaded):
        ticks = 0

        def observe(self, event: Event, cluster: Cluster) -> None:
            self.ticks += isinstance(event, Tick)

    policy = Counts()
    small_world(workload([0.0, 300.0], 300, 5), policy=policy).run()
    assert policy.ticks >= 300


def test_a_fault_in_the_quiet_happens_at_its_time() -> None:
    world = small_world(workload([0.0, 5000.0], 300, 5))
    faults.plan(world, [FaultSpec(at_s=1000.0, kill="decode-0", restart_after_s=50.0), FaultSpec(at_s=2000.0, lose_reports="decode-1")])
    heard: list[tuple[float, str]] = []
    tell = world.tell
    world.tell = lambda event: (heard.append((world.env.now, type(event).__name__)), tell(event))[1]  # type: ignore
    world.run()
    assert next(at for at, kind in heard if kind == "Left") == 1003.0, "when its lease has run out"
    assert [at for at, kind in heard if kind == "Joined"] == [1050.0]
    evicted = [at for at, kind in heard if kind == "Left"][1]
    assert 2019.0 < evicted < 2024.0, "silent for lease, probes and suspicion"
    assert (world.records.frame().status == "done").all()


@pytest.mark.skipif(not CASE.is_file(), reason="../shared is not here")
def test_the_case_of_bursts_holds() -> None:
    experiment = Experiment.load(CASE)
    from pdlab.workload.spec import build as build_workload

    world = world_of(experiment, build_workload(experiment.workload, experiment.seed, experiment.base_dir))
    assert steps(world) < 200 * 40


@pytest.mark.parametrize("load", ["constant", "trend"])
def test_an_autoscaler_rests_when_nobody_is_too_many(load: str) -> None:
    def run(last_s: float) -> int:
        policy = build({"name": "autoscale_sla", "load": load}, Path())
        world = small_world(workload([0.0, last_s / 2, last_s], 300, 50), policy=policy)
        world.router.rebalance.autoscale = (1, 4)
        return steps(world)

    assert run(41 * DAY_S) < run(300.0) + 200
