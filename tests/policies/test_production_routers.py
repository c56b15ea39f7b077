"""dynamo_kv, sglang_cache_aware, vllm_session, consistent_hash, length_buckets: decisions counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.core.policy import Reject
from pdlab.policies.consistent_hash import ConsistentHash
from pdlab.policies.dynamo_kv import DynamoKv
from pdlab.policies.length_buckets import LengthBuckets, equal_shares
from pdlab.policies.sglang_cache_aware import SglangCacheAware
from pdlab.policies.vllm_session import VllmSession

HASHES = tuple(range(100, 164))  # 64 blocks of 16 tokens


# ---------------------------------------------------------------- dynamo_kv


def test_dynamo_weighs_blocks_to_compute_against_blocks_in_use(small, ask):
    world, request = small("MM"), ask(1024, hashes=HASHES)
    world.hold(0, HASHES[:32])  # 32 blocks fewer to compute there
    for tokens, chosen in ((0, 0), (31 * 16, 0), (33 * 16, 1)):
        world[0].decode_tokens = tokens
        assert DynamoKv().dispatch(request, world.cluster) is world[chosen]
    assert DynamoKv(overlap_weight=2.0).dispatch(request, world.cluster) is world[0]
    assert DynamoKv(overlap_weight=0.0).dispatch(request, world.cluster) is world[1]


def test_dynamo_draws_by_a_softmax_of_the_costs(small, ask):
    world = small("PPP")
    for i in (0, 1, 2):
        world.queue(i, *[800] * i)
    policy = DynamoKv(temperature=0.5)  # costs 0, 1/2 and 1 of the span: weights 1, 1/e, 1/e^2
    counts = Counter(policy.dispatch(ask(16), world.cluster).index for _ in range(6000))
    assert [counts[i] / 6000 for i in range(3)] == pytest.approx([0.665, 0.245, 0.09], abs=0.025)


def test_dynamo_leaves_busy_instances_out_and_turns_away_where_all_are(small, ask):
    world, policy = small("PPD"), DynamoKv(busy_prefill_tokens=1000, busy_kv_use=0.9)
    world.queue(0, 1001)
    world.queue(1, 1000)
    world[1].decode_tokens = 1 << 20
    assert policy.dispatch(ask(10), world.cluster) is world[1]
    world.report(1, used_blocks=901, free_blocks=99)
    assert policy.dispatch(ask(10), world.cluster) == Reject("every instance is busy")
    world.report(2, used_blocks=901, free_blocks=99)
    assert policy.handoff(ask(10), world.cluster) is world[2], "it waits nowhere better"


def test_dynamo_believes_less_of_what_was_not_used_for_long(small, ask):
    world, policy = small("PP"), DynamoKv(overlap_half_life_s=10.0)
    request = ask(1024, hashes=HASHES)
    world.hold(0, HASHES)
    world[0].prefill_tokens = 600
    assert DynamoKv().dispatch(request, world.cluster) is world[0]
    assert policy.dispatch(request, world.cluster) is world[1], "never used as far as it knows"
    world.hold(1, HASHES)
    world[1].prefill_tokens = 1200  # 600 more than there, 1023 of them believed cached
    assert policy.dispatch(request, world.cluster) is world[1]
    world.cluster.now = 15.0  # 361 of them
    assert policy.dispatch(request, world.cluster) is world[0]


# ---------------------------------------------------------------- sglang_cache_aware


def busy(world, i: int, requests: int) -> None:
    world[i].prefill_requests = requests


def test_sglang_follows_the_prefix_it_has_sent_somewhere(small, ask):
    world, policy = small("PPD"), SglangCacheAware()
    assert policy.dispatch(ask(1024, hashes=HASHES), world.cluster) is world[0]
    busy(world, 0, 9)
    assert policy.dispatch(ask(1024, hashes=HASHES[:20] + tuple(range(44))), world.cluster) is world[0]  # 31 % of it
    assert policy.dispatch(ask(1024, hashes=HASHES[:19] + tuple(range(1000, 1045))), world.cluster) is world[1]  # 30 %


def test_sglang_gives_a_prefix_that_several_hold_to_who_had_it_first(small, ask):
    world, policy = small("PPPD"), SglangCacheAware()
    for i in (2, 1):
        policy.dispatch(ask(64, hashes=(1, 2, 3, 4)), world.cluster)
        policy.plant(world[i], ask(64, hashes=(9, 8, 7, 6)))
    assert policy.dispatch(ask(64, hashes=(9, 8, 7, 6)), world.cluster) is world[2]


def test_vllm_gives_a_prefix_that_several_hold_to_the_fewest_requests(small, ask):
    world, policy = small("PPPD"), SglangCacheAware(ties="fewest_requests")
    for i in (2, 1):
        policy.dispatch(ask(64, hashes=(1, 2, 3, 4)), world.cluster)
        policy.plant(world[i], ask(64, hashes=(9, 8, 7, 6)))
    busy(world, 2, 2)
    busy(world, 1, 1)
    assert policy.dispatch(ask(64, hashes=(9, 8, 7, 6)), world.cluster) is world[1], "not the idle one, which does not hold it"


def test_sglang_gives_up_affinity_once_both_thresholds_are_passed(small, ask):
    request = ask(1024, hashes=HASHES)
    for most, fewest, chosen in ((64, 0, 0), (65, 0, 1), (200, 134, 0), (202, 134, 1)):
        world, policy = small("PPD"), SglangCacheAware()
        policy.dispatch(request, world.cluster)
        busy(world, 0, most)
        busy(world, 1, fewest)
        assert policy.dispatch(request, world.cluster) is world[chosen], (most, fewest)


def test_sglang_sends_what_is_new_to_the_smallest_tree_in_older_versions(small, ask):
    world, policy = small("PPD"), SglangCacheAware(cold="smallest_tree")
    policy.dispatch(ask(1024, hashes=HASHES), world.cluster)
    busy(world, 1, 5)
    assert policy.dispatch(ask(160, hashes=tuple(range(10))), world.cluster) is world[1]


def test_sglang_cuts_a_tree_down_by_what_was_used_last(small, ask):
    world, policy = small("PPD"), SglangCacheAware(max_tree_tokens=64 * 16, eviction_interval_s=5.0)
    first, second = ask(1024, hashes=HASHES), ask(512, hashes=tuple(range(32)))
    policy.dispatch(first, world.cluster)
    busy(world, 1, 70)
    policy.dispatch(second, world.cluster)
    world.cluster.now = 5.0
    busy(world, 1, 0)
    busy(world, 0, 1)
    assert policy.dispatch(first, world.cluster) is world[0], "half of it is left"
    assert len(policy._trees[world[0]]) == 96
    world.cluster.now = 10.0
    assert policy.dispatch(second, world.cluster) is world[1], "the other one was used later"


# ---------------------------------------------------------------- sessions and rings


def test_a_session_stays_where_it_is_when_another_instance_goes(small, ask):
    world = small("PPPPPPD")
    for policy in (VllmSession(), ConsistentHash(most_load=1e9)):
        before = {s: policy.dispatch(ask(10, session=str(s)), world.cluster).name for s in range(300)}
        fewer = small("PPPPPD")
        after = {s: policy.dispatch(ask(10, session=str(s)), fewer.cluster).name for s in range(300)}
        stayed = [s for s in before if before[s] != "x5"]
        assert {before[s] for s in before} == {f"x{i}" for i in range(6)}
        assert all(after[s] == before[s] for s in stayed)
        assert 20 < 300 - len(stayed) < 90


def test_without_a_session_the_fewest_of_the_last_minute_are_counted(small, ask):
    world, policy = small("PPD"), VllmSession(qps_window_s=60.0)
    session = next(str(s) for s in range(99) if policy.dispatch(ask(1, session=str(s)), small("PP").cluster).index == 0)
    policy = VllmSession()
    policy.dispatch(ask(1, session=session), world.cluster)
    assert [policy.dispatch(ask(1), world.cluster).index for _ in range(3)] == [1, 0, 1]
    world.cluster.now = 61.0
    assert policy.dispatch(ask(1), world.cluster) is world[0]


def test_who_has_a_quarter_more_than_the_average_is_passed_over(small, ask):
    world, policy = small("PPPPD"), ConsistentHash()
    request = ask(10, session="a")
    home = policy.dispatch(request, world.cluster)
    for x in world.cluster.prefill:
        x.prefill_requests = 8
    assert policy.dispatch(request, world.cluster) is home  # at most ceil(1.25 * 33 / 4) = 11
    home.prefill_requests = 11
    assert policy.dispatch(request, world.cluster) is home  # at most ceil(1.25 * 36 / 4) = 12 with this one
    home.prefill_requests = 12
    assert policy.dispatch(request, world.cluster) is not home


def test_the_key_is_the_session_the_tenant_the_prefix(ask):
    key = ConsistentHash(prefix_blocks=2).key
    assert key(ask(64, session="s", tenant="t", hashes=HASHES[:4])) == key(ask(9, session="s"))
    assert key(ask(64, tenant="t", hashes=HASHES[:4])) == key(ask(9, tenant="t")) != key(ask(9, session="t"))
    assert key(ask(64, hashes=HASHES[:4])) == key(ask(32, hashes=HASHES[:2])) != key(ask(32, hashes=(100, 7)))
    assert key(ask(1, 1)) != key(ask(1, 2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(0, 1000))
def test_nobody_gets_more_than_the_bound(small, ask, loads, session):
    world = small("PPPPD")
    for i, requests in enumerate(loads):
        busy(world, i, requests)
    chosen = ConsistentHash().dispatch(ask(1, session=str(session)), world.cluster)
    assert chosen.prefill_requests + 1 <= 1.25 * (sum(loads) + 1) / 4 + 1


# ---------------------------------------------------------------- length_buckets


def test_bounds_give_each_instance_an_equal_share_of_the_tokens():
    assert equal_shares([100] * 30 + [1000] * 3, 2) == [100]
    assert equal_shares([100, 200, 300, 400, 500, 600], 3) == [400, 500]
    assert equal_shares([7], 3) == [7, 7]


def test_short_prompts_share_an_instance_and_long_ones_have_another(small, ask):
    world, policy = small("PPD"), LengthBuckets()
    lengths = [100] * 20 + [2000]
    for tokens in lengths:
        policy.dispatch(ask(tokens), world.cluster)
    world.cluster.now = 5.0
    assert policy.dispatch(ask(100), world.cluster) is world[0]
    assert policy.dispatch(ask(2000), world.cluster) is world[1]
    world.queue(1, 8193)
    assert policy.dispatch(ask(2000), world.cluster) is world[0], "the other has far more to compute"


def test_bounds_follow_the_lengths_that_come(small, ask):
    world, policy = small("PPD"), LengthBuckets(window=10)
    for _ in range(10):
        policy.dispatch(ask(100), world.cluster)
    world.cluster.now = 5.0
    for tokens in [3000] * 8 + [5000] * 2:
        policy.dispatch(ask(tokens), world.cluster)
    world.cluster.now = 10.0
    assert [policy.dispatch(ask(tokens), world.cluster).index for tokens in (3000, 5000)] == [0, 1]
