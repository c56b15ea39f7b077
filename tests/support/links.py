"""A wire that can be slow, or pulled out: what passes between two addresses goes through a `Link`, a stand-in for the network."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
PART_BYTES = 1 << 16
LOOK_S = 0.005


class Link:
    """Passes on what comes in at (`host`, port) to (127.0.0.1, port). `bytes_per_s` 0: as fast as it goes. While `cut` nothing passes, and
    nobody is told; while it `refuses`, connections are closed. `passed` counts bytes from there to whoever connected."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.bytes_per_s = 0.0
        self.cut = self.refuses = False
        self.passed = 0
        self._pipes: set[asyncio.Task[None]] = set()

    async def open(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, self.host, self.port)

    async def close(self) -> None:
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        task.add_done_callback(self._pipes.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            await self._gate()
            back, there = await asyncio.open_connection("127.0.0.1", self.port)
            with contextlib.closing(there):
                ways = [asyncio.ensure_future(self._pass(reader, there)), asyncio.ensure_future(self._pass(back, writer, counted=True))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool = False) -> None:
        while part := await reader.read(PART_BYTES):
            await self._gate()
            writer.write(part)
            await writer.drain()
            if counted:
                self.passed += len(part)
                if self.bytes_per_s:
                    await asyncio.sleep(len(part) / self.bytes_per_s)

    async def _gate(self) -> None:
        while self.cut:
            await asyncio.sleep(LOOK_S)
        if self.refuses:
            raise ConnectionResetError


class Links:
    """They run in a thread of their own, whatever the test does meanwhile."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._opened: list[tuple[Link, asyncio.Server]] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name="links", daemon=True)
        self._thread.start()

    def open(self, host: str, port: int) -> Link:
        """A new one. Raises OSError where the address is taken."""
        link = Link(host, port)
        self._opened.append((link, self._run(link.open())))
        return link

    def close(self) -> None:
        for link, server in self._opened:
            self.loop.call_soon_threadsafe(server.close)
            self._run(link.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _run(self, way: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(way, self.loop).result(10)


@contextlib.contextmanager
def links() -> Iterator[Links]:
    found = Links()
    try:
        yield found
    finally:
        found.close()
