"""Answers of a decode instance that go to the router through the instance that prefilled: `transfer.response_path: via_prefill`.

The router sends the decode leg here, with where it belongs; this instance asks there in its place, and passes on what comes, byte by byte.
When the router hangs up, so does this instance; when the decode instance does, the router is told. It knows nothing of what it passes on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdlab.core.types import UsageError
from pdlab.real.api.app import read
from pdlab.real.api.errors import ApiError, bad, encode, loading
from pdlab.real.api.exchange import Directory
from pdlab.real.api.service import Service
from pdlab.real.net.http import Broken, HttpClient, HttpConnection
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import RELAY_HEADER, TRACE_HEADERS, Carrier, trace_lines

MOST_PEERS = 1024


class Relays:
    """Connections to decode instances that `directory` knows: they are sent `token`. Close it when done."""

    def __init__(self, directory: Directory, token: str = "", tls: Tls = PLAIN) -> None:
        self.directory, self.token, self.tls = directory, token, tls
        self._peers: dict[str, HttpClient] = {}

    async def ask(self, url: str, body: bytes, leg: str, trace: Carrier = ("", "")) -> HttpConnection:
        """The answer's connection, its status known. Raises ApiError where the instance is unknown, or does not answer."""
        await self.directory.check_url(url)
        try:
            peer = self._peers.get(url) or self._connect(url)
            named = b"X-Request-Id: %b\r\n" % leg.encode("ascii") + trace_lines(trace)
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
    above, state = (request.headers.get(name, "") for name in TRACE_HEADERS)
    connection = await relays.ask(request.headers.get(RELAY_HEADER, ""), await read(request), leg, (above, state))
    return PassedOn(connection, status_code=connection.status, media_type="text/event-stream")


class PassedOn(Response):
    """What comes by `connection`, as it comes. Where it breaks off, the last event says so; where the reader hangs up, it is hung up on."""

    def __init__(self, connection: HttpConnection, **options: Any) -> None:
        super().__init__(**options)
        self.connection = connection
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing, leaving = asyncio.create_task(self._pass_on(send)), asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)
            self.connection.leave(self.connection.done)

    async def _pass_on(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        parts: asyncio.Queue[bytes] = asyncio.Queue()
        following = asyncio.create_task(self._follow(parts))
        try:
            while part := await parts.get():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": await following})
        finally:
            following.cancel()

    async def _follow(self, parts: asyncio.Queue[bytes]) -> bytes:
        """Into `parts`, an empty one at the end. What is to be said after them."""

        def take(part: bytes) -> bool:
            parts.put_nowait(part)
            return False

        try:
            await self.connection.follow(take)
        except Broken as trouble:
            error = {"message": str(trouble), "type": "server_error", "param": None, "code": "relay_broken"}
            return b"\n\ndata: " + encode({"error": error}) + b"\n\n"
        else:
            return b""
        finally:
            parts.put_nowait(b"")


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
