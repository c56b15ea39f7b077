"""Prompts take 0.1 ms a token by the profile; decode steps 10 ms, 1 ms more for each sequence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.types import Finished, PrefillDone, Tick, Transferred
from pdlab.policies.slo_headroom import Ridge, SloHeadroom


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.floats(0.05, 1.0), st.floats(0.2, 3.0), st.floats(0.2, 3.0)), st.integers(0, 99))
def test_the_model_finds_what_latencies_are_made_of(weights, seed):
    draw, model = random.Random(seed), Ridge((0.0, 1.0, 1.0), forget=1.0, strength=1e-6)
    for _ in range(200):
        features = (1.0, draw.uniform(0.01, 2.0), draw.uniform(0.01, 2.0))
        model.learn(features, sum(w * f for w, f in zip(weights, features, strict=True)))
    assert model.weights == pytest.approx(weights, rel=0.02)


def test_the_model_forgets():
    model = Ridge((0.0, 1.0), forget=0.9)
    for factor in (1.0, 3.0):
        for k in range(80):
            model.learn((1.0, 0.1 + k % 8), factor * (0.1 + k % 8))
    assert model.seconds((1.0, 2.0)) == pytest.approx(6.0, rel=0.02)


def never_explores(**more) -> SloHeadroom:
    return SloHeadroom(explore=0.0, **more)


def test_the_most_headroom_takes_it_or_the_least_that_is_enough(small, ask):
    world = small("PPPD")
    world.queue(0, 9000)  # 1 s for this prompt: misses 0.9 s
    world.queue(1, 6000)
    world.queue(2, 3000)
    assert never_explores().dispatch(ask(1000), world.cluster) is world[2]
    assert never_explores(pack=True).dispatch(ask(1000), world.cluster) is world[1]
    world.cluster.now = 0.4  # it has waited: 0.5 s are left
    assert never_explores(pack=True).dispatch(ask(1000), world.cluster) is world[2]


def test_where_nobody_meets_it_an_idle_one_takes_it(small, ask):
    world = small("PPD")
    world.queue(0, 10)
    assert never_explores(pack=True).dispatch(ask(20_000), world.cluster) is world[1]
    world.queue(1, 5)
    assert never_explores(pack=True).dispatch(ask(20_000), world.cluster) is world[1], "it misses least"


def test_decode_goes_by_the_step(small, ask):
    world = small("PDD")
    for k in range(30):
        world.decoding(1, k, 10)  # 41 ms with one more, of 45
    assert never_explores(pack=True).handoff(ask(10), world.cluster) is world[1]
    assert never_explores().handoff(ask(10), world.cluster) is world[2]
    for k in range(30, 36):
        world.decoding(1, k, 10)
    assert never_explores(pack=True).handoff(ask(10), world.cluster) is world[2]


def test_it_learns_that_queues_take_twice_as_long_as_predicted(small, ask):
    world, policy = small("PPD"), never_explores(warm_up=20)
    cluster, draw = world.cluster, random.Random(3)
    for number in range(80):
        tokens = draw.randrange(100, 3000)
        world[0].prefill_tokens = world[1].prefill_tokens = draw.randrange(0, 3000)
        x = policy.dispatch(ask(tokens, number), cluster)
        cluster.now += 1e-4 * (tokens + 2 * x.prefill_tokens)
        policy.observe(PrefillDone(number, 1, x.name), cluster)
    assert policy.ttft.weights[1:3] == pytest.approx([2.0, 1.0], rel=0.1)
    assert not policy._prompts


def test_it_learns_from_answers_and_keeps_nothing_of_what_is_gone(small, ask):
    world, policy = small("PD"), never_explores(warm_up=8)
    cluster = world.cluster
    for number in range(40):
        policy.handoff(ask(10, number), cluster)
        cluster.now += 5.0
        policy.observe(Transferred(number, 1, "x1"), cluster)
        cluster.now += 9 * 0.022
        policy.observe(Finished(number, 1, "x1", 10), cluster)
    known = (1.0, world[1].tpot_s(1, 10), 0.0)
    assert policy.tpot.seconds(known) == pytest.approx(0.022, rel=0.05)
    policy.dispatch(ask(10, 99), cluster)
    policy.handoff(ask(10, 99), cluster)
    policy.observe(Tick(), cluster)
    assert not policy._prompts
    assert not policy._answers


def test_one_in_a_hundred_is_placed_anywhere(small, ask):
    world, policy = small("PPD"), SloHeadroom()
    world.queue(0, 5000)
    there = sum(policy.dispatch(ask(10, k), world.cluster) is world[0] for k in range(4000))
    assert 5 <= there <= 40
