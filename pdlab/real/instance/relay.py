"""Answers of a decode instance that go to the router through the instance that prefilled: `transfer.response_path: via_prefill`.

The router sends the decode leg here, with where it belongs; this instance asks there in its place, and passes on what comes, byte by byte.
When either of the three hangs up, so do the others. It knows nothing of what it passes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pdlab.core.types import UsageError
from pdlab.real.api.app import read
from pdlab.real.api.errors import ApiError, bad, loading
from pdlab.real.api.exchange import Directory
from pdlab.real.api.service import Service
from pdlab.real.net.http import Broken, HttpClient, HttpConnection
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import RELAY_HEADER

MOST_PEERS = 1024


class Relays:
    """Connections to decode instances that `directory` knows: they are sent `token`. Close it when done."""

    def __init__(self, directory: Directory, token: str = "", tls: Tls = PLAIN) -> None:
        self.directory, self.token, self.tls = directory, token, tls
        self._peers: dict[str, HttpClient] = {}

    async def ask(self, url: str, body: bytes, leg: str) -> HttpConnection:
        """The answer's connection, its status known. Raises ApiError where the instance is unknown, or does not answer."""
        await self.directory.check_url(url)
        try:
            peer = self._peers.get(url) or self._connect(url)
            named = b"X-Request-Id: %b\r\n" % leg.encode("ascii")
            return await peer.send(peer.request(b"POST", b"/v1/completions", body, named))
        except UsageError as wrong:
            raise bad(f"{RELAY_HEADER}: {wrong}", RELAY_HEADER) from None
        except Broken as trouble:
            raise ApiError(502, f"{url}: {trouble}", code="relay_broken") from None

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _connect(self, url: str) -> HttpClient:
        if len(self._peers) >= MOST_PEERS:
            self._peers.pop(next(iter(self._peers))).close()
        made = self._peers[url] = HttpClient(url, self.token, tls=self.tls)
        return made


async def relayed(service: Service, request: Request) -> Response:
    """POST /pdlab/v1/relay: the leg's body, and in a header the URL of the instance that it is for."""
    relays: Relays | None = getattr(request.app.state, "relays", None)
    if relays is None:
        raise loading()
    leg = request.state.request_id
    if not leg.isascii() or not leg.isprintable():
        raise bad("the leg's name must be printable ASCII", "X-Request-Id")
    connection = await relays.ask(request.headers.get(RELAY_HEADER, ""), await read(request), leg)
    return StreamingResponse(_passed_on(connection), connection.status, media_type="text/event-stream")


async def _passed_on(connection: HttpConnection) -> AsyncIterator[bytes]:
    """What comes, as it comes. Where it breaks off, so does this answer."""
    parts: asyncio.Queue[bytes | None] = asyncio.Queue()

    def take(part: bytes) -> bool:
        parts.put_nowait(part)
        return False

    async def follow() -> None:
        try:
            await connection.follow(take)
        finally:
            parts.put_nowait(None)

    following = asyncio.create_task(follow())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        connection.leave(connection.done)
