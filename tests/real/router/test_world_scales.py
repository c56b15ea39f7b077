"""A policy scales up and down: the instances that it asks for start, serve, drain and leave, in the live world as in the simulated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pdlab.core.policy import Policy
from pdlab.core.types import Dispatch, Handoff, InstanceState, Role, Scale, Stop
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.replay.log import read, replay
from pdlab.sim import simulate
from tests.real.router.test_world_as_simulated import decisions, live
from tests.support.virtual_cluster import Run, played, small

pytestmark = pytest.mark.usefixtures("no_front_end")


@dataclass
class Tide(Policy):
    """A decode instance for every ten requests that live. For tests."""

    tick_s: float | None = 0.5

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        wanted, there = 1 + len(cluster.live) // 10, len(cluster.decode)
        return [] if wanted == there else [Scale(1 if wanted > there else -1, Role.DECODE)]


def tide() -> Experiment:
    return small(f"{__file__}:Tide", cluster={"autoscale": {"enabled": True, "min": 2, "max": 5, "start_s": 1.2}})


def test_the_live_world_scales_as_the_simulated_one(tmp_path: Path) -> None:
    experiment, kinds = tide(), (Dispatch, Handoff, Scale, Stop)
    simulate(experiment, trace_events=tmp_path / "sim")
    live(experiment, tmp_path / "live")
    ours, theirs = decisions(tmp_path / "live", kinds), decisions(tmp_path / "sim", kinds)
    assert {type(action) for _, action in ours} == set(kinds)
    assert [action for _, action in ours] == [action for _, action in theirs]
    np.testing.assert_allclose([at_s for at_s, _ in ours], [at_s for at_s, _ in theirs], rtol=0, atol=1e-6)


def test_who_is_stopped_ends_what_it_decodes_and_then_leaves(tmp_path: Path) -> None:
    experiment = tide()

    async def play(made: Run) -> None:
        for _ in range(10):
            made.submit(400, 300)
        await made.until(lambda: "decode-1" in made.rack.instances)
        last = [made.submit(400, 1200) for _ in range(2)]
        instance = made.world.router.by_name["decode-1"]
        await made.until(lambda: instance.state is InstanceState.DRAINING)
        assert made.rack.instances["decode-1"].jobs and not any(client.ended for client in last)
        await made.until(lambda: instance.state is InstanceState.GONE)

    made = played(experiment, play, tmp_path / "log")
    assert all(client.done for client in made.clients.values())
    assert made.world.lines.book.records.column("attempts").max() == 1
    head, entries = read(tmp_path / "log")
    assert replay(entries, router(experiment, hash_tokens=head.hash_tokens))[1] is None
