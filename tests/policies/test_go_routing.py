"""Prompts take 0.1 ms a token, and are due after 1 s."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.policies.go_routing import GoRouting


def test_an_instance_that_is_nearly_idle_takes_it(small, ask):
    world = small("PPD")
    world.prefilling(0, 1, 3000)
    world.prefilling(1, 2, 900)
    assert GoRouting().dispatch(ask(1000), world.cluster) is world[1]


def test_where_all_are_in_time_the_fullest_takes_it_so_that_another_stays_free(small, ask):
    world = small("PPPD")
    world.prefilling(0, 1, 2000)
    world.prefilling(1, 2, 4000)
    world.prefilling(2, 3, 7500)
    assert GoRouting().dispatch(ask(1000), world.cluster) is world[1]  # 0.5 s; instance 2 would end at 0.85 s


def test_where_nobody_stays_below_the_full_share_the_least_loaded_takes_it(small, ask):
    world = small("PPD")
    world.prefilling(0, 1, 7900)
    world.prefilling(1, 2, 7500)
    assert GoRouting().dispatch(ask(1000), world.cluster) is world[1]


def test_it_is_not_placed_where_it_makes_others_late(small, ask):
    world = small("PPD")
    world.prefilling(0, 1, 4000, ttft_slo_s=0.5)  # in time now (0.45 s), not behind 1000 tokens more
    world.prefilling(1, 2, 2000)
    assert GoRouting().dispatch(ask(1000), world.cluster) is world[1]


def test_it_goes_where_it_makes_the_least_important_late(small, ask):
    world = small("PPD")
    world.prefilling(0, 1, 4000, ttft_slo_s=0.5)
    world.prefilling(1, 2, 4100, ttft_slo_s=0.5, priority=2)
    request = ask(1000, priority=1)
    assert GoRouting().dispatch(request, world.cluster) is world[0]  # gains 2 - 1, against 2 - 4


def test_where_nothing_is_gained_the_least_loaded_takes_it(small, ask):
    world = small("PPD")
    world.prefilling(0, 1, 12_000)
    world.prefilling(1, 2, 11_000)
    assert GoRouting().dispatch(ask(1000), world.cluster) is world[1]


def test_a_prompt_in_the_cache_is_short_there(small, ask):
    world, hashes = small("PPD"), tuple(range(60))
    world.prefilling(0, 1, 7500)
    world.prefilling(1, 2, 2000)
    request = ask(1000, hashes=hashes)
    assert GoRouting().dispatch(request, world.cluster) is world[1]
    world.hold(0, hashes)
    assert GoRouting().dispatch(request, world.cluster) is world[0]  # ends at 0.754 s: the fullest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9000)), max_size=12), st.integers(1, 9000))
def test_while_its_objective_can_be_met_somewhere_it_is(small, ask, queued, prompt):
    world = small("PPPD")
    for number, (i, tokens) in enumerate(queued):
        world.prefilling(i, number, tokens, ttft_slo_s=1e6)  # these are late nowhere
    ends_s = [(world[i].prefill_tokens + prompt) * 1e-4 for i in range(3)]
    chosen = GoRouting().dispatch(ask(prompt, 99), world.cluster)
    if min(ends_s) < 0.9:
        assert ends_s[chosen.index] < 0.9
