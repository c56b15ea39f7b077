"""Network namespaces, an address each: a prefill and a decode instance cannot reach one another, and the router reaches both. Another
decode instance serves then; without one the prefill instance decodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.faults.conftest import OUTPUT_TOKENS, Asked
from tests.support.clients import load
from tests.support.registry_worlds import Redis
from tests.support.served_cluster import ServedCluster, cluster

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")  # tests that run side by side have networks of their own
NET = f"10.213.{77 + int(WORKER)}"
BRIDGE, HOME = f"pdlab{WORKER}-br", f"{NET}.1"
ADDRESSES = {"p": f"{NET}.2", "d": f"{NET}.3", "d2": f"{NET}.4"}
ROLES = {"p": "prefill", "d": "decode", "d2": "decode"}
TOKEN = "a-token-of-the-tests"


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def space(name: str) -> str:
    return f"pdlab{WORKER}-{name}"


@pytest.fixture(scope="module")
def spaces() -> Iterator[None]:
    """A bridge here, and behind it a namespace for each instance."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        with contextlib.ExitStack() as stack:
            ip("link", "add", BRIDGE, "type", "bridge")
            stack.callback(ip, "link", "del", BRIDGE, check=False)
            ip("addr", "add", f"{HOME}/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
            for name, address in ADDRESSES.items():
                ip("netns", "add", space(name))
                stack.callback(ip, "netns", "del", space(name), check=False)
                ip("link", "add", space(name), "type", "veth", "peer", "name", "eth0", "netns", space(name))
                ip("link", "set", space(name), "master", BRIDGE, "up")
                for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    ip("-n", space(name), *command.split())
            yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")


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
def made(spaces: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    server = Far(tmp_path_factory.mktemp("redis"))
    server.start()
    asyncio.run(server.ready())
    try:
        far = server.url.replace("127.0.0.1", HOME)
        with cluster(tmp_path_factory.mktemp("spaces"), tiny, far, token=TOKEN, transfer={"timeout_s": 4}) as found:
            found.start("router", "router")
            for name, role in ROLES.items():
                found.start(name, role, "--host", ADDRESSES[name], inside=("ip", "netns", "exec", space(name)))
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
