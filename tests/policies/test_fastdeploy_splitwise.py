from __future__ import annotations

import pytest

from pdlab.policies.fastdeploy_splitwise import FastdeploySplitwise, decode_blur, prefill_blur_tokens


@pytest.mark.parametrize(("prompt_tokens", "blur"), [(1, 100), (199, 100), (200, 100), (999, 499.5), (1000, 100), (5000, 500), (9000, 500)])
def test_prefill_blur(prompt_tokens, blur):
    assert prefill_blur_tokens(prompt_tokens) == blur


def test_decode_blur_is_the_number_of_instances_up_to_ten():
    assert [decode_blur(n) for n in (1, 9, 10, 11, 64)] == [1, 9, 10, 10, 10]


def test_prefill_goes_to_any_below_the_least_load_and_the_blur(small, ask):
    world, policy = small("PPPD"), FastdeploySplitwise()
    world.queue(0, 1000)
    world.queue(1, 1099)
    world.queue(2, 1100)
    assert {policy.dispatch(ask(1000), world.cluster).index for _ in range(200)} == {0, 1}
    assert {policy.dispatch(ask(1200), world.cluster).index for _ in range(200)} == {0, 1, 2}  # a blur of 120


def test_decode_goes_to_any_below_the_least_count_and_the_blur(small, ask):
    world, policy = small("PDDD"), FastdeploySplitwise()
    world[1].decode_requests, world[2].decode_requests, world[3].decode_requests = 4, 6, 7
    assert {policy.handoff(ask(1000), world.cluster).index for _ in range(200)} == {1, 2}


def test_with_more_than_ten_decode_instances_the_blur_stays_ten(small, ask):
    world, policy = small("P" + "D" * 12), FastdeploySplitwise()
    for i in range(2, 13):
        world[i].decode_requests = 10
    assert {policy.handoff(ask(10), world.cluster).index for _ in range(50)} == {1}
    for i in range(2, 13):
        world[i].decode_requests = 9
    assert len({policy.handoff(ask(10), world.cluster).index for _ in range(300)}) == 12


def test_both_are_chosen_at_once():
    assert FastdeploySplitwise().pairs
