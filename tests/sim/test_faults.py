"""Instances die, links break, reports are lost: what becomes of the requests."""

from __future__ import annotations

import numpy as np
import pytest

from pdlab.core.policy import Policy
from pdlab.core.router_limits import Limits
from pdlab.core.types import InstanceState, Left, Role
from pdlab.core.view import Cluster, Instance
from pdlab.cost import build, hardware, model
from pdlab.cost.spec import CostSpec
from pdlab.experiment.study import FaultSpec
from pdlab.policies.random import Random
from pdlab.sim import faults
from pdlab.sim.moves import TransferMode
from pdlab.sim.world import World
from tests.support.small_world import Linear, small_world, workload

ONE_EACH = (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))


def run(*events: dict[str, object], requests: int = 20, output: int = 200, **options: object) -> World:
    world = small_world(workload(np.arange(requests) * 0.1, 300, output), **options)  # type: ignore[arg-type]
    faults.plan(world, [FaultSpec(**event) for event in events])  # type: ignore[arg-type]
    world.run()
    assert world.leaked_blocks == 0
    return world


def test_tokens_already_sent_are_not_made_again_after_a_decode_instance_died() -> None:
    world = run({"at_s": 1.0, "kill": "decode-0", "restart_after_s": 3.0})
    frame = world.records.frame()
    assert (frame.status == "done").all()
    retried = frame[frame.attempts > 1]
    assert len(retried) > 2
    made = sum(x.decode_tokens for x in [*world.lifecycle.retired, *world.instances.values()])
    assert made <= 20 * 199, "no token is decoded twice"
    assert world.gaps.count == 20 * 199, "and the client sees every gap once"


def test_a_prefill_instance_that_dies_is_replaced_by_the_other() -> None:
    frame = run({"at_s": 0.45, "kill": "prefill-0"}).records.frame()
    assert (frame.status == "done").all()
    assert set(frame[frame.arrival_s > 1.0].prefill_instance) == {"prefill-1"}


def test_the_other_role_serves_both_when_a_role_is_gone() -> None:
    world = run({"at_s": 0.55, "kill": "decode-0"}, members=ONE_EACH)
    frame = world.records.frame()
    assert (frame.status == "done").all()
    assert set(frame[frame.arrival_s > 1.2].decode_instance) == {"prefill-0"}


TWO_MIXED = (("m-0", Role.MIXED), ("m-1", Role.MIXED))


def departures(world: World) -> list[tuple[float, bool]]:
    """Run it: when the router is told that one has left, and whether it has died."""
    told: list[tuple[float, bool]] = []

    def hear(event: object, _: object) -> None:
        if isinstance(event, Left):
            told.append((round(world.env.now, 6), event.died))

    world.teller.on_event = hear
    world.run()
    assert world.leaked_blocks == 0
    return told


@pytest.mark.parametrize(("asked_s", "known", "attempts"), [(1.4, (1.5, True), 2), (5.0, (4.0, False), 1)], ids=["who asks", "its lease"])
def test_who_dies_at_rest_is_found_dead_by_who_asks_or_when_its_lease_has_run_out(
    asked_s: float, known: tuple[float, bool], attempts: int
) -> None:
    """It was renewed last at 1 s."""
    world = small_world(workload([asked_s], 100, 20), members=TWO_MIXED, detect_s=0.1)
    faults.plan(world, [FaultSpec(at_s=1.1, kill="m-0")])
    assert departures(world)[0] == known
    row = world.records.frame().iloc[0]
    assert (row.status, row.attempts, row.prefill_instance) == ("done", attempts, "m-1")


def test_a_prompt_whose_decode_instance_is_dead_is_an_attempt() -> None:
    members = (*ONE_EACH, ("decode-1", Role.DECODE))
    world = small_world(workload([1.4], 100, 20), members=members, detect_s=0.1)
    faults.plan(world, [FaultSpec(at_s=1.1, kill="decode-0")])
    ((at_s, died),) = departures(world)
    row = world.records.frame().iloc[0]
    assert died and at_s > 1.5, "when the prompt was computed"
    assert (row.status, row.attempts, row.decode_instance) == ("done", 2, "decode-1")


def test_who_comes_back_before_anybody_has_missed_it_has_left_first() -> None:
    world = small_world(workload([2.0], 100, 20), members=TWO_MIXED)
    faults.plan(world, [FaultSpec(at_s=1.1, kill="m-0", restart_after_s=0.5)])
    assert departures(world) == [(1.6, True)]
    assert world.instances["m-0"].spec.incarnation == 1 and (world.records.frame().attempts == 1).all()


