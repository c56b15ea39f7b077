from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from tests.real.transfer.peer import Peer
from tests.real.transfer.ways import CUDA_IPC, NIXL

os.environ.setdefault("UCX_NET_DEVICES", "lo")  # else NIXL listens on every interface


@pytest.fixture(params=["tcp", "shm", "shm staged", CUDA_IPC, NIXL])
def way(request: pytest.FixtureRequest) -> tuple[str, bool]:
    """(transport, is the KV memory shared?)."""
    return request.param.split()[0], request.param == "shm"


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    """A process that all tests share; what they make in it has names of its own."""
    found = Peer()
    yield found
    found.close()


@pytest.fixture
def mortal() -> Iterator[Peer]:
    """A process to be killed."""
    found = Peer()
    yield found
    found.close()


_names = count()


@pytest.fixture
def name() -> str:
    """One that nothing else has."""
    return f"peer-{next(_names)}"
