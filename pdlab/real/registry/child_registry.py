"""The registry of `pdlab serve --role all`: it is in the parent's memory, and its children reach it over the socket that each inherits.

So a child is a member like any other, which registers, reports and fences itself. When a child dies the socket closes, and it has left;
when the parent dies, its children end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.net.local_peer import stranger
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.store import Change, Claim, Peek, Snapshot, StoreAway

SCHEME = "fd://"
LIMIT_BYTES = 16 << 20


class _Call(msgspec.Struct, frozen=True, array_like=True):
    id: int
    name: str
    arguments: list[Any]


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    id: int
    value: Any = None
    away: str = ""


_read_call = msgspec.msgpack.Decoder(_Call).decode
_read_answer = msgspec.msgpack.Decoder(_Answer).decode


class ParentStore:
    """A `Store`, at a child's end. Use it inside a running loop."""

    where = "the parent's registry"
    poll_s = 1.0

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._closed = False
        self._listening = asyncio.create_task(self._listen(), name="the parent's answers")

    @classmethod
    async def connect(cls, fd: int) -> ParentStore:
        """Raises UsageError where that is no socket of this user's."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise UsageError(f"--registry {SCHEME}{fd}: {error.strerror}; it is for what --role all starts") from None
        if why := stranger(sock):
            sock.close()
            raise UsageError(f"--registry {SCHEME}{fd}: {why}")
        return cls(*await asyncio.open_connection(sock=sock, limit=LIMIT_BYTES))

    async def peek(self, key: str, settle_s: float) -> Peek:
        return Peek(*await self._call("peek", key, settle_s))

    async def claim(self, key: str, seen: Peek, number: int, value: bytes, lease_s: float) -> Claim | None:
        return _claim(await self._call("claim", key, seen, number, value, lease_s))

    async def renew(self, claim: Claim, value: bytes, retake: bool = False) -> Claim | None:
        return _claim(await self._call("renew", claim, value, retake))

    async def put(self, claim: Claim, key: str, value: bytes) -> bool:
        return bool(await self._call("put", claim, key, value))

    async def release(self, claim: Claim) -> None:
        await self._call("release", claim)

    async def snapshot(self) -> Snapshot:
        return Snapshot(*await self._call("snapshot"))

    def changes(self) -> AsyncIterator[Change | None]:
        raise NotImplementedError("children do not watch")

    async def check(self) -> int:
        return int(await self._call("check"))

    async def close(self) -> None:
        self._closed = True
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._writer.close()

    async def _call(self, name: str, *arguments: Any) -> Any:
        if self._listening.done():
            raise StoreAway("the parent has ended")
        self._count += 1
        id = self._count
        made = self._calls[id] = asyncio.get_running_loop().create_future()
        try:
            _send(self._writer, _Call(id, name, list(arguments)))
            return await made
        finally:
            del self._calls[id]

    async def _listen(self) -> None:
        try:
            while (raw := await _receive(self._reader)) is not None:
                answer = _read_answer(raw)
                if (waiting := self._calls.get(answer.id)) is not None and not waiting.done():
                    if answer.away:
                        waiting.set_exception(StoreAway(answer.away))
                    else:
                        waiting.set_result(answer.value)
        finally:
            for waiting in self._calls.values():
                if not waiting.done():
                    waiting.set_exception(StoreAway("the parent has ended"))
            if not self._closed:
                os.kill(os.getpid(), signal.SIGTERM)


def _claim(fields: list[Any] | None) -> Claim | None:
    return None if fields is None else Claim(*fields)


async def answer(store: MemoryStore, sock: socket.socket) -> int:
    """At the parent's end: serve a child until it hangs up, then give up what it held. How often it took a place. Another user's is not
    served."""
    if stranger(sock):
        sock.close()
        return 0
    reader, writer = await asyncio.open_connection(sock=sock, limit=LIMIT_BYTES)
    held: dict[str, Claim] = {}
    taken = 0
    try:
        while (raw := await _receive(reader)) is not None:
            call = _read_call(raw)
            try:
                value = await _performed(store, call)
            except StoreAway as away:
                _send(writer, _Answer(call.id, away=str(away)))
                continue
            if isinstance(value, Claim):
                taken += value.key not in held
                held[value.key] = value
            _send(writer, _Answer(call.id, value))
    finally:
        writer.close()
        for claim in held.values():
            await store.release(claim)
    return taken


async def _performed(store: MemoryStore, call: _Call) -> object:
    match call.name, call.arguments:
        case "peek", [str(key), settle_s]:
            return await store.peek(key, settle_s)
        case "claim", [str(key), seen, number, value, lease_s]:
            return await store.claim(key, Peek(*seen), number, value, lease_s)
        case "renew", [claim, value, retake]:
            return await store.renew(Claim(*claim), value, bool(retake))
        case "put", [claim, str(key), value]:
            return await store.put(Claim(*claim), key, value)
        case "release", [claim]:
            await store.release(Claim(*claim))
            return None
        case "snapshot", []:
            return await store.snapshot()
        case "check", []:
            return await store.check()
    raise AssertionError(f"no store does {call.name}{call.arguments}")


def _send(writer: asyncio.StreamWriter, message: _Call | _Answer) -> None:
    raw = msgspec.msgpack.encode(message)
    writer.write(len(raw).to_bytes(4, "little") + raw)


async def _receive(reader: asyncio.StreamReader) -> bytes | None:
    try:
        head = await reader.readexactly(4)
        return await reader.readexactly(int.from_bytes(head, "little"))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
