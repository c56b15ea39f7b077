"""freeness and llumnix, on instances of 1000 blocks of 16 tokens."""

from __future__ import annotations

import math

import pytest

from pdlab.core.types import InstanceState, Stage, UsageError
from pdlab.policies.freeness import Freeness, room, steps
from pdlab.policies.llumnix import Llumnix
from pdlab.policies.parameters import check


def loaded(world, i, requests, free_blocks, **more):
    """Instance i decodes so many requests, of 160, 320, ... tokens, and reports so many free blocks."""
    world.report(i, running=requests, free_blocks=free_blocks, used_blocks=1000 - free_blocks, **more)
    for k in range(requests):
        world.decoding(i, 100 * i + k, 160 * (k + 1))


def f(world, i, **kw):
    return steps(*room(world[i], **kw))


def test_freeness_is_the_steps_until_full(small):
    world = small("D")
    assert f(world, 0) == math.inf
    world.report(0, running=4, free_blocks=100)
    assert f(world, 0) == 25.0


def test_a_waiting_head_makes_an_instance_look_loaded(small):
    world = small("DDD")
    world.report(0, running=4, free_blocks=100)
    world.report(1, running=4, free_blocks=100, waiting=3, waiting_head_blocks=90, waiting_blocks=95)
    world.report(2, running=4, free_blocks=100, waiting=3, waiting_head_blocks=10, waiting_blocks=300)
    assert f(world, 1) == 2.0
    assert f(world, 1) < f(world, 2) < f(world, 0)
    assert f(world, 2, head_of_line=False) == pytest.approx(-200 / 7)
    assert f(world, 2, head_of_line=False) < f(world, 1, head_of_line=False)


def test_what_was_sent_since_the_report_counts(small):
    world = small("D")
    world.report(0, running=4, free_blocks=100)
    world[0].since_decode_tokens = 800
    world[0].unreported.append((0.0, 0, 800))
    assert f(world, 0) == 10.0


def test_virtual_usage_gathers_high_priority_and_keeps_others_away(small, ask):
    world, policy = small("PDD"), Freeness(priority_tokens=1600)
    loaded(world, 1, 2, 960)
    loaded(world, 2, 2, 950)
    world.decoding(2, 7, 16, priority=1)
    assert policy.room(world[2]) == (50.0, 2)  # 900 blocks of headroom
    assert policy.room(world[1], ask(10, priority=1)) == (60.0, 2)
    assert policy.handoff(ask(10), world.cluster) is world[1]
    assert policy.handoff(ask(10, priority=1), world.cluster) is world[2]
    assert Freeness().handoff(ask(10, priority=1), world.cluster) is world[1]


def test_virtual_usage_drives_others_off_an_instance_with_high_priority(small):
    world = small("PDD")
    loaded(world, 1, 4, 905)
    world.decoding(1, 7, 16, priority=1)
    assert Freeness().migrate(world.cluster) == []
    assert Freeness(priority_tokens=1600).migrate(world.cluster) == [(100, world[2])]  # F is 5/4, and the one with priority stays


def test_the_most_loaded_is_paired_with_the_freest(small):
    world = small("PDDDD")
    loaded(world, 1, 10, 20)
    loaded(world, 2, 10, 10)
    loaded(world, 3, 10, 500)
    loaded(world, 4, 10, 600)
    assert Freeness().migrate(world.cluster) == [(200, world[4]), (100, world[3])]


@pytest.mark.parametrize(("order", "request_id"), [("SR", 100), ("LR", 104), ("LCR", 104)])
def test_which_request_moves(small, order, request_id):
    world = small("PDD")
    loaded(world, 1, 5, 5)
    assert Freeness(request_order=order).migrate(world.cluster) == [(request_id, world[2])]


def test_the_last_to_come_is_not_always_the_longest(small):
    world = small("PDD")
    loaded(world, 1, 5, 5)
    world.decoding(1, 50, 16)
    assert Freeness(request_order="LCR").migrate(world.cluster) == [(50, world[2])]


def test_only_decoding_requests_move(small):
    world = small("PDD")
    loaded(world, 1, 3, 2)
    world.cluster.live[100].stage = Stage.TRANSFER
    assert Freeness().migrate(world.cluster) == [(101, world[2])]


def test_a_source_sends_one_at_a_time(small):
    world = small("PDDD")
    loaded(world, 1, 3, 2)
    world.cluster.live[100].migrating = world[2]
    assert Freeness().migrate(world.cluster) == []


def test_a_destination_receives_one_at_a_time(small):
    world = small("PDDD")
    loaded(world, 1, 3, 2)
    loaded(world, 2, 3, 900)
    world.cluster.live[200].migrating = world[3]
    assert Freeness().migrate(world.cluster) == [(100, world[2])]


def test_one_that_is_under_way_is_not_moved_again(small):
    world = small("PDDD")
    loaded(world, 1, 2, 900)
    world[1].state = InstanceState.DRAINING
    world.cluster.refresh()
    world.cluster.live[100].migrating = world[2]
    assert Freeness().migrate(world.cluster) == [(101, world[3])]


