"""The prefix comes to the prompt where the link is quicker than computing. The profiles of `conftest`: 0.1 ms a prompt token."""

from __future__ import annotations

import msgspec
import pytest

from pdlab.core.policy import Borrow
from pdlab.policies.p2p_prefix import P2pPrefix

HASHES = tuple(range(100))  # of 1,600 tokens


def world_of(small, gbytes_per_s: float = 1.0):
    """Instance 0 is busy and holds the prompt; 1 is free. A block of 16 tokens is 2 MB."""
    world = small("PPD")
    for x in world.cluster.instances:
        x.spec = msgspec.structs.replace(x.spec, block_bytes=2_000_000, link_bytes_per_s=gbytes_per_s * 1e9)
    world.queue(0, 5000)
    world.hold(0, HASHES)
    return world


@pytest.mark.parametrize(("gbytes_per_s", "fetches"), [(2.0, True), (1.0, False), (0.0, True)])
def test_it_is_read_where_that_is_quicker_than_computing_and_tried_where_nobody_knows(
    small, ask, gbytes_per_s: float, fetches: bool
) -> None:
    world = world_of(small, gbytes_per_s)  # 1,600 tokens: 0.16 s of computing, 0.2 GB
    answer = P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster)
    assert answer == (Borrow(world[1], world[0]) if fetches else world[1])


def test_little_is_computed(small, ask) -> None:
    world = world_of(small, 10.0)
    assert P2pPrefix(min_tokens=1601).dispatch(ask(2000, hashes=HASHES), world.cluster) is world[1]


def test_what_the_chosen_one_has_is_not_read(small, ask) -> None:
    world = world_of(small, 10.0)
    world.hold(1, HASHES[:90])
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) is world[1], "160 tokens more"


def test_the_holder_with_the_quicker_link_lends(small, ask) -> None:
    world = small("PPPD")
    for x, rate in zip(world.cluster.instances, (3e9, 9e9, 9e9, 9e9), strict=True):
        x.spec = msgspec.structs.replace(x.spec, block_bytes=2_000_000, link_bytes_per_s=rate)
    for i in (0, 1):
        world.queue(i, 5000)
        world.hold(i, HASHES)
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) == Borrow(world[2], world[1])


def test_who_decodes_what_it_prefills_reads_too_and_nobody_without_a_way(small, ask) -> None:
    world = small("PMD")
    world.hold(0, HASHES)
    world.queue(0, 5000)
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) == Borrow(world[1], world[0])
    world = world_of(small, 10.0)
    world.cluster.reach.failed("x0", "x1", 0.0)
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) is world[1]


def test_nobody_reads_from_blocks_of_another_size(small, ask) -> None:
    world = world_of(small, 10.0)
    holder = world[0]
    holder.spec = msgspec.structs.replace(holder.spec, block_tokens=32)
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) is world[1]


def test_its_bytes_are_those_that_the_reader_holds(small, ask) -> None:
    world = world_of(small, 1.0)  # 0.2 GB at the holder, whose ranks have two copies; half of it here
    world[1].spec = msgspec.structs.replace(world[1].spec, block_bytes=1_000_000)
    assert P2pPrefix().dispatch(ask(2000, hashes=HASHES), world.cluster) == Borrow(world[1], world[0])
