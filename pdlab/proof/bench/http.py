"""A thin HTTP/1.1 client: connections kept alive, one request at a time on each, bytes handed on with the time of the socket read that
brought them. Chosen over aiohttp, whose bytes bear no such time and cost more: 50 streams of 50 tokens/s took 32 to 39 us of CPU a token
here, a tenth of a core at most, and 46 to 49 us there. It knows no redirects, cookies or proxies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import httptools

from pdlab.core.types import UsageError
from pdlab.real.net.tls import PLAIN, Tls

Clock = Callable[[], float]
CONNECT_S = 10.0


class ServerLost(Exception):
    """The server could not be reached, or went away in the middle of an answer."""


class BenchExchange:
    """One request's answer as it comes. This one keeps the body whole."""

    def __init__(self) -> None:
        self.status = 0
        self.content = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def body(self, part: bytes, now: float) -> None:
        """A part of the body has come, at `now` on the client's clock."""
        self.content += part


class BenchConnection(asyncio.Protocol):
    """A socket, and the exchange under way on it."""

    def __init__(self, clock: Clock, idle: list[BenchConnection]) -> None:
        self._clock, self._idle = clock, idle
        self._exchange: BenchExchange | None = None
        self._now = 0.0
        self._until_close = False  # the answer has neither a length nor chunks: it ends with the connection
        self.used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes, exchange: BenchExchange) -> None:
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._until_close = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError):
            self.connection_lost(ServerLost("what came is not HTTP"))
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_close = False

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        if self._exchange is not None:
            self._exchange.body(part, self._now)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 100, 102, 103: the answer itself comes after it
            self._until_close = True
            return
        exchange, self._exchange = self._exchange, None
        if self._parser.should_keep_alive():
            self.used = True
            self._idle.append(self)
        else:
            self.transport.close()
        if exchange is not None and not exchange.ended.done():
            exchange.ended.set_result(None)

    def connection_lost(self, why: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.ended.done():
            return
        if why is None and self._until_close and exchange.status >= 200:
            exchange.ended.set_result(None)
        else:
            exchange.ended.set_exception(why if isinstance(why, ServerLost) else ServerLost("the connection was lost"))


class BenchClient:
    """Requests to one server. `opened` counts connections. Use within `async with`."""

    def __init__(self, url: str, clock: Clock, api_key: str | None = None, tls: Tls = PLAIN) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise UsageError(f"--url {url}: give a server's address, such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._ssl = tls.trusting() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._clock = clock
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{key}"
        self._idle: list[BenchConnection] = []
        self._busy: set[BenchConnection] = set()
        self.opened = 0

    async def __aenter__(self) -> BenchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.transport.abort()
        await asyncio.sleep(0)  # each is told so

    def request(self, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """The bytes of a POST, or without a body of a GET."""
        head = f"{'POST' if body else 'GET'} {self._path}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        if body:
            head += "Content-Type: application/json\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def send(self, request: bytes, exchange: BenchExchange) -> None:
        """Until the answer is there. Cancelled, the connection is closed. Raises Lost."""
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            again = connection.used
            connection.send(request, exchange)
            self._busy.add(connection)
            try:
                await exchange.ended
            except asyncio.CancelledError:
                connection.transport.abort()
                raise
            except ServerLost:
                if not again or exchange.status:
                    raise
                exchange.ended = asyncio.get_running_loop().create_future()  # it was closed for idleness while we wrote
            else:
                return
            finally:
                self._busy.discard(connection)

    async def get(self, path: str) -> BenchExchange:
        exchange = BenchExchange()
        async with asyncio.timeout(CONNECT_S):
            await self.send(self.request(path), exchange)
        return exchange

    async def _connect(self) -> BenchConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await loop.create_connection(
                    lambda: BenchConnection(self._clock, self._idle), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError:
            raise ServerLost(f"no connection within {CONNECT_S:g} s") from None
        except OSError as error:
            raise ServerLost(f"cannot connect ({error.strerror or error})") from None
        self.opened += 1
        return made