def test_who_stands_still_for_less_than_its_lease_is_late_with_what_it_has() -> None:
    usual = run(requests=1, members=(("m-0", Role.MIXED),)).records.frame().iloc[0]
    world = small_world(workload([0.0], 300, 200), members=(("m-0", Role.MIXED),))
    faults.plan(world, [FaultSpec(at_s=usual.finish_s / 2, stop="m-0", for_s=1.5)])
    assert departures(world) == []
    row = world.records.frame().iloc[0]
    assert row.attempts == 1 and row.finish_s == pytest.approx(usual.finish_s + 1.5)


def test_who_stands_still_for_longer_than_its_lease_has_lost_its_place_and_comes_back_as_another() -> None:
    """What it served is made elsewhere, and that was no attempt."""
    world = small_world(workload([1.0, 9.0], 300, 200), members=TWO_MIXED, limits=Limits(max_attempts=1))
    faults.plan(world, [FaultSpec(at_s=1.1, stop="m-0", for_s=6.0)])
    assert departures(world) == [(4.0, False)]
    row = world.records.frame().iloc[0]
    assert (row.status, row.attempts, row.prefill_instance) == ("done", 2, "m-1") and 4.0 < row.finish_s < 7.0
    assert world.instances["m-0"].spec.incarnation == 1
    assert world.instances["m-0"].joined_s == pytest.approx(7.1)


def test_a_process_that_is_killed_while_it_stands_still_starts_anew() -> None:
    world = small_world(workload([1.0, 3.0], 300, 200), members=TWO_MIXED)
    faults.plan(world, [FaultSpec(at_s=1.1, stop="m-0", for_s=9.0), FaultSpec(at_s=1.5, kill="m-0", restart_after_s=0.7)])
    departures(world)
    assert world.instances["m-0"].spec.incarnation == 1 and world.instances["m-0"].longer == 1.0


def test_everything_gone_is_said_at_once() -> None:
    frame = run(
        {"at_s": 0.5, "kill": "decode-0"}, {"at_s": 0.6, "kill": "prefill-0"}, members=ONE_EACH, limits=Limits(request_timeout_s=30.0)
    ).records.frame()
    late = frame[frame.arrival_s > 1.3]
    assert (late.status == "rejected").all()
    assert (late.finish_s == late.arrival_s).all()
    assert set(late.reason) == {"no instance is ready"}
    assert (frame.finish_s - frame.arrival_s).max() <= 31.0


def test_a_cut_link_stalls_transfers_until_their_deadline() -> None:
    limits = Limits(transfer_timeout_s=2.0)
    frame = run({"at_s": 0.5, "cut_link": "decode-0", "for_s": 20.0}, limits=limits).records.frame()
    assert (frame.status == "done").all()
    stalled = frame[frame.attempts > 1]
    assert len(stalled) > 0
    assert set(stalled.decode_instance) == {"decode-1"}, "stalled ones went elsewhere after their deadline"


MIXED_MODES = [TransferMode(), TransferMode("push", "request"), TransferMode("push", "chunk"), TransferMode("push", "layer")]
SLOW = {"gbytes_per_s": 1.0, "limits": Limits(transfer_timeout_s=2.0)}


@pytest.mark.parametrize("by_s", [0.01, None, 100.0])
@pytest.mark.parametrize("mode", MIXED_MODES, ids=lambda mode: f"{mode.mode} by {mode.granularity}")
def test_what_is_under_way_between_two_that_are_cut_apart_goes_elsewhere(mode: TransferMode, by_s: float | None) -> None:
    """Transfers take 40 ms, and one is under way."""
    reserve = mode.mode == "push"
    events = {"at_s": 1.02, "cut": ["prefill-0", "decode-0"], "by_s": by_s}
    world = run(events, requests=60, transfer=mode, reserve_first=reserve, policy=Random(), **SLOW)
    frame = world.records.frame()
    assert (frame.status == "done").all()
    pairs = {*zip(frame.prefill_instance[frame.arrival_s > 1.0], frame.decode_instance[frame.arrival_s > 1.0], strict=True)}
    assert ("prefill-0", "decode-0") not in pairs
    assert {("prefill-0", "decode-1"), ("prefill-1", "decode-0")} <= pairs
    assert list(world.notices)


