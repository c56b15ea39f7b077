"""Prompts take 0.1 ms a token; decode steps 10 ms, 1 ms more for each sequence. The TPOT objective is 50 ms."""

from __future__ import annotations

import pytest

from pdlab.core.types import Arrived, InstanceState, Request, Role, Switched
from pdlab.policies.settled_roles import SettledRoles


def asks(policy: SettledRoles, world, seconds: float, tokens: int, rate: float = 10.0) -> list[tuple[float, list[tuple[str, Role]]]]:
    """Prompts come at that rate for so long, and every half second it is asked for roles. [(when, flips)], which are carried out."""
    cluster, found, number = world.cluster, [], 0
    start_s = cluster.now
    while cluster.now < start_s + seconds:
        cluster.now += 1 / rate
        number += 1
        if tokens:
            policy.observe(Arrived(Request(10_000 + number, cluster.now, tokens)), cluster)
        if number % 5 == 0 and (flips := list(policy.resize(cluster))):
            found.append((round(cluster.now - start_s, 1), [(x.name, role) for x, role in flips]))
            for x, role in flips:
                x.role, x.flipped_s = role, cluster.now
            cluster.refresh()
    return found


def decoding(world, i: int, count: int, tokens: int = 100) -> None:
    for k in range(count):
        world.decoding(i, 1000 * i + k, tokens)


def test_prompts_pull_an_instance_over_and_answers_pull_it_back(small):
    world, policy = small("PDDD"), SettledRoles()
    decoding(world, 1, 4)
    found = asks(policy, world, 20, 2000)  # 2 s of prefill arrive in a second: three of four are wanted
    assert [flips for _, flips in found] == [[("x2", Role.PREFILL), ("x3", Role.PREFILL)]]
    assert 2.0 <= found[0][0] <= 5.0, "not before it has been better for two seconds"
    decoding(world, 1, 60)
    found = asks(policy, world, 30, 10)
    assert [role for _, flips in found for _, role in flips] == [Role.DECODE, Role.DECODE]
    assert asks(policy, world, 30, 10) == [], "and there it stays"


def test_a_load_that_swings_by_less_than_the_hysteresis_flips_nobody(small):
    world, policy = small("PPDD"), SettledRoles()
    decoding(world, 2, 20)
    decoding(world, 3, 20)
    for _ in range(6):
        assert asks(policy, world, 5, 600) == []
        assert asks(policy, world, 5, 750) == []


def test_what_a_flip_costs_is_counted_and_measured(small):
    for cost_s, flips in ((0.0, 1), (1e6, 0)):
        world, policy = small("PDDD"), SettledRoles(switch_cost_s=cost_s)
        decoding(world, 1, 4)
        assert len(asks(policy, world, 8, 2000)) == flips
    world, policy = small("PDDD"), SettledRoles()
    decoding(world, 1, 4)
    asks(policy, world, 8, 2000)
    world[2].state = world[3].state = InstanceState.SWITCHING
    policy._asked_s = {"x2": world.cluster.now}
    world.cluster.now += 9.0
    policy.observe(Switched("x2", 0, Role.PREFILL), world.cluster)
    assert policy.cost_s == pytest.approx(5.0)


def test_while_one_flips_no_other_is_asked_and_one_that_dies_then_does_not_hold_up_the_rest(small):
    world, policy = small("PDDD"), SettledRoles()
    decoding(world, 1, 4)
    policy._asked_s = {"x3": 0.0}
    world[3].state = InstanceState.SWITCHING
    world.cluster.refresh()
    assert asks(policy, world, 8, 4000) == []
    world[3].state = InstanceState.GONE
    assert asks(policy, world, 8, 4000) != []


def test_two_mixed_instances_get_a_role_each(small):
    world, policy = small("MM"), SettledRoles()
    assert [(x.index, role) for x, role in policy.resize(world.cluster)] == [(0, Role.PREFILL), (1, Role.DECODE)]
    assert list(SettledRoles().resize(small("M").cluster)) == []


def test_two_instances_swap_roles_where_each_does_better_what_the_other_does(small):
    world, policy = small("PD"), SettledRoles()
    world[0].prefill_predictor.b *= 4  # slow at prompts, and as good at decoding
    decoding(world, 1, 4)
    found = asks(policy, world, 10, 2000)
    assert [flips for _, flips in found] == [[("x0", Role.DECODE), ("x1", Role.PREFILL)]]
    assert asks(policy, world, 20, 2000) == []
