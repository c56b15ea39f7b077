"""Answers of a decode instance that go through the one that prefilled."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pdlab.core.types import Role
from pdlab.experiment.study import FaultSpec
from pdlab.policies.round_robin import RoundRobin
from pdlab.sim import faults
from pdlab.sim.moves import TransferMode
from pdlab.sim.world import World
from tests.support.small_world import small_world, workload

MEMBERS = (("prefill-0", Role.PREFILL), ("prefill-1", Role.PREFILL), ("decode-0", Role.DECODE))


def run(mode: TransferMode, *events: dict[str, object], requests: int = 6) -> tuple[World, pd.DataFrame]:
    world = small_world(workload(np.arange(requests) * 0.1, 300, 200), members=MEMBERS, transfer=mode, policy=RoundRobin(), latency_s=0.005)
    faults.plan(world, [FaultSpec(**event) for event in events])  # type: ignore[arg-type]
    world.run()
    assert world.leaked_blocks == 0
    return world, world.records.frame()


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_tokens_come_one_way_later(first_token: str) -> None:
    straight_world, straight = run(TransferMode(first_token=first_token))
    relayed_world, relayed = run(TransferMode(first_token=first_token, via_prefill=True))
    way_s = straight_world.network.path("decode-0", "prefill-0").latency_s
    assert way_s > 0.0
    first_s = way_s if first_token == "decode" else 0.0
    np.testing.assert_allclose(relayed.first_token_s - straight.first_token_s, first_s, atol=1e-12)
    np.testing.assert_allclose(relayed.finish_s - straight.finish_s, way_s, rtol=1e-6)
    assert relayed_world.gaps.count == straight_world.gaps.count
    later_s = relayed_world.gaps.sum_s - straight_world.gaps.sum_s
    assert later_s == pytest.approx((way_s - first_s) * len(straight), rel=1e-6, abs=1e-12)


def test_what_it_passed_on_goes_on_elsewhere_when_the_prefill_instance_dies() -> None:
    death = {"at_s": 1.0, "kill": "prefill-0"}
    _, straight = run(TransferMode(), death)
    world, relayed = run(TransferMode(via_prefill=True), death)
    assert (straight.attempts == 1).all(), "they had left it already"
    assert (relayed.status == "done").all()
    lost = relayed[relayed.attempts > 1]
    assert 0 < len(lost) < len(relayed) and set(lost.prefill_instance) == {"prefill-1"}
    made_again = world.gaps.count - 6 * 199  # the step under way ends, as at every abort, though nobody gets its tokens
    assert 0 <= made_again <= len(lost)
