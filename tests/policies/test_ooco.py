"""Offline requests beside online ones. The profiles of `conftest`: 0.1 ms a prompt token; a decode step of n sequences, c tokens takes
10 ms + 1 ms n + 1 us c."""

from __future__ import annotations

import msgspec
import pytest

from pdlab.core.types import Request
from pdlab.core.view import LiveRequest
from pdlab.policies.ooco import Ooco, longest


def offline(small_cluster, i: int, request_id: int, prompt_tokens: int) -> LiveRequest:
    """It decodes on instance i."""
    live = small_cluster.decoding(i, request_id, prompt_tokens)
    live.request = msgspec.structs.replace(live.request, offline=True)
    return live


def test_b_star_is_where_reading_the_weights_takes_as_long_as_computing(small) -> None:
    world = small("PD")
    assert Ooco().critical_batch(world[0]) == pytest.approx(100), "10 ms over 0.1 ms a token"
    assert Ooco(b_star=7).critical_batch(world[0]) == 7
    assert Ooco().critical_batch(small("P", profiled=False)[0]) == float("inf")


def test_of_a_roofline_b_star_is_half_the_operations_a_byte_in_two_byte_weights() -> None:
    """FLOPs/byte of a linear layer is 2 B in out / (2 in out) = B, without activations; a profile of a machine with 1000 TFLOP/s and
    4 TB/s whose 8e9 weights are 16 GB has a = 4 ms, b = 16 us."""
    from pdlab.core.types import InstanceSpec, Role
    from pdlab.core.view import Instance

    spec = InstanceSpec(
        name="x",
        role=Role.PREFILL,
        kv_blocks=1,
        prefill_profile=tuple((n, 16e9 * n / 1e15) for n in (1000, 2000, 4000)),
        decode_profile=tuple((n, c, 16e9 / 4e12 + 1e-8 * c) for n in (1, 8) for c in (100, 10_000)),
    )
    assert Ooco().critical_batch(Instance(spec, 1)) == pytest.approx(1e15 / 4e12, rel=1e-3)  # 250


def test_offline_requests_wait_for_a_place_among_b_star_and_online_ones_do_not(small, ask) -> None:
    world, policy = small("PPD"), Ooco(b_star=2)
    world.queue(0, 100)
    offline(world, 0, 1, 100)
    offline(world, 1, 2, 100)
    assert policy.dispatch(ask(50, 3, offline=True), world.cluster) is world[1], "it has one of two"
    world.queue(1, 50)
    assert policy.dispatch(ask(50, 4, offline=True), world.cluster) is None
    assert policy.dispatch(ask(50, 5), world.cluster) is world[1], "the least prompt tokens, online ones first"
    waiting = [ask(50, 4, offline=True), ask(50, 5)]
    assert policy.first(waiting, world.cluster) is waiting[1]


def test_online_prompts_go_where_the_least_online_work_is(small) -> None:
    world, policy = small("PPD"), Ooco()
    world.queue(0, 5000)  # offline
    first, second = Request(1, 0.0, 800), Request(2, 0.0, 900)
    assert policy.dispatch(first, world.cluster) is world[1]
    world.prefilling(1, 1, 800)
    assert policy.dispatch(second, world.cluster) is world[0]


def test_an_offline_request_decodes_where_it_was_prefilled(small) -> None:
    world, policy = small("PPD"), Ooco()
    live = world.prefilling(1, 1, 100, offline=True)
    assert policy.handoff(live.request, world.cluster) is world[1]


def test_a_strict_instance_stops_at_98_percent_of_tpot(small, ask) -> None:
    world, policy = small("PD"), Ooco(online_waits=True)
    for id in range(37):
        world.decoding(1, 100 + id, 10)  # with one more of 600: 10 + 38 + 0.97 = 48.97 ms of at most 49
    assert policy.handoff(ask(600), world.cluster) is world[1]
    assert policy.handoff(ask(640), world.cluster) is None, "it waits"
    assert Ooco().handoff(ask(640), world.cluster) is world[1], "unless that goes for offline ones alone"
    assert Ooco().handoff(ask(640, offline=True), world.cluster) is None
    assert Ooco(online_waits=True, as_found=True).handoff(ask(640), world.cluster) is world[1], "49 ms are taken for 0.049 ms"
    assert policy.handoff(ask(640, tpot_slo_s=0.2), world.cluster) is None, "those that are there count"


def test_an_empty_strict_instance_takes_what_no_instance_could_do_in_time(small, ask) -> None:
    assert Ooco(online_waits=True).handoff(ask(60_000), (world := small("PD")).cluster) is world[1]


def test_l_star_by_hand(small) -> None:
    world, policy = small("PD", kv_blocks=2000), Ooco(b_star=20)
    for id in range(10):
        world.decoding(1, 100 + id, 100)
    world.report(1, free_blocks=2000)
    # k = 20 - 10; 10 + 20 + 1 + 0.01 l <= 50 ms; and of one alone 10 + 11 + 1 + 0.001 l <= 49 ms
    assert policy.lengths(world[1], world.cluster) == (1900, 27_000)
    world.report(1, free_blocks=1000)
    assert policy.lengths(world[1], world.cluster) == (1600, 16_000), "no more than are free, for each of the k"


def test_the_offline_request_nearest_to_l_star_is_pulled_and_only_while_there_is_time_and_memory(small) -> None:
    world, policy = small("PDD", kv_blocks=2000), Ooco(b_star=20)
    for id in range(10):
        world.decoding(1, 100 + id, 100)
        world.decoding(2, 200 + id, 100)
    for id, tokens in ((1, 500), (2, 1800), (3, 30_000)):
        offline(world, 0, id, tokens)
    world.decoding(0, 4, 1900)  # online: none of its business
    world.report(1, free_blocks=2000)
    world.report(2, free_blocks=100, used_blocks=1900)
    assert policy.migrate(world.cluster) == [(2, world[1])], "the other's memory is used to 0.95"
    world[1].decode_step_s = 0.046
    assert policy.migrate(world.cluster) == [], "its steps take more than 0.9 x 50 ms"


def test_two_strict_instances_do_not_pull_the_same(small) -> None:
    world, policy = small("PDD"), Ooco()
    offline(world, 0, 1, 500)
    offline(world, 0, 2, 510)
    assert sorted(id for id, _ in policy.migrate(world.cluster)) == [1, 2]


@pytest.mark.parametrize(("most", "limit", "expected"), [(100, 37, 37), (100, 200, 100), (100, 0, 0), (0, 5, 0)])
def test_the_longest_that_fits(most: int, limit: int, expected: int) -> None:
    assert longest(most, lambda length: length <= limit) == expected
