"""What measured instances do and others do not: engines of one machine slow each other, and KV is asked for between steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.cost.profile import Beside, save_instance_profile
from pdlab.result import Result
from pdlab.sim.build import simulate
from pdlab.sim.moves import TransferMode
from pdlab.spec import Experiment
from pdlab.types import Role
from tests.cost.test_measured import PROFILE
from tests.sim.small_world import Linear, small_world, workload


def run(folder: Path, beside: Beside, hosts: tuple[str, ...]) -> Result:
    """As many mixed instances as hosts, each with one request of 100 tokens and 50 of output at the same time."""
    save_instance_profile(PROFILE.model_copy(update={"beside": beside}), folder / "profile.json")
    plan = {
        "model": "smollm2-135m",
        "workload": {"source": "synthetic", "requests": len(hosts), "prompt": 100, "output": 50, "arrival": "constant", "rate": 1e9},
        "cluster": {"instances": [{"role": "mixed", "hardware": "profile.json", "host": host} for host in hosts]},
        "policy": "round_robin",
        "base_dir": str(folder),
    }
    return simulate(Experiment.parse(plan, "test"))


def seconds(result: Result) -> tuple[float, float]:
    """(of the prompts, of the decodes)"""
    rows = result.records.frame()
    return (rows.first_token_s - rows.prefill_start_s).max(), (rows.finish_s - rows.first_token_s).max()


def test_engines_of_one_machine_slow_each_other(tmp_path: Path) -> None:
    prefills, decodes = Beside(prefill_beside_prefill_s=0.05), Beside(decode_beside_decode_s=0.01)
    alone = seconds(run(tmp_path, prefills, ("a",)))
    assert seconds(run(tmp_path, prefills, ("a", "b"))) == pytest.approx(alone)
    assert seconds(run(tmp_path, prefills, ("a", "a"))) == pytest.approx((alone[0] + 0.05, alone[1]), rel=0.02)
    assert seconds(run(tmp_path, decodes, ("a", "b"))) == pytest.approx(alone)
    assert seconds(run(tmp_path, decodes, ("a", "a"))) == pytest.approx((alone[0], alone[1] + 49 * 0.01), rel=0.02)


def test_each_further_engine_slows_them_again(tmp_path: Path) -> None:
    beside = Beside(decode_beside_decode_s=0.01)
    alone, three = seconds(run(tmp_path, beside, ("a",))), seconds(run(tmp_path, beside, ("a", "a", "a")))
    assert three[1] == pytest.approx(alone[1] + 49 * 0.02, rel=0.02)


def test_a_pull_begins_when_no_step_is_under_way() -> None:
    cost = Linear(a=0.1, b=0.0, c=0.05, d=0.0, e=0.0)  # prefills of 0.1 s, steps of 0.05 s
    members = (("p", Role.PREFILL), ("d", Role.DECODE))
    starts = {}
    for between_steps in (False, True):
        # The first decodes from 0.1 s on in steps of 0.05 s; the second's prompt is computed at 0.12 + 0.1 = 0.22 s.
        work = workload([0.0, 0.12], 32, 20)
        world = small_world(work, members=members, cost=cost, transfer=TransferMode(between_steps=between_steps, ask_s=0.001))
        world.run()
        rows = world.records.frame().set_index("request_id")
        first_step_s = rows.decode_start_s[0] % 0.05
        starts[between_steps] = rows.transfer_start_s[1]
        assert rows.handoff_s[1] == pytest.approx(0.22, abs=1e-3)
    assert starts[False] == pytest.approx(0.22, abs=1e-3)
    assert starts[True] == pytest.approx(0.25 + first_step_s, abs=1e-3)
