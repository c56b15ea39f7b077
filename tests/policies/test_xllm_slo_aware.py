"""Steps 1-5 of SLO_AWARE, one by one. TPOT there is 10 ms + 1 ms a sequence + 1 ms for 1000 tokens; TTFT 0.1 ms a token."""

from __future__ import annotations

import pytest

from pdlab.core.types import Cancelled, Joined, PrefillDone, Role, Tick, UsageError
from pdlab.policies.parameters import check
from pdlab.policies.xllm_slo_aware import PrefillBook, XllmSloAware


def load(world, i, requests, tokens_each=0):
    for k in range(requests):
        world.decoding(i, 1000 * i + k, tokens_each)


def place(policy, world, request):
    """Dispatch, and keep the ledger the router would keep."""
    x = policy.dispatch(request, world.cluster)
    decode = policy.handoff(request, world.cluster) if x.role is Role.PREFILL else x
    live = world.decoding(decode.index, request.id, request.prompt_tokens)
    live.prefill, live.prefill_tokens = x, request.prompt_tokens
    return x, decode


def test_step_1_decodes_on_the_first_that_meets_the_objective(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 30)
    assert policy.handoff(ask(1000), world.cluster) is world[1]  # 42 ms
    load(world, 1, 9)
    assert policy.handoff(ask(1000), world.cluster) is world[2]  # 51 ms there, 12 here


def test_step_1_takes_the_least_tpot_where_nobody_meets_it(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 60)
    load(world, 2, 50)
    assert policy.handoff(ask(1000), world.cluster) is world[2]
    assert policy.handoff(ask(1000, tpot_slo_s=0.1), world.cluster) is world[1]


def test_step_1_counts_generated_tokens_that_only_the_report_knows(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 10, 100)
    world.report(1, context_tokens=35_000)
    assert policy.handoff(ask(1000), world.cluster) is world[2]  # 10 + 11 + 36 ms


def test_step_2_prefills_where_the_least_is_left(small, ask):
    world, policy = small("PPD"), XllmSloAware()
    assert place(policy, world, ask(3000, 1))[0] is world[0]
    assert place(policy, world, ask(1000, 2))[0] is world[1]
    assert place(policy, world, ask(1000, 3))[0] is world[1]
    assert policy.left_s(world[0], 0.0) == pytest.approx(0.3)
    assert policy.left_s(world[1], 0.0) == pytest.approx(0.2)


def test_prefill_time_left_shrinks_with_time_but_only_by_the_head(small, ask):
    world, policy, found = small("PD"), XllmSloAware(), XllmSloAware(as_found=True)
    for request in (ask(1000, 1), ask(1000, 2)):
        policy.dispatch(request, world.cluster)
        found.dispatch(request, world.cluster)
    assert policy.left_s(world[0], 0.06) == pytest.approx(0.14)
    assert policy.left_s(world[0], 9.0) == pytest.approx(0.1)
    assert found.left_s(world[0], 9.0) == pytest.approx(0.2)


def test_step_3_prefills_on_an_idle_decode_instance_when_prefill_is_too_late(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 20)  # still meets its objective, so it is the choice of step 1; the fastest is the idle one
    for k in range(3):
        assert place(policy, world, ask(4000, k)) == (world[0], world[1])  # 0.4 s each
    assert place(policy, world, ask(4000, 3)) == (world[2], world[2])


def test_step_3_leaves_a_decode_instance_alone_that_would_start_later(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 20)
    policy._books[world[2]] = PrefillBook()
    policy._books[world[2]].add(99, 1.3, 0.0)
    world[0].prefill_predictor.b = 1.1e-3
    assert place(policy, world, ask(1000, 1))[0] is world[0]
    assert place(policy, world, ask(1000, 2))[0] is world[0]  # 1.1 s there, 1.3 s here
    assert place(policy, world, ask(1000, 3))[0] is world[2]


