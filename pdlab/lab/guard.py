"""Who may ask what: the token, the host's name, where a page came from, and how much a body may hold. ASGI, before anything else runs.

A page of another site can make a browser send requests here, but not hide where they come from (Origin, Sec-Fetch-Site), and not read or
set this site's cookie. Without a token a name that is not this host's is refused, so that no DNS entry makes another site this one.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdlab.lab.settings import LabSettings
from pdlab.real.net.credentials import loopback

COOKIE = "pdlab_lab"
LOGIN = "/login"
_OPEN = (LOGIN, "/static/", "/healthz")
_SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"SAMEORIGIN"),
)
CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    b"font-src 'self' data:; form-action 'self'; base-uri 'none'; frame-src 'self'; frame-ancestors 'self'"
)


def session(token: str) -> str:
    """What a browser keeps in place of the token."""
    return hmac.new(token.encode(), b"pdlab lab, session", sha256).hexdigest()


class TurnedAway(Exception):
    """Where the application is asked for more of a body than it may have, it comes from within, and the application answers it."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Guard:
    def __init__(self, app: ASGIApp, settings: LabSettings) -> None:
        self.app, self.settings = app, settings
        self.session = session(settings.token) if settings.token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            self._check_token(scope["path"], headers)
            most = self._most_bytes(scope["path"])
            self._check_length(headers, most)
        except TurnedAway as refused:
            await self._refuse(refused, headers, scope["path"], send)
            return
        await self.app(scope, _BoundedBody(receive, most), _GuardedAnswer(send))

    def _check_host(self, headers: dict[str, str]) -> None:
        name = _host_name(headers.get("host", ""))
        if not self.settings.token and not loopback(name):
            raise TurnedAway(421, f"host {name[:80]!r}: without a token a lab answers to localhost only")

    def _check_origin(self, method: str, headers: dict[str, str]) -> None:
        if method in _SAFE:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if (origin is not None and not _same_site(origin, headers.get("host", ""))) or site not in (None, "same-origin", "none"):
            raise TurnedAway(403, "another site's page asked for this: only the lab's own pages, and programs, may change something")

    def _check_token(self, path: str, headers: dict[str, str]) -> None:
        if not self.session or any(path == one or (one.endswith("/") and path.startswith(one)) for one in _OPEN):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(session(_as_sent(bearer.strip())), self.session):
            return
        if not hmac.compare_digest(_cookie(headers.get("cookie", "")), self.session):
            raise TurnedAway(401, "this lab asks for its token: send Authorization: Bearer TOKEN, or log in with a browser")

    def _most_bytes(self, path: str) -> int:
        return self.settings.most_upload_bytes if path == "/api/v1/uploads" else self.settings.most_body_bytes

    def _check_length(self, headers: dict[str, str], most: int) -> None:
        said = headers.get("content-length", "0")
        if not said.isdecimal() or int(said) > most:
            raise _too_long(most)

    async def _refuse(self, refused: TurnedAway, headers: dict[str, str], path: str, send: Send) -> None:
        found: list[tuple[bytes, bytes]] = [*HEADERS, (b"content-type", b"application/json")]
        status, body = refused.status, json.dumps({"errors": [refused.line], "mistakes": []}).encode()
        if refused.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
            if not path.startswith("/api/") and "text/html" in headers.get("accept", ""):
                status, body = 303, b""
                found.append((b"location", LOGIN.encode()))
        await send({"type": "http.response.start", "status": status, "headers": found})
        await send({"type": "http.response.body", "body": body})


class _BoundedBody:
    """Counts what comes, whatever its head has said."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most, self.came = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.came += len(message.get("body", b""))
        if self.came > self.most:
            raise _too_long(self.most)
        return message


class _GuardedAnswer:
    """Adds what every answer says."""

    def __init__(self, send: Send) -> None:
        self.send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {key.lower() for key, _ in message["headers"]}
            message["headers"] = [*message["headers"], *_missing(there)]
        await self.send(message)


def _as_sent(header: str) -> str:
    """A header's bytes were read as Latin-1; a token is UTF-8."""
    return header.encode("latin-1").decode("utf-8", errors="replace")


def _missing(there: set[bytes]) -> Iterable[tuple[bytes, bytes]]:
    yield from HEADERS
    if b"content-security-policy" not in there:
        yield b"content-security-policy", CSP


def _too_long(most: int) -> TurnedAway:
    return TurnedAway(413, f"the body is longer than {most:,} bytes; send less")


def _same_site(origin: str, host: str) -> bool:
    try:
        return bool(host) and urlsplit(origin).netloc == host
    except ValueError:
        return False


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None or not found.value.isascii() else found.value
