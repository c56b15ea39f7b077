from __future__ import annotations

from pdlab.policies.xllm_cache_aware import XllmCacheAware

HASHES = tuple(range(64))


def test_a_partial_hit_prefers_the_warm_instance_which_integer_division_hides(small, ask):
    world, request = small("PPD"), ask(1024, hashes=HASHES)
    world.hold(1, HASHES[:32])
    world.hold(0, HASHES[:1])
    assert XllmCacheAware().dispatch(request, world.cluster) is world[1]
    assert XllmCacheAware(as_found=True).dispatch(request, world.cluster) is world[0]


def test_a_hole_limits_the_hit(small, ask):
    world = small("PPD")
    world.hold(0, HASHES[1:])
    world.hold(1, HASHES[:1])
    assert XllmCacheAware().dispatch(ask(1024, hashes=HASHES), world.cluster) is world[1]


def test_a_cold_idle_instance_beats_a_hot_overloaded_one_unless_as_found(small, ask):
    world, request = small("PPD"), ask(1024, hashes=HASHES)
    world.hold(0, HASHES[:32])
    world.report(0, used_blocks=900, free_blocks=100)
    world.queue(0, 500, 500)
    assert XllmCacheAware().dispatch(request, world.cluster) is world[1]
    assert XllmCacheAware(as_found=True).dispatch(request, world.cluster) is world[0]


def test_without_any_hit_the_original_takes_the_least_used(small, ask):
    world = small("PDD")
    world.report(1, used_blocks=10, free_blocks=990)
    assert XllmCacheAware(as_found=True).handoff(ask(100), world.cluster) is world[2]


def test_weights_decide_between_a_hit_and_free_memory(small, ask):
    world, request = small("PDD"), ask(1024, hashes=HASHES)
    world.hold(1, HASHES[:32])
    world.report(1, used_blocks=600, free_blocks=400)
    assert XllmCacheAware().handoff(request, world.cluster) is world[2]
    assert XllmCacheAware(hit_weight=2.0).handoff(request, world.cluster) is world[1]
