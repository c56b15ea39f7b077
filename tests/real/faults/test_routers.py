"""Two routers: the one that leads is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real.faults.clients import load
from tests.real.faults.cluster import Cluster, cluster, until
from tests.real.faults.conftest import Asked
from tests.real.registry.worlds import Server

ROUTERS = ("one", "two")


@pytest.fixture(scope="module")
def made(tiny: Path, store: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("routers"), tiny, store("etcd").url) as found:
        for name in ROUTERS:
            found.start(name, "router")
        found.start("p", "prefill")
        found.start("d", "decode")
        for name in ROUTERS:
            found.joined("p", "d", router=name)
        yield found


def leader(made: Cluster, router: str) -> str:
    until(lambda: made.leader(router), 60, lambda: "somebody leads")
    return made.leader(router)


@pytest.mark.parametrize("stage", ["decode", pytest.param("any", marks=pytest.mark.slow)])
def test_the_leading_router_dies_and_the_other_goes_on(made: Cluster, asked: Asked, stage: str) -> None:
    """Its own clients see their connections break, and nobody else anything. What waited to be read for them is given up by its lease."""
    first = leader(made, "one")
    (other,) = {*ROUTERS} - {first}

    async def play() -> None:
        async with load(made.url(first), made.url(other)) as clients:
            both = clients.add_all(asked[:12])
            if stage == "decode":
                await asyncio.gather(*(client.until(10) for client in both))
            else:
                await both[0].until(1)
            made.processes[first].kill()
            await clients.ended()
            for client in both[0::2]:
                client.check(whole=False)
                assert client.broken or client.done
            for client in both[1::2]:
                client.check()

    asyncio.run(play())
    until(lambda: made.leader(other) == other, 60, lambda: f"{other} leads, not {made.leader(other)}")
    made.at_rest()
    made.again(first)
    made.joined("p", "d", router=first)

    async def again() -> None:
        async with load(made.url(first)) as clients:
            clients.add_all(asked[12:16])
            await clients.ended()
            clients.check()

    asyncio.run(again())
