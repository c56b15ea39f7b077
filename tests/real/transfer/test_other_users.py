"""A process of another user on this host: it gets nothing over a local transport, whatever it knows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pdlab.real.transfer import wire
from pdlab.real.transfer.descriptor import Shm, decode
from tests.real.transfer.peer import endpoint, memory

NOBODY = 65534
TOKEN = "of-the-cluster"
DROP = f"import os, socket, sys\nos.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
# Says Hello as an endpoint does, and tells how many bytes and descriptors come back.
CALLS = DROP + (
    "sock = socket.socket(socket.AF_UNIX); sock.settimeout(20); sock.connect('\\0' + sys.argv[1])\n"
    "try:\n    sock.sendall(bytes.fromhex(sys.argv[2])); got, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)\n"
    "except OSError:\n    got, fds = b'', []\n"
    "print(len(got), len(fds), flush=True)\n"
)
# Listens, and tells how many bytes come.
LISTENS = DROP + (
    "sock = socket.socket(socket.AF_UNIX); sock.bind('\\0' + sys.argv[1]); sock.listen(); print('listens', flush=True)\n"
    "peer, _ = sock.accept(); peer.settimeout(20)\n"
    "try:\n    got = peer.recv(1 << 16)\n"
    "except OSError:\n    got = b''\n"
    "print(len(got), flush=True)\n"
)
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def start(script: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-S", "-c", script, *words], stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=60)[0].strip()
    finally:
        process.kill()


@pytest.mark.parametrize("token", ["", TOKEN])
def test_who_calls_as_another_user_gets_no_byte_and_no_memory(token: str) -> None:
    async def main() -> None:
        async with endpoint(memory(8, seed=1, shared=True), "shm", name="p", token=token) as owner:
            shm = decode(owner.descriptor()).shm
            assert shm is not None and shm.mapped
            hello = wire.frame(wire.Hello(owner.descriptor(), b"n" * wire.NONCE_BYTES))
            assert await asyncio.to_thread(said, start(CALLS, shm.socket, hello.hex())) == "0 0"
            ours = start(CALLS.removeprefix(DROP).join(("import socket, sys\n", "")), shm.socket, hello.hex())
            assert (await asyncio.to_thread(said, ours)).split()[0] != "0"  # this user is answered

    asyncio.run(main())


def test_an_address_that_another_user_took_is_told_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            endpoint(memory(8, seed=1, shared=True), "shm", name="p") as away,
            endpoint(memory(8, seed=2, shared=True), "shm", name="d") as owner,
        ):
            taken = f"pdlab-test-{os.getpid()}"
            listener = start(LISTENS, taken)
            assert listener.stdout is not None and await asyncio.to_thread(listener.stdout.readline) == "listens\n"
            poisoned = msgspec.structs.replace(decode(away.descriptor()), shm=Shm(taken, True))
            result = await owner.pull(poisoned.encode(), "lease", [1], [1], deadline_s=10.0)
            assert result.status == "failed" and f"users {NOBODY} and 0" in result.reason
            assert await asyncio.to_thread(said, listener) == "0"

    asyncio.run(main())
