"""prefix_aware and what builds on it: conditional, early_reject."""

from __future__ import annotations

import pytest

from pdlab.core.policy import Reject
from pdlab.core.types import UsageError
from pdlab.policies.conditional import Conditional
from pdlab.policies.early_reject import EarlyReject
from pdlab.policies.parameters import check
from pdlab.policies.prefix_aware import PrefixAware

HASHES = tuple(range(100, 164))  # 64 blocks of 16 tokens


@pytest.mark.parametrize("profiled", [True, False])
def test_a_partial_hit_prefers_the_warm_instance(small, ask, profiled):
    world = small("PPPD", profiled=profiled)
    world.hold(1, HASHES[:10])
    world.hold(2, HASHES[:20])
    assert PrefixAware().dispatch(ask(1024, hashes=HASHES), world.cluster) is world[2]


@pytest.mark.parametrize("profiled", [True, False])
def test_a_hole_limits_the_hit(small, ask, profiled):
    world = small("PPD", profiled=profiled)
    world.hold(0, HASHES[:2])
    world.hold(0, HASHES[3:])  # much, but block 2 is missing
    world.hold(1, HASHES[:4])
    assert PrefixAware().dispatch(ask(1024, hashes=HASHES), world.cluster) is world[1]


@pytest.mark.parametrize("profiled", [True, False])
def test_a_cold_idle_instance_beats_a_hot_overloaded_one(small, ask, profiled):
    world = small("PPD", profiled=profiled)
    world.hold(0, HASHES)
    world.queue(0, 1000)
    request = ask(1024, hashes=HASHES)
    assert PrefixAware().dispatch(request, world.cluster) is world[0]  # 1000 queued + 1 left < 1024
    world.queue(0, 100)
    assert PrefixAware().dispatch(request, world.cluster) is world[1]


def test_an_instance_without_a_hit_has_to_compute_everything(small, ask):
    """The as-found error of Llumnix v1: no hit counted as nothing missing."""
    world = small("PPD")
    world.hold(1, HASHES[:1])
    assert PrefixAware().dispatch(ask(1024, hashes=HASHES), world.cluster) is world[1]


def test_a_faster_instance_may_have_the_longer_queue(small, ask):
    world = small("PPD")
    world[1].prefill_predictor.b /= 4
    world.queue(1, 1000)
    assert PrefixAware().dispatch(ask(1000), world.cluster) is world[1]


def test_conditional_prefills_a_nearly_cached_prompt_on_the_decode_instance_that_holds_it(small, ask):
    world, policy = small("PDD"), Conditional(threshold_tokens=64)
    world.hold(2, HASHES[:61])
    request = ask(1024, hashes=HASHES)
    assert policy.dispatch(request, world.cluster) is world[2]  # 48 tokens left
    world.queue(2, 17)
    assert policy.dispatch(request, world.cluster) is world[0]


def test_conditional_prefills_a_short_prompt_on_the_least_loaded_decode_instance(small, ask):
    world, policy = small("PDD"), Conditional(threshold_tokens=64)
    world.decoding(1, 9, 100)
    assert policy.dispatch(ask(64), world.cluster) is world[2]
    assert policy.dispatch(ask(65), world.cluster) is world[0]


def test_conditional_spares_a_decode_instance_that_is_nearly_full(small, ask):
    world, policy = small("PD"), Conditional(threshold_tokens=64, max_kv_use=0.9)
    world.report(1, used_blocks=896, free_blocks=104)
    assert policy.dispatch(ask(64), world.cluster) is world[1]  # 900 of 1000 blocks
    assert policy.dispatch(ask(64), world.cluster) is world[1]
    world.report(1, used_blocks=897, free_blocks=103)
    assert policy.dispatch(ask(64), world.cluster) is world[0]
    with pytest.raises(UsageError, match="max_kv_use"):
        check(Conditional(max_kv_use=1.5))


def test_early_reject_turns_away_what_would_miss_its_objective_everywhere(small, ask):
    world, policy = small("PPD"), EarlyReject()
    world.cluster.ttft_slo_s = 1.0
    world.queue(0, 4000, 4000)  # 0.8 s at 0.1 ms a token
    world.queue(1, 4500, 4500)
    assert policy.dispatch(ask(1900), world.cluster) is world[0]
    answer = policy.dispatch(ask(2100), world.cluster)
    assert answer == Reject("TTFT predicted 1.01 s, objective 1 s")
    assert policy.dispatch(ask(2100, ttft_slo_s=2.0), world.cluster) is world[0]
    assert EarlyReject(slack=1.5).dispatch(ask(2100), world.cluster) is world[0]


def test_early_reject_predicts_nothing_without_a_profile(small, ask):
    world = small("PD", profiled=False)
    world.queue(0, 10**9)
    assert EarlyReject().dispatch(ask(100), world.cluster) is world[0]
