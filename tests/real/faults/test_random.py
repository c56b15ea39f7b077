"""Instances of both roles are killed and paused at random moments, for a while, under a steady load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.faults.conftest import Asked
from tests.support.clients import Client, load
from tests.support.registry_worlds import Server
from tests.support.served_cluster import ServedCluster, cluster

TROUBLES = 8
ATTEMPTS = 20  # one request may meet most of the troubles, and on a busy machine others
TRANSFERS = [
    {"mode": "pull"},
    {"mode": "pull", "reserve": "before_prefill"},
    {"mode": "push", "granularity": "chunk", "reserve": "before_prefill"},
    {"mode": "push", "granularity": "layer", "reserve": "before_prefill"},
    {"mode": "pull", "first_token": "decode"},
]
NAMES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


async def steady(made: ServedCluster, asked: Asked, stop: asyncio.Event) -> list[Client]:
    """Always a dozen at once, each of which ends whole."""
    async with load(made.url("router")) as clients:

        async def one(number: int) -> None:
            turn = number
            while not stop.is_set():
                prompt, tokens = asked[turn % len(asked)]
                await clients.add(prompt, tokens).ended()
                turn += 12

        await asyncio.gather(*map(one, range(12)))
        clients.check()
        return clients.clients


async def strike(made: ServedCluster, rng: random.Random) -> None:
    """One of them dies, or stands still until it has lost its place; then it is back."""
    name = rng.choice(sorted(NAMES))
    process = made.processes[name]
    await asyncio.sleep(rng.uniform(0.2, 3.0))
    if rng.random() < 0.7:
        process.kill()
        made.again(name)
    else:
        process.pause()
        await asyncio.sleep(rng.uniform(0.5, 6.0))
        process.resume()
    await asyncio.to_thread(made.joined, *NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("transfer", TRANSFERS, ids=lambda transfer: "-".join(map(str, transfer.values())))
def test_whatever_dies_every_request_is_whole(
    transfer: dict[str, str], tiny: Path, asked: Asked, store: Callable[[str], Server], tmp_path: Path
) -> None:
    rng = random.Random(7)
    with cluster(tmp_path, tiny, store("redis").url, transfer=transfer, limits={"max_attempts": ATTEMPTS}) as made:
        made.start("router", "router")
        for name, role in NAMES.items():
            made.start(name, role)
        made.joined(*NAMES)

        async def play() -> int:
            stop = asyncio.Event()
            running = asyncio.create_task(steady(made, asked, stop))
            try:
                for _ in range(TROUBLES):
                    await strike(made, rng)
            finally:
                stop.set()
                clients = await running
            return len(clients)

        assert asyncio.run(play()) > 12
        made.at_rest()