def test_two_that_were_cut_apart_find_each_other_again() -> None:
    events = {"at_s": 0.0, "cut": ["prefill-0", "decode-0"], "for_s": 8.0}
    frame = run(events, members=ONE_EACH, requests=200).records.frame()
    assert (frame.attempts == 1).all()
    assert set(frame[frame.arrival_s < 7.5].decode_instance) == {"prefill-0"}, "it decodes what it has prefilled"
    assert set(frame[frame.arrival_s > 16.0].decode_instance) == {"decode-0"}


@pytest.mark.parametrize("at_s", [0.0, 0.72, 0.75])
def test_a_migration_between_two_that_are_cut_apart_leaves_the_request_where_it_is(at_s: float) -> None:
    """From before it begins; in a stage of it."""

    class Move(Policy):
        tick_s = 0.7

        def migrate(self, cluster: Cluster) -> list[tuple[int, Instance]]:
            return [(live.request.id, cluster.decode[1]) for live in cluster.live.values() if live.decode is cluster.decode[0]]

    world = small_world(workload([0.0], 3000, 200), policy=Move(), gbytes_per_s=5.0)
    faults.plan(world, [FaultSpec(at_s=at_s, cut=("decode-0", "decode-1"))])
    world.run()
    row = world.records.frame().iloc[0]
    assert (row.status, row.decode_instance, row.migrations, row.attempts) == ("done", "decode-0", 0, 1)
    assert list(world.notices) == ["no KV from decode-0 to decode-1 for the next 5 s: decode-0 does not answer"]
    assert world.leaked_blocks == 0


def test_a_slow_link_slows_transfers() -> None:
    normal = run().records.frame().transfer_s.max()
    slow = run({"at_s": 0.0, "slow_link": "decode-0", "factor": 0.1}).records.frame()
    assert slow[slow.decode_instance == "decode-0"].transfer_s.min() > 5 * normal
    assert slow[slow.decode_instance == "decode-1"].transfer_s.max() == pytest.approx(normal)


@pytest.mark.parametrize("horizon", [1, 1 << 30])
@pytest.mark.parametrize(
    ("begin_s", "for_s", "later_s"),
    [
        (10.0, 1.0, 0.0),  # all is over by then
        (0.05, 0.02, 0.01),  # in the middle of the prefill
        (0.31, 0.2, 0.1),  # from the middle of a decode step on, over four of them
        (0.31, None, 0.59 - 0.3),  # to the end, which would have come at 0.6 s
    ],
)
def test_a_slow_instance_computes_at_its_share_of_speed(begin_s: float, for_s: float | None, later_s: float, horizon: int) -> None:
    """A prefill of 0.1 s, and ten steps of 0.05 s."""
    ends = []
    for factor in (None, 0.5):
        cost = Linear(a=0.1, b=0.0, c=0.05, d=0.0, e=0.0)
        world = small_world(workload([0.0], 32, 11), members=(("m", Role.MIXED),), cost=cost, horizon=horizon)
        if factor is not None:
            faults.plan(world, [FaultSpec(at_s=begin_s, slow="m", factor=factor, for_s=for_s)])
        world.run()
        ends.append(world.records.frame().finish_s[0])
    assert ends[0] == pytest.approx(0.6)
    assert ends[1] - ends[0] == pytest.approx(later_s)


@pytest.mark.parametrize("horizon", [1, 1 << 30])
@pytest.mark.parametrize(
    ("factor", "decode_factor", "begin_s", "later_s"),
    [
        (1.0, 0.5, 0.0, 0.5),
        (0.5, 1.0, 0.0, 0.1),
        (0.5, None, 0.0, 0.6),
        (0.5, 1.0, 0.05, 0.05),
        (0.5, 1.0, 0.31, 0.0),
        (1.0, 0.5, 0.31, 0.29),
    ],
)
def test_decodes_may_be_slowed_apart_from_prefills(
    factor: float, decode_factor: float | None, begin_s: float, later_s: float, horizon: int
) -> None:
    """A prefill of 0.1 s, and ten steps of 0.05 s, as above."""
    cost = Linear(a=0.1, b=0.0, c=0.05, d=0.0, e=0.0)
    world = small_world(workload([0.0], 32, 11), members=(("m", Role.MIXED),), cost=cost, horizon=horizon)
    faults.plan(world, [FaultSpec(at_s=begin_s, slow="m", factor=factor, decode_factor=decode_factor)])
    world.run()
    assert world.records.frame().finish_s[0] == pytest.approx(0.6 + later_s)


