"""Where P and D sit, what is on the way, and what room there is."""

from __future__ import annotations

import msgspec
import pytest

from pdlab.core.types import Request
from pdlab.core.view import LiveRequest
from pdlab.policies.topology import Topology

PLACES = [("h0", "r0", "z0"), ("h0", "r0", "z0"), ("h1", "r0", "z0"), ("h2", "r1", "z0"), ("h3", "r0", "z1"), ("", "", "")]


@pytest.fixture
def spread(small):
    """A prefill instance, and decode instances ever farther from it."""
    world = small("PDDDDD")
    for x, (host, rack, zone) in zip(world.cluster.instances, PLACES, strict=True):
        x.spec = msgspec.structs.replace(x.spec, host=host, rack=rack, zone=zone, block_bytes=1000)
        x.report = msgspec.structs.replace(x.report, free_blocks=1000)
    return world


def prefilled(world, tokens: int = 160) -> Request:
    return world.prefilling(0, 1, tokens).request


def test_nearness_is_that_of_host_rack_zone(spread):
    policy, src = Topology(), spread[0]
    assert [policy.nearness(src, x) for x in spread.cluster.instances] == [1.0, 1.0, 0.2, 0.05, 0.01, 0.01]
    assert policy.nearness(spread[5], spread[5]) == 1.0


def test_the_nearest_takes_it_until_it_is_nearly_full(spread):
    request, policy = prefilled(spread), Topology()
    assert policy.handoff(request, spread.cluster) is spread[1]
    spread.report(1, used_blocks=790)  # 0.2 of it is free with this one
    assert policy.handoff(request, spread.cluster) is spread[1]
    spread.report(1, used_blocks=800)
    assert policy.handoff(request, spread.cluster) is spread[2]  # 0.2 x 0.99 against 0.19


def test_what_is_on_the_way_makes_it_longer(spread):
    request, policy, cluster = prefilled(spread), Topology(), spread.cluster
    for k, tokens in enumerate((600, 100)):  # 7 blocks after 38 + 7: five times its own ten thousand bytes
        cluster.links.moving[LiveRequest(Request(50 + k, 0.0, tokens))] = spread[0], spread[1], tokens
    assert policy.handoff(request, cluster) is spread[2]
    cluster.links.moving.popitem()
    assert policy.handoff(request, cluster) is spread[1]  # 10 of 48 blocks: 0.208


def test_where_the_prompt_lies_nowhere_the_emptiest_takes_it(spread, ask):
    spread.report(1, used_blocks=1)
    assert Topology().handoff(ask(100), spread.cluster) is spread[2]
