"""Two routers: the one that leads is killed, or stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real.faults.conftest import Asked
from tests.real.faults.test_stores import report
from tests.support.clients import load
from tests.support.registry_worlds import Server
from tests.support.served_cluster import ServedCluster, cluster, until

ROUTERS = ("one", "two")


@pytest.fixture(scope="module")
def made(tiny: Path, store: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    with cluster(tmp_path_factory.mktemp("routers"), tiny, store("etcd").url) as found:
        for name in ROUTERS:
            found.start(name, "router")
        found.start("p", "prefill")
        found.start("d", "decode")
        for name in ROUTERS:
            found.joined("p", "d", router=name)
        yield found


def leader(made: ServedCluster, router: str) -> str:
    until(lambda: made.leader(router), 60, lambda: "somebody leads")
    return made.leader(router)


@pytest.mark.parametrize("stage", ["decode", pytest.param("any", marks=pytest.mark.slow)])
def test_the_leading_router_dies_and_the_other_goes_on(made: ServedCluster, asked: Asked, stage: str) -> None:
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


@pytest.mark.parametrize("still_s", [5.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_a_router_that_stood_still_goes_on_where_it_was(made: ServedCluster, asked: Asked, still_s: float) -> None:
    """Requests that run, and others that come meanwhile, are late, and whole; the other router is not disturbed."""
    stopped = leader(made, "one")
    (other,) = {*ROUTERS} - {stopped}

    async def play() -> None:
        process = made.processes[stopped]
        async with load(made.url(stopped)) as clients, load(made.url(other)) as others:
            clients.add_all(asked[:8])
            others.add_all(asked[8:12])
            await asyncio.gather(*(client.until(5) for client in clients.clients))
            process.pause()
            end_s = time.monotonic() + still_s
            turn = 0
            while time.monotonic() < end_s:
                for some in (clients, others):
                    prompt, tokens = asked[turn % len(asked)]
                    some.add(prompt, tokens[:40])
                turn += 1
                await asyncio.sleep(0.5)
            process.resume()
            for _ in range(10):
                clients.add(*asked[-1])
                await asyncio.sleep(0.2)
            await clients.ended()
            await others.ended()
            report(f"a router stopped for {still_s:g} s", clients)
            report("the other router meanwhile", others)
            clients.check()
            others.check()

    asyncio.run(play())
    made.at_rest()