def test_step_3_needs_tpot_to_spare(small, ask):
    world, policy = small("PDD"), XllmSloAware()
    load(world, 1, 32)
    load(world, 2, 18)  # 30 ms with the request: above 50 ms x 1/2
    for k in range(5):
        assert place(policy, world, ask(1000, k, ttft_slo_s=0.01))[0] is world[0]


def flip_wanted(policy, world, request):
    policy.dispatch(request, world.cluster)
    world.cluster.now += 2.0
    policy.dispatch(request, world.cluster)
    return list(policy.resize(world.cluster))


def test_step_4_flips_the_chosen_prefill_instance_when_no_decode_instance_is_fast_enough(small, ask):
    world = small("PPD")
    load(world, 2, 60)
    assert flip_wanted(XllmSloAware(), world, ask(1000)) == [(world[0], Role.DECODE)]


def test_a_flip_to_decode_changes_the_sets(small, ask):
    """The as-found error of xLLM: the flipped instance was put back where it had been."""
    world, policy = small("PPD"), XllmSloAware()
    load(world, 2, 60)
    ((x, x.role),) = flip_wanted(policy, world, ask(1000))
    world.cluster.refresh()
    assert [y.index for y in world.cluster.prefill] == [1]
    assert policy.handoff(ask(1000, 9), world.cluster) is x
    assert policy.dispatch(ask(1000, 8), world.cluster) is world[1]


def test_step_4_waits_until_the_shortage_has_lasted_as_long_as_a_switch_costs(small, ask):
    world, policy = small("PPD"), XllmSloAware(switch_cost_s=5.0)
    load(world, 2, 60)
    assert flip_wanted(policy, world, ask(1000)) == []  # 2 s
    assert flip_wanted(policy, world, ask(1000)) == []  # 4 s
    assert flip_wanted(policy, world, ask(1000)) == [(world[0], Role.DECODE)]


def test_step_4_keeps_the_last_prefill_instance_and_a_lately_flipped_one(small, ask):
    world = small("PD")
    load(world, 1, 60)
    assert flip_wanted(XllmSloAware(), world, ask(1000)) == []
    world = small("PPD")
    load(world, 2, 60)
    world[0].flipped_s = -7.0
    assert flip_wanted(XllmSloAware(min_flip_interval_s=10.0), world, ask(1000)) == []


def test_step_4_is_not_carried_out_as_found(small, ask):
    world = small("PPD")
    load(world, 2, 60)
    assert flip_wanted(XllmSloAware(as_found=True, switch_cost_s=0.0), world, ask(1000)) == []


def test_step_4_leaves_prefill_alone_when_it_has_no_time_to_spare_and_is_no_majority(small, ask):
    world = small("PPDD")
    load(world, 2, 60)
    load(world, 3, 60)
    policy = XllmSloAware()
    for k in range(4):
        policy.dispatch(ask(4000, 100 + k), world.cluster)  # at last 0.8 s in each queue: above 1 s x 1/2
    policy._to_decode = None
    assert policy.dispatch(ask(4000, 1), world.cluster) is world[0]
    assert policy._to_decode is None


def test_step_5_flips_an_idle_decode_instance_when_prompts_wait(small, ask):
    world, policy = small("PDD"), XllmSloAware(switch_cost_s=0.5)
    load(world, 1, 1)
    policy.dispatch(ask(4000, 1), world.cluster)
    assert list(policy.resize(world.cluster)) == []  # 0.4 s: not worth a switch
    policy.dispatch(ask(4000, 2), world.cluster)
    assert list(policy.resize(world.cluster)) == [(world[2], Role.PREFILL)]


