"""HTTP/1.1 to one server: kept-alive connections, one exchange at a time on each. Router, bench, calibration and migrations call by it. It
knows no redirects, cookies or proxies.

They are asyncio protocols over httptools, not a client library, for two reasons. They are cheaper: a request (both legs) costs the router
0.1 ms of CPU, and 0.33 ms by aiohttp, half of what it may cost in all; a streamed token costs the bench 32 to 39 us, and 46 to 49 us by
aiohttp. And what comes of a stream goes to its reader within the socket read that brought it, without a task's turn between, so that the
reader's clock tells when it came. What a peer sends is bounded: heads, and whole answers.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from typing import cast
from urllib.parse import SplitResult, urlsplit

import httptools

from pdlab.core.types import UsageError
from pdlab.real.net.host_names import host_mistake, shown
from pdlab.real.net.sockets import keep_alive
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import TOKEN_HEADER

CONNECT_S, CALL_S = 10.0, 5.0
MOST_HEAD_BYTES, MOST_BODY_BYTES = 64 << 10, 32 << 20
MOST_IDLE = 512
ENDING_S = 1.0  # from a stream's [DONE] to the end of its answer
LOST = "the connection was lost"

_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_SIZE = re.compile(rb"^(content-length|transfer-encoding)[ \t]*:", re.IGNORECASE | re.MULTILINE)

Take = Callable[[bytes], bool]  # that was enough


class Broken(Exception):
    """It came to no end: the server was not reached, hung up, has failed, or answered nonsense."""


class Unheard(Broken):
    """It was not reached, or did not answer in time: that says nothing against what was asked."""


class NoListener(Broken):
    """Nobody listens at its address."""


class Garbled(Broken):
    """What came is no HTTP, or too much of it."""


class HttpConnection(asyncio.Protocol):
    """One exchange at a time. `heard`: something of the answer has come; `done`: all of it has."""

    def __init__(self, pool: HttpClient) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._take: Take | None = None
        self._trouble: Exception | None = None  # that it raised
        self._wrong, self._garbled = "", False
        self.status, self.heard, self.headed, self.done = 0, False, False, True
        self._head, self._interim, self._parts = b"", 0, list[bytes]()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        keep_alive(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and not self._wrong and self._ends_with_connection():
            self.done = True
        self._wrong = self._wrong or (str(exc) if exc else LOST)
        self._pool.forget(self)
        if self._ending is not None:
            self._ending.cancel()
        self._wake()

    def _ends_with_connection(self) -> bool:
        """Has an answer begun that has neither a length nor chunks?"""
        if self.done or not self.headed:
            return False
        head = _BLANK_LINE.split(self._head, self._interim + 1)[self._interim]
        return _SIZE.search(head) is None

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if not self.headed:
            self._head += data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"no HTTP: {error}")
        if not self.headed and len(self._head) > MOST_HEAD_BYTES:
            self._fail("the head of the answer is too long")
        if self._take is None:
            self._wake()
        else:
            self._pass_on(self._take)

    def on_message_begin(self) -> None:
        if self.done:
            self._fail("an answer that nobody asked for")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100, 102, 103: the answer itself comes after it
            self._interim += 1
        else:
            self.status, self.headed = status, True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self.headed:
            return
        self.done = True
        if not self._parser.should_keep_alive():
            self._wrong = self._wrong or LOST
        if self._ending is not None:
            self.leave(True)

    def ask(self, request: bytes, take: Take | None = None) -> None:
        assert self._transport is not None
        self.status, self.heard, self.headed, self.done = 0, False, False, False
        self._head, self._interim, self._parts = b"", 0, []
        self._take, self._trouble = take, None
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for the status, or with a `take` for the end. Raises Broken."""
        while not self.headed:
            await self._news()

    async def follow(self, take: Take) -> None:
        """Give the body to `take`, each part when it comes, until that says True or all has come. Raises Broken, and what `take` raises."""
        try:
            if self._trouble is None:
                self._take = take
                self._pass_on(take)
            while self._take is not None and not self.done:
                await self._news()
            if self._trouble is not None:
                raise self._trouble
        finally:
            self._take = self._trouble = None

    async def whole(self) -> bytes:
        """The body. Raises Broken."""
        found = bytearray()

        def take(part: bytes) -> bool:
            found.extend(part)
            if len(found) > MOST_BODY_BYTES:
                raise Garbled("the answer is too long")
            return False

        await self.follow(take)
        return bytes(found)

    def _pass_on(self, take: Take) -> None:
        if self._parts:
            part = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            try:
                if take(part):
                    self._take = None
            except Exception as trouble:
                self._take, self._trouble = None, trouble
        if self._take is None or self.done or self._wrong:
            self._wake()

    def leave(self, ended: bool) -> None:
        """The exchange is over. `ended`: its last byte is here or must come at once, and the connection can serve another; else it is
        closed."""
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        if ended and self.done and not self._wrong and self.open:
            self._pool.idle(self)
        elif ended and not self.done and not self._wrong:
            self._ending = asyncio.get_running_loop().call_later(ENDING_S, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, why: str) -> None:
        if not self._wrong:
            self._wrong, self._garbled = why, True
        self.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self) -> None:
        if self._wrong:
            raise (Garbled if self._garbled else Broken)(self._wrong)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def server_at(url: str) -> tuple[SplitResult, str, int | None]:
    """A server's URL in parts, its host and its port. Raises UsageError where no connection could be made by it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise UsageError(f"a server's url must be like http://host:8000, not {shown(url)!r}")
    if mistake := host_mistake(host):
        raise UsageError(f"{shown(url)} is no server's url: {mistake}")
    return parts, host, port


def _host_header(parts: SplitResult, host: str) -> str:
    said = parts.netloc.rpartition("@")[2]
    return said if said.isascii() else host.encode("idna").decode() + (f":{parts.port}" if parts.port else "")


class HttpClient:
    """Kept-alive connections to one server, `most_idle` of them at rest; `opened` counts all that there were. `tls` says whom to believe
    where the URL says https. Raises UsageError where `url`, `token`, `api_key` or `tls` cannot be used."""

    def __init__(
        self,
        url: str,
        token: str = "",
        api_key: str = "",
        tls: Tls = PLAIN,
        *,
        connect_s: float = CONNECT_S,
        most_idle: int = MOST_IDLE,
    ) -> None:
        parts, host, port = server_at(url)
        self._ssl = tls.trusting() if parts.scheme == "https" else None
        for name, value in (("token", token), ("API key", api_key)):
            if not value.isascii() or not value.isprintable():
                raise UsageError(f"the {name} must be printable ASCII to go into an HTTP header")
        self.url, self._host, self._port = url, host, port or (443 if self._ssl else 80)
        self._prefix = parts.path.rstrip("/").encode()
        head = f"Host: {_host_header(parts, host)}\r\nContent-Type: application/json\r\n"
        head += f"{TOKEN_HEADER}: {token}\r\n" if token else ""
        head += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = head.encode("ascii")
        self._connect_s, self._most_idle = connect_s, most_idle
        self._idle: dict[HttpConnection, None] = {}
        self._all: set[HttpConnection] = set()
        self.opened = 0

    def request(self, method: bytes, path: bytes, body: bytes = b"", headers: bytes = b"") -> bytes:
        """Its bytes. Each of `headers` ends its line."""
        return b"%b %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (method, self._prefix, path, self._head, headers, len(body), body)

    async def send(self, request: bytes, take: Take | None = None) -> HttpConnection:
        """Send, and wait for the status. One that was kept alive may turn out to have been closed meanwhile; then another is tried. Raises
        Broken."""
        while True:
            kept = self._kept()
            connection = kept or await self._connect()
            try:
                connection.ask(request, take)
                await connection.head()
                return connection
            except Broken:
                connection.abort()
                if kept is None or kept.heard:
                    raise
            except BaseException:
                connection.abort()
                raise

    async def stream(self, request: bytes, take: Take) -> int:
        """Send, and give all of the answer's body to `take`, each part within the socket read that brought it. Its status. Raises Broken,
        and what `take` raises."""
        connection = await self.send(request, take)
        try:
            await connection.follow(take)
            return connection.status
        finally:
            connection.leave(connection.done)

    async def call(
        self, method: bytes, path: bytes, body: bytes = b"", within_s: float = CALL_S, headers: bytes = b""
    ) -> tuple[int, bytes]:
        """(status, body) of a small exchange. Raises Broken."""
        try:
            async with asyncio.timeout(within_s):
                connection = await self.send(self.request(method, path, body, headers))
                try:
                    return connection.status, await connection.whole()
                finally:
                    connection.leave(connection.done)
        except TimeoutError:
            raise Unheard(f"{self.url} did not answer within {within_s:g} s") from None

    def close(self) -> None:
        """All of them, at once; whatever is under way breaks."""
        for connection in list(self._all):
            connection.abort()

    def idle(self, connection: HttpConnection) -> None:
        if len(self._idle) < self._most_idle:
            self._idle[connection] = None
        else:
            connection.abort()

    def forget(self, connection: HttpConnection) -> None:
        self._idle.pop(connection, None)
        self._all.discard(connection)

    def _kept(self) -> HttpConnection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(lambda: HttpConnection(self), self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            raise Unheard(f"cannot connect to {self.url} within {self._connect_s:g} s") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or error
            raise (NoListener if isinstance(error, ConnectionRefusedError) else Unheard)(f"cannot connect to {self.url}: {why}") from None
        self._all.add(connection)
        self.opened += 1
        return connection
