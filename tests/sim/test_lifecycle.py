"""Instances that come, switch and go because a policy says so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdlab import Experiment, simulate
from pdlab.core.types import InstanceState, Role, Scale
from pdlab.core.view import Cluster, Instance
from pdlab.policies.round_robin import RoundRobin
from tests.support.small_world import small_world, workload


class SwitchOnce(RoundRobin):
    tick_s = 0.5

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        last = cluster.decode[-1]
        return [(last, Role.PREFILL)] if 1.0 <= cluster.now < 1.4 and last.name == "decode-1" else []


def test_a_switch_drains_then_costs_its_time_then_serves_the_other_role() -> None:
    world = small_world(workload([k * 0.05 for k in range(200)], 200, 100), policy=SwitchOnce(), switch_s=2.0)
    seen: list[tuple[float, InstanceState, Role, int]] = []
    watched = "decode-1"

    def look(*_: object) -> None:
        x = world.router.by_name[watched]
        seen.append((world.env.now, x.state, x.role, len(world.instances[watched].scheduler.running)))

    world.teller.on_event = look
    world.run()
    switching = [(at, running) for at, state, _, running in seen if state is InstanceState.SWITCHING]
    back = next(at for at, state, role, _ in seen if state is InstanceState.READY and role is Role.PREFILL)
    drained = next(at for at, running in switching if running == 0)
    assert back - drained == pytest.approx(2.0, abs=0.1)
    frame = world.records.frame()
    assert (frame.status == "done").all()
    assert "decode-1" in set(frame[frame.arrival_s > back].prefill_instance), "it prefills now"
    assert "decode-1" not in set(frame[frame.arrival_s > switching[0][0] + 0.1].decode_instance)


def test_scaling_starts_and_stops_instances_within_the_bounds(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "grow.py").write_text(
        "from pdlab import Policy\nfrom pdlab.core.types import Role, Scale\n\n\nclass Grow(Policy):\n    tick_s = 1.0\n\n"
        "    def resize(self, cluster):\n        return [Scale(1 if cluster.now < 8 else -1, Role.DECODE)]\n"
    )
    experiment = Experiment.parse(
        {
            "base_dir": tmp_path,
            "model": "llama-3.1-8b",
            "workload": {"source": "synthetic", "requests": 300, "rate": 10, "prompt": 500, "output": 100},
            "cluster": {
                "instances": [{"role": role, "count": 1, "hardware": "h100-sxm"} for role in ("prefill", "decode")],
                "autoscale": {"enabled": True, "min": 2, "max": 4, "start_s": 2.0},
            },
            "policy": "grow.py:Grow",
        }
    )
    result = simulate(experiment)
    up_s = {x["name"]: x["up_s"] for x in result.summary["instances"]}
    names = set(result.records.instances)
    assert names == {"prefill-0", "decode-0", "decode-1", "decode-2"}
    assert (result.requests.status == "done").all()
    assert result.summary["leaked_blocks"] == 0
    served = result.requests.groupby("decode_instance", observed=True).arrival_s
    assert served.min()["decode-1"] >= 3.0, "it takes start_s to come up"
    assert served.max()["decode-0"] > served.max()["decode-2"], "the last to come is the first to go"
    assert up_s["decode-2"] < up_s["decode-0"]
