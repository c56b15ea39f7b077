"""Network namespaces, an address each: a prefill and a decode instance cannot reach one another, and the router reaches both. Another
decode instance serves then; without one the prefill instance decodes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.faults.conftest import OUTPUT_TOKENS, Asked
from tests.support.clients import load
from tests.support.namespaces import HOME, inside, ip, space, spaces
from tests.support.registry_worlds import Redis
from tests.support.served_cluster import ServedCluster, cluster

ROLES = {"p": "prefill", "d": "decode", "d2": "decode"}
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with spaces(ROLES) as found:
        yield found


@contextlib.contextmanager
def cut(*names: str) -> Iterator[None]:
    """Packets between these vanish on the bridge; all others pass."""
    for name in names:
        ip("link", "set", space(name), "type", "bridge_slave", "isolated", "on")
    try:
        yield
    finally:
        for name in names:
            ip("link", "set", space(name), "type", "bridge_slave", "isolated", "off")


class Far(Redis):
    """Reached from every namespace."""

    def command(self) -> list[str]:
        return [*super().command(), "--bind", "127.0.0.1", HOME, "--protected-mode", "no"]


@pytest.fixture(scope="module")
def made(addresses: dict[str, str], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    server = Far(tmp_path_factory.mktemp("redis"))
    server.start()
    asyncio.run(server.ready())
    try:
        far = server.url.replace("127.0.0.1", HOME)
        with cluster(tmp_path_factory.mktemp("spaces"), tiny, far, token=TOKEN, transfer={"timeout_s": 4}) as found:
            found.start("router", "router")
            for name, role in ROLES.items():
                found.start(name, role, "--host", addresses[name], inside=inside(name))
            found.joined(*ROLES)
            yield found
    finally:
        server.stop()


@pytest.mark.slow
def test_with_another_way_every_request_takes_it(made: ServedCluster, asked: Asked) -> None:
    async def play() -> None:
        async with load(made.url("router")) as clients:
            with cut("p", "d"):
                clients.add_all(asked[:12])
                await clients.ended()
            clients.check()

    asyncio.run(play())
    made.at_rest()


@pytest.mark.slow
def test_without_another_way_the_prefill_instance_decodes_and_the_way_is_found_again(made: ServedCluster, asked: Asked) -> None:
    made.processes["d2"].kill()
    made.joined("p", "d")

    def decoded(name: str) -> float:
        return made.figures(name)["vllm:generation_tokens_total"]

    async def play() -> None:
        async with load(made.url("router")) as clients:
            before = decoded("p")
            with cut("p", "d"):
                clients.add_all(asked[:6])
                await clients.ended()
                clients.add_all(asked[6:12])
                await clients.ended()
            clients.check()
            assert decoded("p") - before >= 12 * (OUTPUT_TOKENS - 1)
            made.at_rest()
            before, until_s = decoded("d"), time.monotonic() + 150
            while decoded("d") == before:
                assert time.monotonic() < until_s, "no KV goes to d again"
                clients.add_all(asked[12:14])
                await clients.ended()
            clients.check()

    asyncio.run(play())
    made.at_rest()
    made.again("d2")
    made.joined(*ROLES)
