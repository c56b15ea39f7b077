"""round_robin, random, power_of_two, least_loaded, least_kv."""

from __future__ import annotations

from collections import Counter

import pytest

from pdlab.core.types import InstanceState, UsageError
from pdlab.policies.least_kv import LeastKv
from pdlab.policies.least_loaded import LeastLoaded
from pdlab.policies.parameters import check
from pdlab.policies.power_of_two import PowerOfTwo
from pdlab.policies.random import Random
from pdlab.policies.round_robin import RoundRobin


def test_round_robin_takes_each_in_turn_and_keeps_a_turn_for_each_phase(small, ask):
    world, policy = small("PPPDD"), RoundRobin()
    assert [policy.dispatch(ask(10), world.cluster).index for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [policy.handoff(ask(10), world.cluster).index for _ in range(3)] == [3, 4, 3]


def test_round_robin_skips_an_instance_that_is_suspect(small, ask):
    world, policy = small("PPPD"), RoundRobin()
    world[1].state = InstanceState.SUSPECT
    world.cluster.refresh()
    assert {policy.dispatch(ask(10), world.cluster).index for _ in range(6)} == {0, 2}


def test_random_reaches_everybody_about_equally(small, ask):
    world, policy = small("PPPPD"), Random()
    counts = Counter(policy.dispatch(ask(10), world.cluster).index for _ in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_power_of_two_never_takes_the_most_loaded_and_takes_the_least_loaded_twice_out_of_three(small, ask):
    world, policy = small("PPPD"), PowerOfTwo()
    world.queue(0, 500)
    world.queue(1, 100)
    counts = Counter(policy.dispatch(ask(10), world.cluster).index for _ in range(3000))
    assert counts[0] == 0
    assert counts[2] == pytest.approx(2000, abs=120)


def test_least_loaded_counts_tokens_or_requests(small, ask):
    world = small("PPD")
    world.queue(0, 10, 10, 10)
    world.queue(1, 5000)
    assert LeastLoaded().dispatch(ask(10), world.cluster) is world[0]
    assert LeastLoaded(by="requests").dispatch(ask(10), world.cluster) is world[1]
    with pytest.raises(UsageError, match="tokens or requests, not 'bytes'"):
        check(LeastLoaded(by="bytes"))


def test_least_kv_looks_at_the_part_in_use_with_the_prompt_and_counts_what_was_sent_since_the_report(small, ask):
    world = small("PDD")
    world.report(1, used_blocks=500, free_blocks=500)
    world.report(2, used_blocks=400, free_blocks=600)
    assert LeastKv().handoff(ask(10), world.cluster) is world[2]
    world[2].since_decode_tokens = 101 * 16
    assert LeastKv().handoff(ask(10), world.cluster) is world[1]


def test_least_kv_leaves_a_prompt_off_a_small_instance_that_is_emptier(small, ask):
    big, little = small("PD"), small("D", kv_blocks=100)
    big.report(1, used_blocks=300, free_blocks=700)
    little[0].index = 2
    big.cluster.instances.append(little[0])
    big.cluster.refresh()
    assert LeastKv().handoff(ask(10), big.cluster) is little[0]
    assert LeastKv().handoff(ask(1000), big.cluster) is big[1]