def test_nobody_moves_to_an_instance_with_waiting_preempted_requests_and_it_is_a_source_itself(small):
    world, policy = small("PDD"), Freeness()
    loaded(world, 1, 5, 5)
    loaded(world, 2, 5, 500, preempted=1, waiting=1)
    assert policy.migrate(world.cluster) == []
    world.report(2, running=5, free_blocks=500, preempted=1)  # it has resumed
    assert policy.migrate(world.cluster) == [(100, world[2])]
    world.report(1, running=5, free_blocks=500)
    world.report(2, running=5, free_blocks=500, preempted=1, waiting=1)
    assert policy.migrate(world.cluster) == []  # still the same preemption, counted since the start
    world.report(2, running=5, free_blocks=500, preempted=2, waiting=1)
    assert policy.migrate(world.cluster) == [(200, world[1])]


def test_a_source_sends_again_only_after_a_newer_report(small):
    world, policy = small("PDDD"), Freeness()
    loaded(world, 1, 5, 5)
    assert len(policy.migrate(world.cluster)) == 1
    world.cluster.now = 0.1
    assert policy.migrate(world.cluster) == []
    world.report(1, running=5, free_blocks=5)
    assert len(policy.migrate(world.cluster)) == 1


def test_defrag_skips_what_does_not_fit_there(small):
    world = small("PDD")
    loaded(world, 1, 3, 0)
    loaded(world, 2, 1, 15)
    assert Freeness(request_order="LR").migrate(world.cluster) == [(100, world[2])]  # 10 blocks; the longer have 20 and 30


def test_balanced_rejects_a_move_that_overshoots(small):
    world = small("PDD")
    world.report(1, running=1, free_blocks=2)
    world.decoding(1, 1, 16 * 60)
    loaded(world, 2, 10, 100)
    assert Freeness().migrate(world.cluster) == [(1, world[2])]
    assert Freeness(pairing="balanced").migrate(world.cluster) == []  # the source would be left empty, the destination with 40/11


def test_balanced_rejects_a_move_after_which_the_source_is_the_freer_one(small):
    world = small("PDD")
    world.report(1, running=2, free_blocks=4)
    world.decoding(1, 1, 16 * 100)
    world.decoding(1, 2, 16 * 100)
    loaded(world, 2, 8, 220)
    assert Freeness(pairing="balanced").migrate(world.cluster) == []  # 2 and 27.5 steps would become 104 and 13.3


def test_balanced_takes_a_move_that_brings_both_closer(small):
    world = small("PDD")
    loaded(world, 1, 10, 20)
    loaded(world, 2, 10, 300)
    assert Freeness(pairing="balanced").migrate(world.cluster) == [(100, world[2])]  # 2 and 30 steps become 3.3 and 26.4


def test_balanced_leaves_the_destination_above_the_threshold(small):
    world = small("PDD")
    loaded(world, 1, 10, 0)
    loaded(world, 2, 10, 40)
    assert Freeness(pairing="balanced").migrate(world.cluster) == []  # 30/11 steps would be left there


@pytest.mark.parametrize("state", [InstanceState.DRAINING, InstanceState.SWITCHING])
def test_all_leave_an_instance_that_drains_one_to_each_destination(small, state):
    world = small("PDDD")
    loaded(world, 1, 3, 900)
    world[1].state = state
    world.cluster.refresh()
    assert Freeness().migrate(world.cluster) == [(100, world[2]), (101, world[3])]


def test_llumnix_dispatches_to_prefill_instances_only_by_blocks(small, ask):
    world, policy = small("PPMD"), Llumnix()
    world.report(0, used_blocks=100, waiting_blocks=300)
    world.report(1, used_blocks=350)
    assert policy.dispatch(ask(100), world.cluster) is world[1]
    world[1].since_prefill_tokens = 51 * 16
    assert policy.dispatch(ask(100), world.cluster) is world[0]


def test_llumnix_dispatches_to_the_freest_mixed_instance_where_there_is_no_prefill(small, ask):
    world = small("MM")
    loaded(world, 0, 5, 500)
    assert Llumnix().dispatch(ask(100), world.cluster) is world[1]


def test_llumnix_stays_on_prefill_when_every_decode_instance_is_overloaded(small, ask):
    world, request = small("PDD"), ask(160, 1)
    loaded(world, 1, 10, 30)
    loaded(world, 2, 10, 40)
    live = world.decoding(1, 1, 160)
    live.prefill = world[0]
    assert Llumnix().handoff(request, world.cluster) is world[0]  # 30/11 steps would be left on the better one
    assert Llumnix(stay_on_prefill=False).handoff(request, world.cluster) is world[2]
    world.report(0, running=300, free_blocks=100)
    assert Llumnix().handoff(request, world.cluster) is world[2]  # no better where it is
    world.report(2, running=10, free_blocks=100)
    assert Llumnix().handoff(request, world.cluster) is world[2]


def test_llumnix_moves_what_stayed_as_soon_as_decode_has_room(small):
    world = small("PDD")
    world.decoding(0, 1, 160)
    world.decoding(0, 2, 160)
    loaded(world, 1, 10, 20)
    loaded(world, 2, 10, 400)
    assert Llumnix().migrate(world.cluster) == [(1, world[2])]
    assert Freeness().migrate(world.cluster) == [(100, world[2])]


@pytest.mark.parametrize(
    "wrong", [{"migrate_out_threshold": -1.0}, {"pairing": "zip"}, {"request_order": "FCW"}, {"priority_tokens": 0}, {"tick_s": -1.0}]
)
def test_wrong_parameters_are_the_users_mistake(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        check(Llumnix(**wrong))
