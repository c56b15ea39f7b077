"""The registry's server stops while requests come and run: routers keep their view, instances whose lease runs out fence themselves, and
nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.faults.clients import load
from tests.real.faults.cluster import Cluster, cluster
from tests.real.faults.conftest import Asked
from tests.real.registry.worlds import Server

LEASE_S = 3.0  # the default
SHORT = [("redis", 5.0)]
LONG = [("etcd", 1.0), ("etcd", 5.0), ("etcd", 20.0), ("redis", 20.0)]
OUTAGES = [*SHORT, *(pytest.param(*one, marks=pytest.mark.slow) for one in LONG)]


async def outage(clients_of: Cluster, server: Server, asked: Asked, out_s: float, stop: str) -> None:
    """Some requests run when it begins, others come all the while, and others afterwards."""
    url = clients_of.url("router")
    async with load(url) as clients:
        clients.add_all(asked[:8])
        await clients.clients[0].until(1)
        if stop == "paused":
            server.pause()
        else:
            await server.kill()
        end_s = time.monotonic() + out_s
        for prompt, tokens in asked[8:20]:
            clients.add(prompt, tokens[:50])
            await asyncio.sleep(out_s / 12)
        await asyncio.sleep(max(0.0, end_s - time.monotonic()))
        if stop == "paused":
            server.resume()
        else:
            await server.restart()
        await clients.ended()
        clients.check(whole=out_s < LEASE_S / 2)
        for client in clients.clients[:8]:
            client.check()  # what was taken in before is not lost
        assert not any(client.broken for client in clients.clients)
        await asyncio.to_thread(clients_of.joined, "p", "d")
        after = clients.add_all(asked[20:])
        await clients.ended()
        for client in after:
            client.check()


@pytest.mark.parametrize("stop", ["paused", pytest.param("killed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "out_s"), OUTAGES)
def test_requests_outlive_an_outage(
    kind: str, out_s: float, stop: str, tiny: Path, asked: Asked, store: Callable[[str], Server], tmp_path: Path
) -> None:
    server = store(kind)
    with cluster(tmp_path, tiny, server.url) as made:
        made.start("router", "router")
        made.start("p", "prefill")
        made.start("d", "decode")
        made.joined("p", "d")
        asyncio.run(outage(made, server, asked, out_s, stop))
        made.at_rest()
