from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from pdlab.real.registry import lease
from tests.support.registry_worlds import SERVERS, MemoryWorld, RegistryWorld, Server

PACKAGES = {"etcd": "etcd3aio", "redis": "redis"}


def missing(kind: str) -> str:
    binary = SERVERS[kind].binary
    if shutil.which(binary) is None:
        return f"no {binary} on the PATH: apt-get install {kind}-server"
    try:
        __import__(PACKAGES[kind])
    except ImportError:
        return f"pip install {PACKAGES[kind]}"
    return ""


@pytest.fixture(scope="session")
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Starts servers that no other test shares: they may be killed."""
    with contextlib.ExitStack() as stack:

        def new(kind: str) -> Server:
            if reason := missing(kind):
                pytest.skip(reason)
            server = SERVERS[kind](tmp_path_factory.mktemp(kind))
            stack.callback(server.stop)
            server.start()
            asyncio.run(server.ready())
            return server

        yield new


@pytest.fixture(scope="session")
def shared(new_server: Callable[[str], Server]) -> Callable[[str], Server]:
    """One server of a kind for all tests that leave it alone, each with its own namespace."""
    servers: dict[str, Server] = {}
    numbers = count()

    def get(kind: str) -> Server:
        server = servers.get(kind) or servers.setdefault(kind, new_server(kind))
        server.namespace = f"test{next(numbers)}"
        return server

    return get


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim waits for a real server on a slow disk."""
    monkeypatch.setattr(lease, "CALL_S", 60.0)


@pytest.fixture(params=["memory", *SERVERS])
def world(request: pytest.FixtureRequest, shared: Callable[[str], Server], patient: None) -> RegistryWorld:
    return MemoryWorld() if request.param == "memory" else shared(request.param)


@pytest.fixture(params=["memory", *SERVERS])
def mortal(request: pytest.FixtureRequest, new_server: Callable[[str], Server], patient: None) -> Iterator[RegistryWorld]:
    """A world whose store the test may kill."""
    if request.param == "memory":
        yield MemoryWorld()
        return
    server = new_server(request.param)
    yield server
    server.stop()


@pytest.fixture(params=list(SERVERS))
def server(request: pytest.FixtureRequest, shared: Callable[[str], Server], patient: None) -> Server:
    return shared(request.param)