def test_step_5_flips_one_back_that_has_served_and_is_empty_though_no_prompt_waits(small, ask):
    world, policy = small("PDD"), XllmSloAware(min_flip_interval_s=5.0)
    load(world, 1, 300)
    assert policy.dispatch(ask(10, 1), world.cluster) is world[0]
    assert policy.handoff(ask(10, 1), world.cluster) is world[2], "the first is full"
    world[2].decode_requests += 1
    policy.observe(PrefillDone(1, 1, "x0"), world.cluster)
    assert list(policy.resize(world.cluster)) == []
    world[2].decode_requests -= 1
    world[2].flipped_s = world.cluster.now - 4.0
    assert list(policy.resize(world.cluster)) == [], "lately flipped"
    assert not policy.rests, "time alone will flip it"
    world.cluster.now += 2.0
    assert list(policy.resize(world.cluster)) == [(world[2], Role.PREFILL)]


def test_step_5_leaves_one_that_has_never_served_as_it_is_and_rests(small):
    world, policy = small("PDD"), XllmSloAware()
    assert list(policy.resize(world.cluster)) == []
    assert policy.rests


def test_step_5_keeps_the_last_decode_instance_and_a_lately_flipped_one(small, ask):
    world, policy = small("PD"), XllmSloAware(switch_cost_s=0.0)
    policy.dispatch(ask(4000, 1), world.cluster)
    assert list(policy.resize(world.cluster)) == []
    world, policy = small("PDD"), XllmSloAware(switch_cost_s=0.0)
    world[1].flipped_s = world[2].flipped_s = -5.0
    policy.dispatch(ask(4000, 1), world.cluster)
    assert list(policy.resize(world.cluster)) == []


def test_step_5_as_found_flips_whatever_has_emptied_but_one(small, ask):
    world, policy = small("PDD"), XllmSloAware(as_found=True)
    assert list(policy.resize(world.cluster)) == []  # never used
    policy.dispatch(ask(10, 1), world.cluster)
    assert list(policy.resize(world.cluster)) == [(world[1], Role.PREFILL)]


def test_mixed_instances_are_given_roles_the_first_decodes(small):
    world = small("MMM")
    assert list(XllmSloAware().resize(world.cluster)) == [(world[0], Role.DECODE), (world[1], Role.PREFILL), (world[2], Role.PREFILL)]


def test_a_cancel_after_prefill_takes_its_share_off_only_once(small, ask):
    world, policy = small("PD"), XllmSloAware()
    for k in (1, 2):
        place(policy, world, ask(1000, k))
    world.cluster.live[1].prefill_tokens = -1  # as the router marks a computed prompt
    policy.observe(PrefillDone(1, 1, "x0"), world.cluster)
    assert policy.left_s(world[0], 0.0) == pytest.approx(0.1)
    del world.cluster.live[1]
    policy.observe(Cancelled(1), world.cluster)
    assert policy.left_s(world[0], 0.0) == pytest.approx(0.1)


def test_requests_that_ended_unseen_leave_the_books_at_the_next_tick(small, ask):
    world, policy = small("PD"), XllmSloAware()
    place(policy, world, ask(1000, 1))
    world.cluster.live.clear()
    policy.observe(Joined(world[0].spec), world.cluster)
    assert policy.left_s(world[0], 0.0) > 0.0
    policy.observe(Tick(), world.cluster)
    assert policy.left_s(world[0], 0.0) == 0.0


def test_a_request_dispatched_anew_is_booked_once(small, ask):
    world, policy = small("PPD"), XllmSloAware()
    assert policy.dispatch(ask(1000, 1), world.cluster) is world[0]
    assert policy.dispatch(ask(1000, 1), world.cluster) is world[0]
    assert policy.left_s(world[0], 0.0) == pytest.approx(0.1)


def test_without_profiles_it_takes_the_least_loaded_and_flips_nothing(small, ask):
    world, policy = small("PPDD", profiled=False), XllmSloAware(switch_cost_s=0.0)
    load(world, 2, 60, 10)
    assert policy.handoff(ask(1000), world.cluster) is world[3]
    assert flip_wanted(policy, world, ask(1000)) == []


@pytest.mark.parametrize("wrong", [{"min_flip_interval_s": -1.0}, {"switch_cost_s": float("nan")}, {"tick_s": 0.0}])
def test_wrong_parameters_are_the_users_mistake(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        check(XllmSloAware(**wrong))
