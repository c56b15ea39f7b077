"""A machine with far more to do than it can: instances are slow, and none of them is taken for dead."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.real.faults.conftest import Asked
from tests.real.faults.test_stores import NAMES, report
from tests.support.clients import body, load
from tests.support.registry_worlds import Server
from tests.support.served_cluster import ServedCluster, cluster

BURN = "import os, time\nend = time.monotonic() + 240\nwhile time.monotonic() < end and os.getppid() != 1: pass"
# As in an experiment without limits of its own: three losses end a request.
PLAIN = {"limits": {"request_timeout_s": 300, "max_attempts": 3}, "engine": {"kv_blocks": 4000, "max_seqs": 64}}


@contextlib.contextmanager
def burning(processes: int = 4) -> Iterator[None]:
    made = [subprocess.Popen([sys.executable, "-S", "-c", BURN]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in made:
            one.kill()
            one.wait()


@pytest.fixture(scope="module")
def made(tiny: Path, store: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    with cluster(tmp_path_factory.mktemp("busy"), tiny, store("redis").url, **PLAIN) as found:
        found.start("router", "router")
        for name, role in NAMES.items():
            found.start(name, role)
        found.joined(*NAMES)
        yield found


@pytest.mark.slow
def test_300_streams_at_once_beside_a_busy_neighbour_end_whole(made: ServedCluster, asked: Asked) -> None:
    async def play() -> None:
        async with load(made.url("router")) as clients:
            for turn in range(300):
                prompt, tokens = asked[turn % len(asked)]
                clients.add(prompt, tokens[:20])
            await clients.ended(240)
            report("300 streams at once on a busy machine", clients)
            clients.check()

    incarnations = {name: made.incarnation(name) for name in NAMES}
    with burning():
        asyncio.run(play())
    made.joined(*NAMES)
    assert {name: made.incarnation(name) for name in NAMES} == incarnations
    made.at_rest()


@pytest.mark.slow
def test_one_request_of_900_prompts_fails_nobody(made: ServedCluster, asked: Asked) -> None:
    async def play() -> None:
        async with load(made.url("router")) as clients, httpx.AsyncClient(timeout=240) as http:
            for prompt, tokens in asked[:12]:
                clients.add(prompt, tokens)
            await clients.clients[0].until(1)
            many = body([asked[turn % len(asked)][0] for turn in range(900)], 4, stream=False)  # type: ignore[arg-type]
            big = asyncio.create_task(http.post(f"{made.url('router')}/v1/completions", json=many))
            for prompt, tokens in asked[12:]:
                await asyncio.sleep(0.2)
                clients.add(prompt, tokens[:40])
            await clients.ended(240)
            report("beside one request of 900 prompts", clients)
            clients.check()
            answer = await big
            assert answer.status_code == 200, answer.text[:500]
            choices = answer.json()["choices"]
            assert [choice["token_ids"] for choice in choices] == [asked[turn % len(asked)][1][:4] for turn in range(900)]

    asyncio.run(play())
    made.at_rest()
