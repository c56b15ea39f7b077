"""Readers that are dead, slow, paused or idle."""

from __future__ import annotations

import asyncio
import ctypes
import json
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import bind, serve
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.sockets import UNANSWERED, Reading, Sent, sent
from pdlab.real.transfer.connection import PeerConnection
from tests.real.api.test_trouble import body
from tests.support.echo_engine import EchoEngine

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the options are Linux's")
SO_ATTACH_FILTER = 26
TOKENS = 50_000


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 8), st.booleans(), st.integers(0, 3)), max_size=30))
def test_who_takes_something_now_and_then_is_never_given_up(steps: list[tuple[float, int, bool, int]]) -> None:
    """A dead end is, at once; an idle one when it has taken nothing for the whole time."""
    reading, now, acked, changed_s = Reading(30.0), 0.0, 0, 0.0
    for wait_s, unanswered, pending, more in steps:
        now, acked = now + wait_s, acked + more
        if more or not pending:
            changed_s = now
        why = reading.judge(Sent(unanswered, pending, acked), now)
        if unanswered >= UNANSWERED:
            assert "does not answer" in why
            return
        if why:
            assert now - changed_s >= 30.0 and pending
            return


@asynccontextmanager
async def stream(folder: Path, idle_s: float) -> AsyncIterator[tuple[socket.socket, Service]]:
    """A client that has asked for a stream larger than all buffers, and reads nothing yet."""
    service = Service(EchoEngine(context=2 * TOKENS), Tokenizer.load(folder), "tiny")
    with bind("127.0.0.1", 0) as listening:
        serving = asyncio.create_task(serve(create_app(service), listening, idle_s=idle_s))
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, listening.getsockname())
            asked = json.dumps(body(stream=True, max_tokens=TOKENS)).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
            await loop.sock_sendall(sock, head.encode() + asked)
            try:
                yield sock, service
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)


async def rest(sock: socket.socket) -> bytes:
    found, loop = bytearray(), asyncio.get_running_loop()
    try:
        while part := await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 60):
            found += part
            if found.endswith(b"0\r\n\r\n"):
                break
    except ConnectionError:
        found += b"reset"
    return bytes(found)


@pytest.mark.parametrize("pause_s", [1.0, pytest.param(35.0, marks=pytest.mark.slow)])
def test_a_reader_that_pauses_gets_everything(folder: Path, pause_s: float) -> None:
    async def play() -> bytes:
        async with stream(folder, idle_s=60.0) as (sock, _):
            await asyncio.sleep(pause_s)
            return await rest(sock)

    assert b"[DONE]" in asyncio.run(play())[-200:]


def test_a_reader_that_takes_nothing_for_the_idle_limit_is_hung_up_on(folder: Path) -> None:
    async def play() -> bytes:
        async with stream(folder, idle_s=1.0) as (sock, _):
            await asyncio.sleep(3.0)
            return await rest(sock)

    assert b"[DONE]" not in asyncio.run(play())[-200:]


@pytest.mark.slow
def test_a_dead_reader_is_given_up_soon_though_data_is_under_way(folder: Path) -> None:
    """A socket filter swallows whatever comes: so no acknowledgement goes back, as from a host that is off."""

    async def play() -> float:
        async with stream(folder, idle_s=300.0) as (sock, service):
            await asyncio.sleep(0.5)
            assert service.in_flight
            nothing = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF: return 0
            buffer = ctypes.create_string_buffer(nothing)
            program = struct.pack("HL", 1, ctypes.addressof(buffer))
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
            since_s = time.monotonic()
            while service.in_flight:
                await asyncio.sleep(0.1)
                assert time.monotonic() < since_s + 40
            return time.monotonic() - since_s

    assert asyncio.run(play()) < 30


def test_what_was_not_taken_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as client:
        accepted, _ = listening.accept()
        with accepted:
            accepted.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    accepted.send(bytes(1 << 16))
            time.sleep(0.1)
            stuck = sent(accepted, 0)
            assert stuck is not None and stuck.pending and stuck.unanswered < UNANSWERED
            client.settimeout(0.2)
            with suppress(TimeoutError):
                while client.recv(1 << 20):
                    pass
            moved = sent(accepted, 0)
            assert moved is not None and moved.acked_bytes > stuck.acked_bytes


def test_no_connection_of_ours_ends_a_closed_window() -> None:
    """TCP_USER_TIMEOUT would: for clients, between members, and for KV."""
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()) as sock:
        assert not listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        PeerConnection(sock, None, None)  # type: ignore[arg-type]
        assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5


def test_what_waits_for_a_reader_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads far more slowly than the engine writes gets what was kept for it, then an error; the engine is told at once."""
    monkeypatch.setattr("pdlab.real.api.generate.MOST_BEHIND", 100)

    async def play() -> bytes:
        async with stream(folder, idle_s=60.0) as (sock, service):
            while not service.engine.cancelled:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            assert not service.engine.live  # type: ignore[attr-defined]
            return await rest(sock)

    ended = asyncio.run(play())
    assert b"reader_too_slow" in ended[-600:] and b"[DONE]" in ended[-200:]
