"""A server at the wire: what it answers is a function of what it is asked, and all it was asked is kept."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
CUT = b""  # in place of a part: hang up
COMPLETIONS = "/v1/completions"
HANG = b"hang"  # in place of a part: say nothing more


@dataclass(frozen=True)
class Reply:
    """`parts` are written one after the other, `gap_s` apart."""

    parts: list[bytes]
    status: int = 200
    gap_s: float = 0.0


def event(body: Body) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def tokens(body: Body, told: Body | None = None, gap_s: float = 0.0) -> Reply:
    """An answer of the length asked for, an event a token, and at its end what the server has to tell."""
    count = body["max_tokens"]
    parts = [
        event({"choices": [{"index": 0, "text": "x", "token_ids": [7], "finish_reason": "length" if k + 1 == count else None}]})
        for k in range(count)
    ]
    parts.append(event({"choices": [], "usage": {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}}))
    if told is not None:
        parts.append(event({"choices": [], "pdlab": told}))
    return Reply([*parts, b"data: [DONE]\n\n"], gap_s=gap_s)


def refusal(status: int, message: str) -> Reply:
    return Reply([json.dumps({"error": {"message": message}}).encode()], status)


@dataclass
class Wire:
    answer: Callable[[Body], Reply]
    url: str = ""
    asked: list[tuple[float, Body]] = field(default_factory=list)  # after the probe
    probes: list[Body] = field(default_factory=list)
    open: int = 0  # completions under way
    most_open: int = 0
    hanging: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                size = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length"))
                raw = await reader.readexactly(size)
                path = lines[0].split()[1]
                self.open += path == COMPLETIONS
                self.most_open = max(self.most_open, self.open)
                try:
                    await self._reply(path, json.loads(raw) if raw else {}, writer)
                finally:
                    self.open -= path == COMPLETIONS
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _reply(self, path: str, body: Body, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            reply = Reply([b'{"data": [{"id": "wired"}]}'])
        elif path == "/version":
            reply = Reply([b'{"version": "9.9"}'])
        elif path == COMPLETIONS:
            if len(body["prompt"]) == 2 and body["max_tokens"] == 1:
                self.probes.append(body)
            else:
                self.asked.append((time.perf_counter(), body))
            reply = self.answer(body)
        else:
            reply = Reply([b"no"], 404)
        writer.write(f"HTTP/1.1 {reply.status} So\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for part in reply.parts:
            if part == CUT:
                raise ConnectionResetError
            if part == HANG:
                self.hanging += 1
                await asyncio.sleep(300)
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
            if reply.gap_s:
                await asyncio.sleep(reply.gap_s)
        writer.write(b"0\r\n\r\n")


@contextmanager
def wired(answer: Callable[[Body], Reply]) -> Iterator[Wire]:
    """A `Wire` on a free port, in a thread of its own."""
    wire, ready = Wire(answer), threading.Event()
    stop: list[Callable[[], None]] = []

    async def run() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
        wire.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        ready.set()
        await ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield wire
    finally:
        stop[0]()
        thread.join(60)
