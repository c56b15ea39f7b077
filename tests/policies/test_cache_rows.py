"""fastdeploy_cache_aware and llumnix_v1_cache."""

from __future__ import annotations

from pdlab.policies.fastdeploy_cache_aware import FastdeployCacheAware
from pdlab.policies.llumnix_v1_cache import LlumnixV1Cache

HASHES = tuple(range(100, 164))  # 64 blocks of 16 tokens


def loaded(world, *requests: int) -> None:
    for x, n in zip(world.cluster.prefill, requests, strict=True):
        x.prefill_requests = n


def test_fastdeploy_adds_what_is_missing_and_the_load(small, ask):
    world, policy = small("PPD"), FastdeployCacheAware()
    first = ask(1024, hashes=HASHES)
    assert policy.dispatch(first, world.cluster) is world[0]
    loaded(world, 1, 0)  # 0 + 1 against 1 + 0: a tie, which the tokens settle
    world[0].prefill_tokens = 1024
    assert policy.dispatch(first, world.cluster) is world[1]
    half = ask(1024, hashes=HASHES[:32] + tuple(range(32)))
    assert FastdeployCacheAware(load_weight=0.05).dispatch(half, world.cluster) is world[1], "it knows of nothing yet"
    policy = FastdeployCacheAware(load_weight=0.05)
    loaded(world, 0, 0)
    world[0].prefill_tokens = 0
    policy.dispatch(first, world.cluster)
    loaded(world, 1, 0)
    assert policy.dispatch(half, world.cluster) is world[0]  # 0.5 + 0.05 against 1


def test_fastdeploy_goes_by_tokens_once_loads_differ(small, ask):
    for loads, chosen in (((2, 1), 0), ((3, 1), 1), ((10, 8), 0), ((11, 8), 1)):
        world, policy = small("PPD"), FastdeployCacheAware(load_weight=0.1)
        first = ask(1024, hashes=HASHES)
        policy.dispatch(first, world.cluster)
        loaded(world, *loads)
        world[0].prefill_tokens = 99
        assert policy.dispatch(first, world.cluster) is world[chosen], loads


def test_fastdeploy_forgets_what_nobody_used_for_half_an_hour_and_the_oldest_of_too_many(small, ask):
    world, policy = small("PPD"), FastdeployCacheAware(most_blocks=80)
    first = ask(1024, hashes=HASHES)
    policy.dispatch(first, world.cluster)
    assert len(policy._used_s) == 64
    policy.dispatch(ask(640, hashes=tuple(range(40))), world.cluster)
    policy.dispatch(ask(1), world.cluster)
    assert len(policy._used_s) == 80
    world.cluster.now = 1801.0
    policy.dispatch(ask(1), world.cluster)
    assert not policy._used_s


def test_llumnix_v1_prefers_a_partial_hit_and_as_found_avoids_it(small, ask):
    world, request = small("PPD"), ask(1024, hashes=HASHES)
    world.hold(1, HASHES[:32])
    assert LlumnixV1Cache().dispatch(request, world.cluster) is world[1]
    assert LlumnixV1Cache(as_found=True).dispatch(request, world.cluster) is world[0]
    world.hold(1, HASHES)
    world.queue(0, 1)
    assert LlumnixV1Cache(as_found=True).dispatch(request, world.cluster) is world[1], "unless all of it is there: 1 token, and 1 there"


def test_llumnix_v1_weighs_what_is_queued_and_leaves_full_instances_out(small, ask):
    world, request = small("PPD"), ask(1024, hashes=HASHES)
    world.hold(0, HASHES)
    world.queue(0, 1000)
    assert LlumnixV1Cache().dispatch(request, world.cluster) is world[0]  # 1001 against 1024
    world.queue(0, 30)
    assert LlumnixV1Cache().dispatch(request, world.cluster) is world[1]
    world.queue(1, 3000)
    world.queue(0, 1018)
    assert LlumnixV1Cache().dispatch(request, world.cluster) is world[0]  # both full: all are asked
    world.queue(1, -960)
    assert LlumnixV1Cache(most_queued_tokens=2041).dispatch(request, world.cluster) is world[1]


def test_llumnix_v1_does_not_look_for_short_prompts(small, ask):
    world = small("PPD")
    world.hold(1, HASHES)
    assert LlumnixV1Cache().dispatch(ask(1023, hashes=HASHES[:63]), world.cluster) is world[0]
    assert LlumnixV1Cache(least_prompt_tokens=0).dispatch(ask(1023, hashes=HASHES[:63]), world.cluster) is world[1]
