"""The registry's server stops while requests come and run: instances and routers go on, and every request ends whole, each token once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.faults.conftest import Asked
from tests.support.clients import Load, load
from tests.support.registry_worlds import Server
from tests.support.served_cluster import ServedCluster, cluster

SHORT = [("redis", 5.0, "paused")]
LONG = [
    (kind, out_s, how)
    for kind in ("etcd", "redis")
    for out_s in (1.0, 5.0, 20.0, 60.0)
    for how in ("paused", "killed", "wiped")
    if (kind, out_s, how) not in SHORT
]
OUTAGES = [*SHORT, *(pytest.param(*one, marks=pytest.mark.slow) for one in LONG)]
NAMES = {"p": "prefill", "d": "decode"}


async def away(server: Server, out_s: float, how: str) -> None:
    """Stopped and continued, or killed and started again, with or without what it had on disk."""
    if how == "paused":
        server.pause()
        await asyncio.sleep(out_s)
        server.resume()
        return
    await server.kill()
    await asyncio.sleep(out_s)
    await server.restart(wipe=how == "wiped")


def report(what: str, clients: Load) -> None:
    """How many requests were sent, ended well, and were doubled: for docs."""
    sent = clients.clients
    well = sum(c.done and c.error is None and not c.broken and c.tokens == c.expected for c in sent)
    doubled = sum(len(c.tokens) > len(c.expected) for c in sent)
    print(f"\n{what}: {len(sent)} sent, {well} ended well, {doubled} doubled")


async def outage(made: ServedCluster, server: Server, asked: Asked, out_s: float, how: str) -> None:
    """Some requests run when it begins, others come all the while, and others afterwards."""
    url = made.url("router")
    incarnations = {name: made.incarnation(name) for name in NAMES}
    async with load(url) as clients:
        clients.add_all(asked[:8])
        await clients.clients[0].until(1)
        going = asyncio.create_task(away(server, out_s, how))
        end_s = time.monotonic() + out_s
        turn = 8
        while time.monotonic() < end_s:
            prompt, tokens = asked[turn % len(asked)]
            clients.add(prompt, tokens[:50])
            turn += 1
            await asyncio.sleep(max(0.25, out_s / 40))
        await going
        for _ in range(12):  # while everybody finds it again
            prompt, tokens = asked[turn % len(asked)]
            clients.add(prompt, tokens[:50])
            turn += 1
            await asyncio.sleep(0.5)
        await clients.ended()
        report(f"{server.binary} {how} for {out_s:g} s", clients)
        clients.check()
    await asyncio.to_thread(made.joined, *NAMES)
    assert {name: made.incarnation(name) for name in NAMES} == incarnations, "an instance had to join anew"


@pytest.mark.parametrize(("kind", "out_s", "how"), OUTAGES)
def test_every_request_ends_whole_while_the_registry_is_away(
    kind: str, out_s: float, how: str, tiny: Path, asked: Asked, store: Callable[[str], Server], tmp_path: Path
) -> None:
    server = store(kind)
    with cluster(tmp_path, tiny, server.url) as made:
        made.start("router", "router")
        for name, role in NAMES.items():
            made.start(name, role)
        made.joined(*NAMES)
        asyncio.run(outage(made, server, asked, out_s, how))
        made.at_rest()