def test_an_instance_that_comes_back_while_its_machine_is_slow_is_slow() -> None:
    events = ({"at_s": 0.5, "kill": "decode-0", "restart_after_s": 1.0}, {"at_s": 0.2, "slow": "decode-0", "factor": 0.1})
    frame = run(*events, requests=40, members=ONE_EACH).records.frame()
    usual = run(events[0], requests=40, members=ONE_EACH).records.frame()
    assert frame.tpot_s[39] > 5 * usual.tpot_s[39]


def test_an_instance_whose_reports_are_lost_is_suspect_not_dead() -> None:
    world = small_world(workload(np.arange(100) * 0.1, 300, 50))
    faults.plan(world, [FaultSpec(at_s=1.0, lose_reports="decode-0", for_s=8.0)])
    states = []
    world.teller.on_event = lambda *_: states.append(world.router.by_name["decode-0"].state)
    world.run()
    frame = world.records.frame()
    assert (frame.status == "done").all()
    assert (frame.attempts == 1).all(), "nothing it serves is disturbed"
    assert InstanceState.SUSPECT in states
    assert states[-1] is InstanceState.READY


def test_large_decode_batches_are_bound_by_arithmetic() -> None:
    """Reading 16 GB of weights takes as long as the arithmetic of a few hundred tokens on an H100."""
    price = build(CostSpec(), model("llama-3.1-8b"), hardware("h100-sxm"))
    bound = [price.decode_is_compute_bound(n) for n in range(1, 2000)]
    assert 100 < bound.index(True) < 1000
    assert all(bound[bound.index(True) :])


def test_a_prompt_that_is_computed_for_a_dead_decode_instance_is_not_sent() -> None:
    """The abort waits for the step's end; what that step completes belongs to a lost attempt."""
    work = workload([0.0], 4000, 20)
    world = small_world(work, members=(*ONE_EACH, ("decode-1", Role.DECODE)), reserve_first=True, max_batch_tokens=8192)
    faults.plan(world, [FaultSpec(at_s=0.01, kill="decode-0")])
    world.lifecycle.detect_s = 0.01
    world.run()
    row = world.records.frame().iloc[0]
    assert (row.status, row.decode_instance, row.attempts) == ("done", "decode-1", 2)
    assert world.leaked_blocks == 0


def test_a_dead_decode_instance_takes_no_more_chunks() -> None:
    """It died while the prompt was pushed to it chunk by chunk; later chunks must not wake it."""
    mode = TransferMode("push", "chunk")
    members = (*ONE_EACH, ("decode-1", Role.DECODE))
    world = small_world(workload([0.0], 4000, 20), members=members, transfer=mode, max_batch_tokens=500)
    faults.plan(world, [FaultSpec(at_s=0.03, kill="decode-0")])
    world.run()
    dead = world.instances["decode-0"]
    assert (dead.alive, dead.decode_tokens) == (False, 0)
    row = world.records.frame().iloc[0]
    assert (row.status, row.decode_instance) == ("done", "decode-1")


@pytest.mark.parametrize("restart", [{}, {"restart_after_s": 5.0}], ids=["for good", "for a while"])
def test_with_everybody_gone_nobody_waits_and_with_grace_they_do(restart: dict[str, float]) -> None:
    kills = [{"at_s": 0.5, "kill": "decode-0", **restart}, {"at_s": 0.5, "kill": "prefill-0", **restart}]
    world = run(*kills, members=ONE_EACH)
    frame = world.records.frame()
    struck = frame[(frame.arrival_s < 1.0) & (frame.status != "done")]
    assert len(struck) > 2 and set(struck.reason) == {"no instance is ready"}
    assert struck.finish_s.max() == pytest.approx(1.0), "as soon as it is known"
    assert set(struck.status) == {"failed", "rejected"}, "by whether the client had a token"
    waited = run(*kills, members=ONE_EACH, limits=Limits(grace_s=10.0)).records.frame()
    early = waited[waited.arrival_s < 1.0]
    if restart:
        assert (early.status == "done").all()
    else:
        assert early.finish_s.max() <= 1.0 + 10.0 + 1.0


def test_an_instance_that_is_drained_ends_what_it_has_and_leaves() -> None:
    world = run({"at_s": 1.05, "drain": "prefill-0"})
    frame = world.records.frame()
    assert (frame.status == "done").all()
    assert (frame.attempts == 1).all(), "nothing of it is lost"
    assert set(frame[frame.arrival_s > 1.05].prefill_instance) == {"prefill-1"}
    assert world.router.by_name["prefill-0"].state is InstanceState.GONE
    assert not world.instances["prefill-0"].alive
