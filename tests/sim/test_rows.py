"""What the row of a request says that did not go straight through."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import simpy

from pdlab.core.policy import Policy
from pdlab.core.router_limits import Limits
from pdlab.core.types import Request, Role
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.study import FaultSpec
from pdlab.sim import faults
from pdlab.sim.kv_size import KvSize
from pdlab.sim.moves import TransferMode
from tests.support.small_world import Linear, small_world, workload

ONE_EACH = (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))
STEP_S = 0.01


class Home(Policy):
    """Decodes where the prompt was computed."""

    def dispatch(self, request: Request, cluster: Cluster) -> Instance:
        return cluster.prefill[-1]

    def handoff(self, request: Request, cluster: Cluster) -> Instance:
        return cluster.prefill[-1]


class Even(Linear):
    """Every decode step takes as long."""

    def __init__(self) -> None:
        super().__init__(c=STEP_S, d=0.0, e=0.0)


@pytest.mark.parametrize("horizon", [1, 1 << 30])
def test_one_that_expires_has_the_tokens_that_its_client_got(horizon: int) -> None:
    world = small_world(workload([0.0, 0.3], 100, 1500), cost=Even(), limits=Limits(request_timeout_s=5.0), horizon=horizon)
    world.run()
    frame = world.records.frame()
    assert (frame.status == "expired").all()
    expected = 1 + (frame.finish_s - frame.decode_start_s) // STEP_S
    np.testing.assert_array_equal(frame.output_tokens, expected)
    assert expected.between(400, 600).all()


def test_one_that_is_given_up_has_the_tokens_of_all_its_attempts() -> None:
    world = small_world(workload([0.0], 100, 1500), cost=Even(), limits=Limits(max_attempts=2))
    faults.plan(world, [FaultSpec(at_s=2.0, kill="decode-0"), FaultSpec(at_s=5.0, kill="decode-1")])
    world.run()
    (row,) = world.records.frame().itertuples()
    assert row.status == "failed" and row.attempts == 2
    second = 1 + (5.0 - row.decode_start_s) // STEP_S
    assert 2.0 < row.prefill_start_s < row.decode_start_s < 5.0, "the second attempt's"
    assert row.first_token_s < 0.1, "the first attempt's"
    assert row.output_tokens == pytest.approx(second + 2.0 / STEP_S, abs=3)


def test_a_run_that_is_broken_off_counts_the_tokens_of_a_run_of_steps_under_way() -> None:
    world = small_world(workload([0.0], 100, 1500), cost=Even(), report_period_s=100.0)
    world.env.process(_stop(world.env))
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.interrupt()
    (row,) = world.records.frame().itertuples()
    assert row.status == "decode" and math.isnan(row.finish_s)
    assert row.output_tokens == 1 + (3.0 - row.decode_start_s) // STEP_S


def _stop(env: simpy.Environment) -> Iterator[simpy.Event]:
    yield env.timeout(3.0)
    raise KeyboardInterrupt


def test_one_that_nobody_had_room_for_was_handed_to_nobody() -> None:
    """The second would fit beside the first only when that one had ended."""
    world = small_world(
        workload([0.0, 0.1], 300, 150),
        cost=Even(),
        members=ONE_EACH,
        kv_blocks=30,
        limits=Limits(request_timeout_s=0.5),
    )
    world.run()
    frame = world.records.frame().set_index("request_id")
    waited = frame.loc[1]
    assert waited.status == "expired" and waited.prefill_instance == "prefill-0"
    assert waited[["handoff_s", "transfer_start_s", "decode_start_s", "decode_instance"]].isna().all()
    assert waited.output_tokens == 1


def test_one_that_stays_where_it_was_computed_was_handed_off_there() -> None:
    members = (("mixed-0", Role.MIXED), ("prefill-0", Role.PREFILL))
    world = small_world(workload([0.0], 100, 20), policy=Home(), members=members)
    world.run()
    (row,) = world.records.frame().itertuples()
    assert (row.prefill_instance, row.decode_instance) == ("prefill-0", "prefill-0")
    assert row.handoff_s == row.first_token_s and math.isnan(row.transfer_start_s)


def test_a_prompt_that_went_to_a_dead_instance_was_an_attempt() -> None:
    world = small_world(workload([1.1], 100, 20), members=(("m-0", Role.MIXED), ("m-1", Role.MIXED)), detect_s=0.5)
    faults.plan(world, [FaultSpec(at_s=1.0, kill="m-0")])
    world.run()
    (row,) = world.records.frame().itertuples()
    assert row.status == "done" and row.attempts == 2
    assert row.prefill_instance == "m-1" and row.dispatched_s == pytest.approx(1.6), "0.5 s after it was asked in vain"


@pytest.mark.parametrize("granularity", ["request", "layer"])
def test_bytes_that_never_came_are_not_counted(granularity: str) -> None:
    """The prefill instance dies while the KV moves; it moves again, whole, from the other one."""
    mode, size = TransferMode("push", granularity), KvSize(1e6)
    world = small_world(workload([0.0], 1000, 20), transfer=mode, kv_size=size, gbytes_per_s=1.0)
    faults.plan(world, [FaultSpec(at_s=0.5, kill="prefill-0")])
    world.run()
    (row,) = world.records.frame().itertuples()
    assert row.status == "done" and row.attempts == 2
    assert row.transfer_bytes == pytest.approx(1000e6, rel=2e-3)
