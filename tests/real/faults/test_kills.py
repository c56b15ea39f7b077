"""A router, a prefill and a decode instance under load, of which one is killed, paused or cut off at every stage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.faults.conftest import OUTPUT_TOKENS, Asked
from tests.support.clients import Load, body, expected, load
from tests.support.links import Link, Links
from tests.support.registry_worlds import Server
from tests.support.served_cluster import AFAR, ServedCluster, cluster, free_ports, until

SLOW_BYTES_PER_S = 4e6  # a prompt's KV then takes more than a second
DECODE_SEQS = 6
TRANSFER_S = 8.0  # for one, on a busy machine too


class World:
    """Wires: `http` from the router to the prefill instance, `kv` from that one's KV to the decode instance."""

    def __init__(self, cluster: ServedCluster, server: Server, http: Link, kv: Link) -> None:
        self.cluster, self.server, self.http, self.kv = cluster, server, http, kv

    @property
    def url(self) -> str:
        return self.cluster.url("router")

    def whole(self) -> World:
        """As it was in the beginning: who was killed runs again."""
        self.kv.bytes_per_s, self.kv.cut, self.http.refuses = 0.0, False, False
        for name, process in self.cluster.processes.items():
            if process.paused:
                process.resume()
            if not process.alive:
                self.cluster.again(name)
        self.cluster.joined("p", "d")
        return self

    def computed(self) -> float:
        """Prompt tokens, by the prefill instance."""
        return self.cluster.figures("p")["vllm:prompt_tokens_total"]

    def made(self, name: str) -> float:
        """Output tokens, by one of them."""
        return self.cluster.figures(name)["vllm:generation_tokens_total"]

    async def transferring(self) -> None:
        """Wait until a prompt's KV is on its way."""
        before = self.kv.passed
        async with asyncio.timeout(60):
            while self.kv.passed < before + (1 << 20):
                await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def started(tiny: Path, links: Links, store: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = store("redis")
    with cluster(tmp_path_factory.mktemp("kills"), tiny, server.url, transfer={"timeout_s": TRANSFER_S}) as made:
        made.start("router", "router")
        made.start("d", "decode", "--max-seqs", str(DECODE_SEQS))
        http, kv = free_ports()
        made.start("p", "prefill", "--advertise", AFAR, "--port", http, "--kv-port", kv)
        yield World(made, server, links.open(AFAR, int(http)), links.open(AFAR, int(kv)))


@pytest.fixture
def world(started: World) -> World:
    return started.whole()


def test_with_a_full_decode_instance_requests_wait_and_are_whole(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            clients.add_all(asked)
            await clients.ended()
            clients.check()

    asyncio.run(play())
    assert world.kv.passed > len(asked) * 1e6
    world.cluster.at_rest()


def test_prefill_dies_with_prompts_that_it_has_not_computed(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            world.cluster.processes["p"].pause()  # so that there are some, however fast it is
            clients.add_all(asked)
            await asyncio.sleep(0.3)
            world.cluster.processes["p"].kill()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    until(lambda: set(world.cluster.present()) == {"d"}, 60, lambda: "only d is left")
    world.cluster.at_rest()


def test_prefill_dies_while_its_kv_is_read(world: World, asked: Asked) -> None:
    async def play() -> None:
        world.kv.bytes_per_s = SLOW_BYTES_PER_S
        async with load(world.url) as clients:
            clients.add_all(asked[:8])
            await world.transferring()
            world.cluster.processes["p"].kill()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.at_rest()


def test_prefill_dies_after_its_kv_was_read(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            first = clients.add_all(asked[:DECODE_SEQS])
            await asyncio.gather(*(client.until(5) for client in first))
            world.cluster.processes["p"].kill()
            clients.add_all(asked[DECODE_SEQS : 2 * DECODE_SEQS])
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.at_rest()


def test_decode_dies_while_it_reads(world: World, asked: Asked) -> None:
    async def play() -> None:
        world.kv.bytes_per_s = SLOW_BYTES_PER_S
        async with load(world.url) as clients:
            clients.add_all(asked[:8])
            await world.transferring()
            world.cluster.processes["d"].kill()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    until(lambda: set(world.cluster.present()) == {"p"}, 60, lambda: "only p is left")
    world.cluster.at_rest()


def test_decode_dies_while_it_decodes(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            made = clients.add_all(asked)
            await made[0].until(20)
            world.cluster.processes["d"].kill()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.at_rest()


@pytest.mark.parametrize("sampling", [{"seed": 11}, {"frequency_penalty": 1.0}], ids=["seeded", "penalised"])
def test_decode_dies_and_what_is_drawn_or_penalised_goes_on_exactly(sampling: dict[str, Any], world: World, asked: Asked) -> None:
    how = {"temperature": 1.0 if "seed" in sampling else 0.0, **sampling}
    given = [prompt for prompt, _ in asked[:DECODE_SEQS]]
    wanted = asyncio.run(expected(world.url, given, 200, **how))
    assert all(tokens != greedy for tokens, (_, greedy) in zip(wanted, asked, strict=False))

    async def play() -> None:
        async with load(world.url) as clients:
            made = clients.add_all(list(zip(given, wanted, strict=True)), **how)
            await asyncio.gather(*(client.until(20) for client in made))
            world.cluster.processes["d"].kill()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.at_rest()


def test_decode_loses_its_heartbeat_and_comes_back(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            made = clients.add_all(asked[:8])
            await made[0].until(20)
            world.cluster.processes["d"].pause()
            await asyncio.to_thread(until, lambda: "d" not in world.cluster.present(), 60, lambda: "d has left")
            world.cluster.processes["d"].resume()
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.joined("p", "d")
    world.cluster.at_rest()


@pytest.mark.slow  # its leases end by time
def test_prefill_loses_its_heartbeat_and_comes_back(world: World, asked: Asked) -> None:
    async def play() -> None:
        world.kv.bytes_per_s = SLOW_BYTES_PER_S
        async with load(world.url) as clients:
            clients.add_all(asked[:8])
            await world.transferring()
            world.cluster.processes["p"].pause()
            await clients.ended()
            clients.check()
        world.cluster.processes["p"].resume()

    asyncio.run(play())
    world.cluster.joined("p", "d")
    world.cluster.at_rest()


def test_clients_that_leave_at_every_stage_leave_nothing_behind(world: World, asked: Asked) -> None:
    async def play() -> None:
        world.kv.bytes_per_s = SLOW_BYTES_PER_S
        async with load(world.url) as clients:
            made = clients.add_all(asked[:20])
            await made[0].until(1)
            for client in made[1:20:4]:  # prompts that wait, are computed, wait to be read
                await client.hang_up()
            await world.transferring()
            for client in made[2:20:4]:  # KV on its way
                await client.hang_up()
            world.kv.bytes_per_s = 0.0
            for client in made[3:20:4]:
                await client.until(3)
                await client.hang_up()
            kept = Load(clients.http, clients.urls)
            kept.clients = made[0:20:4]
            await kept.ended()
            kept.check()
            for client in made:
                assert client.tokens == client.expected[: len(client.tokens)]

    asyncio.run(play())
    world.cluster.at_rest()


def test_cut_apart_from_decode_prefill_decodes_itself(world: World, asked: Asked) -> None:
    """The router reaches both. Those that wait for their KV by then wait for as long as a transfer may take, the others do not."""

    async def play() -> None:
        async with load(world.url) as clients:
            before, passed = world.made("p"), world.kv.passed
            world.kv.cut = True
            clients.add_all(asked[:4])
            await clients.ended()
            clients.add_all(asked[4:8])
            await clients.ended()
            clients.check()
            assert world.made("p") - before >= 8 * (OUTPUT_TOKENS - 1)
            assert world.kv.passed == passed
            world.kv.cut = False

    asyncio.run(play())
    world.cluster.at_rest()


@pytest.mark.slow  # its leases end by time
def test_an_instance_that_a_router_did_not_reach_for_a_while_serves_again(world: World, asked: Asked) -> None:
    """It has kept its lease all the while, and comes back as a new incarnation."""
    before = world.cluster.incarnation("p")

    async def play() -> None:
        async with load(world.url) as clients:
            made = clients.add_all(asked[:8])
            await made[0].until(1)
            world.http.refuses = True
            clients.add_all(asked[8:12])
            await clients.ended()
            clients.check()
            world.http.refuses = False
            await asyncio.to_thread(until, lambda: world.cluster.incarnation("p") > before, 60, lambda: "p comes back")
            computed = world.computed()
            clients.add_all(asked[12:16])
            await clients.ended()
            clients.check()
            assert world.computed() > computed

    asyncio.run(play())
    world.cluster.at_rest()


def test_a_store_that_stops_for_a_second_is_not_noticed(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            clients.add_all(asked[:8])
            world.server.pause()
            try:
                await asyncio.sleep(1)
            finally:
                world.server.resume()
            clients.add_all(asked[8:12])
            await clients.ended()
            clients.check()

    asyncio.run(play())
    world.cluster.at_rest()


def test_where_nobody_is_left_the_router_says_so_at_once(world: World, asked: Asked) -> None:
    async def play() -> None:
        async with load(world.url) as clients:
            made = clients.add_all(asked[:4])
            await made[0].until(5)
            for name in ("p", "d"):
                world.cluster.processes[name].kill()
            await asyncio.to_thread(until, lambda: "ready" not in world.cluster.present().values(), 60, lambda: "neither is ready")
            began_s = time.monotonic()
            async with httpx.AsyncClient(timeout=60) as http:
                late = await http.post(f"{world.url}/v1/completions", json=body([1, 2, 3], 4))
            assert time.monotonic() - began_s < 30
            assert late.status_code == 503, late.text
            assert "no instance" in late.json()["error"]["message"]
            await clients.ended()
            clients.check(whole=False)
            assert all("no instance is ready" in client.error["message"] for client in made if client.error)  # limits.grace_s is 0

    asyncio.run(play())
    world.whole().cluster.at_rest()
