"""Prompts take 0.1 ms a token; decode steps 10 ms, 1 ms more for each sequence."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from pdlab.core.types import Arrived, Finished, PrefillDone, Request, Role, Scale
from pdlab.policies.autoscale_sla import AutoscaleSla


@pytest.fixture
def world(small):
    made = small("PD")
    made.cluster.autoscale = (2, 20)
    return made


def interval(policy: AutoscaleSla, world, rate: float, *, prompt: int = 2000, output: int = 50, ttft_s: float = 0.0) -> list[Scale]:
    """Ten seconds of requests that are answered, and what it asks for at their end."""
    cluster = world.cluster
    for k in range(round(10 * rate)):
        policy.observe(Arrived(Request(k, cluster.now, prompt)), cluster)
        if ttft_s:
            live = world.prefilling(0, k, prompt)
            cluster.now += ttft_s
            policy.observe(PrefillDone(k, 1, "x0"), cluster)
            cluster.now -= ttft_s
            del cluster.live[live.request.id]
        policy.observe(Finished(k, 1, "x1", output), cluster)
    cluster.now += 10.0
    return list(policy.resize(cluster))


def test_prefill_is_sized_by_the_seconds_that_arrive_and_decode_by_the_batch_that_meets_tpot(world):
    found = interval(AutoscaleSla(load="constant"), world, 10.0)
    assert found == [Scale(3, Role.PREFILL), Scale(3, Role.DECODE)]
    # 10/s x 0.2 s / 0.6 = 3.3; a batch of 7 fits 0.9 of the memory at 2,050 tokens, 31 ms a step: 500 tokens/s x 31 ms / 7 / 0.6 = 3.7


def test_nobody_is_asked_for_twice_while_it_starts_and_again_once_it_is_overdue(world):
    policy = AutoscaleSla(load="constant")
    assert interval(policy, world, 10.0) != []
    assert [interval(policy, world, 10.0) for _ in range(11)] == [[]] * 11
    assert interval(policy, world, 10.0) != []


def test_instances_are_taken_away_one_by_one_after_a_minute_of_too_little_load_and_one_of_each_stays(small, world):
    policy, world = AutoscaleSla(load="constant", tick_s=10.0), small("PPPDD")
    world.cluster.autoscale = (2, 20)
    asked = [interval(policy, world, 0.1) for _ in range(8)]
    assert asked[:6] == [[]] * 6
    assert asked[6] == [Scale(-1, Role.PREFILL), Scale(-1, Role.DECODE)]
    assert asked[7] == []
    lone = small("PD")
    lone.cluster.autoscale = (2, 20)
    assert all(not interval(policy, lone, 0.0) for _ in range(20))


def test_what_takes_twice_as_long_as_predicted_needs_twice_as_many(world):
    policy = AutoscaleSla(load="constant")
    assert interval(policy, world, 10.0, ttft_s=0.4)[0] == Scale(6, Role.PREFILL)  # 6.7
    policy = AutoscaleSla(load="constant", most_correction=1.0)
    assert interval(policy, world, 10.0, ttft_s=0.4)[0] == Scale(3, Role.PREFILL)


def test_steps_that_take_longer_shrink_the_batch(world):
    policy = AutoscaleSla(load="constant")
    world.report(1, running=4, context_tokens=8000)
    world[1].decode_step_s = 0.022
    asked = [one for one in interval(policy, world, 1.0) if one.role is Role.DECODE]
    assert asked == []
    world[1].decode_step_s = 0.066  # three times as long: 2 sequences at 48 ms, in place of 7 at 31
    assert [one for one in interval(policy, world, 1.0) if one.role is Role.DECODE] == [Scale(2, Role.DECODE)]


def test_a_rising_load_is_continued_by_its_trend(world):
    for load, least in (("constant", 0.0), ("trend", 1.0)):
        policy = AutoscaleSla(load=load)
        rates = []
        for k in range(1, 12):
            policy._arrived = 100 * k
            rates.append(policy.rate_rps(10.0 * k, 10.0))
        assert rates[-1] == pytest.approx(110.0 + 10.0 * least, abs=4.0)


def test_by_the_day_the_load_is_what_it_was_a_day_and_an_interval_ago(world):
    policy = AutoscaleSla(load="day", day_s=200.0)
    wave = [round(100 + 80 * math.sin(2 * math.pi * k / 20)) for k in range(60)]
    found = []
    for k, arrived in enumerate(wave):
        policy._arrived = arrived
        found.append(policy.rate_rps(10.0 * k, 10.0))
    assert found[40:59] == [rate / 10.0 for _, rate in pairwise(wave[40:60])]


def test_where_nobody_may_scale_nothing_is_asked(small):
    world = small("PD")
    assert interval(AutoscaleSla(), world, 50.0) == []
