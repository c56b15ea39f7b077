"""Prompts take 0.1 ms a token, the TTFT objective is 1 s, instances have 1000 blocks."""

from __future__ import annotations

import pytest

from pdlab.core.types import InstanceState, Role, Scale
from pdlab.policies.llumnix_elastic import PATIENCE_S, LlumnixElastic


def changes(policy: LlumnixElastic, world, seconds: float) -> list[tuple[float, object]]:
    """What it wants within so many seconds, asked ten times in each: (when, role switch by name, or Scale)."""
    cluster, found = world.cluster, []
    start_s = cluster.now
    while cluster.now < start_s + seconds:
        cluster.now += 0.1
        wants = policy.resize(cluster)
        found += [(round(cluster.now - start_s, 1), want if isinstance(want, Scale) else (want[0].name, want[1])) for want in wants]
    return found


def full(world, i: int, requests: int = 10, free_blocks: int = 100) -> None:
    world.report(i, running=requests, free_blocks=free_blocks, used_blocks=1000 - free_blocks)


def test_spare_is_what_a_phase_can_take_on_average(small):
    world, policy = small("PPDD"), LlumnixElastic(enough_steps=100)
    ready = world.cluster.instances
    assert policy.spare(Role.PREFILL, ready, world.cluster) == policy.spare(Role.DECODE, ready, world.cluster) == 1.0
    world.queue(0, 3000, 3000)  # 0.6 s
    assert policy.spare(Role.PREFILL, ready, world.cluster) == pytest.approx((0.4 + 1.0) / 2)
    full(world, 2, 10, 500)
    assert policy.spare(Role.DECODE, ready, world.cluster) == pytest.approx((0.5 + 1.0) / 2)
    assert policy.spare(Role.MIXED, ready, world.cluster) == 0.0


def test_a_short_phase_gets_the_freest_of_one_that_has_plenty_after_it_has_settled(small):
    world, policy = small("PPDD"), LlumnixElastic()
    world.prefilling(0, 1, 100)
    for i in (2, 3):
        full(world, i)
    assert changes(policy, world, 0.9) == []
    assert changes(policy, world, 1.0) == [(0.2, ("x1", Role.DECODE))]
    assert changes(policy, world, 4.0) == [], "it cools down"
    assert [want for _, want in changes(policy, world, 3.0)] == [("x1", Role.DECODE)], "it has not switched, and is asked again"


def test_a_shortage_that_does_not_last_changes_nothing(small):
    world, policy = small("PPDD"), LlumnixElastic()
    for _ in range(5):
        full(world, 2), full(world, 3)
        assert changes(policy, world, 0.8) == []
        full(world, 2, 0, 1000), full(world, 3, 0, 1000)
        assert changes(policy, world, 0.3) == []


def test_the_last_of_a_phase_and_one_that_is_busy_itself_stay(small):
    world, policy = small("PDD"), LlumnixElastic()
    full(world, 1), full(world, 2)
    assert changes(policy, world, 10) == [], "nobody else prefills"
    world = small("PPDD")
    world.queue(0, 4000, 4000), world.queue(1, 4000, 4000)
    full(world, 2), full(world, 3)
    assert changes(LlumnixElastic(), world, 10) == [], "both are short"


def test_where_nobody_has_plenty_one_more_is_started_and_waited_for(small):
    world, policy = small("PD"), LlumnixElastic()
    world.cluster.autoscale = (2, 4)
    full(world, 1)
    assert [want for _, want in changes(policy, world, PATIENCE_S)] == [Scale(1, Role.DECODE)], "the next one only when that has come"
    assert not policy.rests
    assert [want for _, want in changes(policy, world, 10.0)] == [Scale(1, Role.DECODE)], "or has not come for a minute"
    assert changes(policy, small("PD"), 10.0) == []


def test_what_is_too_many_for_half_a_minute_goes_down_to_the_least(small):
    world, policy = small("PDDD"), LlumnixElastic()
    world.cluster.autoscale = (3, 8)
    assert changes(policy, world, 29.0) == []
    assert [want for _, want in changes(policy, world, 5.0)] == [Scale(-1, Role.DECODE)]
    world[3].state = InstanceState.GONE
    world.cluster.refresh()
    assert changes(policy, world, 100.0) == [] and policy.rests


def test_instances_without_a_role_get_one_where_it_lacks(small):
    world, policy = small("MMMM"), LlumnixElastic()
    found = {x.name: role for x, role in policy.resize(world.cluster)}
    assert sorted(found.values()) == [Role.DECODE, Role.DECODE, Role.PREFILL, Role.PREFILL]
    world = small("PDM")
    full(world, 1)
    assert [(x.name, role) for x, role in policy.resize(world.cluster)] == [("x2", Role.DECODE)]
    world.report(1)
    world.queue(0, 4000, 4000)
    assert [(x.name, role) for x, role in policy.resize(world.cluster)] == [("x2", Role.PREFILL)]
    assert LlumnixElastic().resize(small("M").cluster) == ()


def test_nothing_is_changed_while_one_switches(small):
    world, policy = small("PPPDD"), LlumnixElastic()
    full(world, 3), full(world, 4)
    world[2].state = InstanceState.SWITCHING
    world.cluster.refresh()
    assert changes(policy, world, 10) == []
