"""Runs the app on a socket that is bound before anything heavy is loaded, and lets it end in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdlab.core.types import UsageError
from pdlab.real.api.metrics import EXPOSITION
from pdlab.real.api.protocol import Protocol
from pdlab.real.api.service import Service
from pdlab.real.net.sockets import Reading, keep_alive, sent
from pdlab.real.net.tls import PLAIN, Tls

log = logging.getLogger(__name__)
LOOK_S = 2.0  # between looks at what readers take
IDLE_S = 300.0


def bind(host: str, port: int) -> socket.socket:
    """A listening address (port 0: any free one). Raises UsageError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited; else each answer waits 40 ms for the client's ACK
    keep_alive(sock)  # inherited, too
    try:
        sock.bind((host, port))
        sock.listen(4096)
    except (OSError, OverflowError) as error:
        sock.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UsageError(f"port {port} on {host} is in use: choose another with --port") from None
        raise UsageError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    sock.setblocking(False)
    return sock


class _UvicornServer(uvicorn.Server):
    """uvicorn without its own signal handlers: `serve` decides."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: Starlette, sock: socket.socket, *, drain_s: float = 30.0, idle_s: float = IDLE_S, tls: Tls = PLAIN) -> int:
    """Serve until SIGTERM or SIGINT, then take nothing new, let what runs end within `drain_s`, and return how many prompts were cut off.
    A second signal: at once. A connection whose reader takes nothing of what waits for it for `idle_s` is given up. May begin while
    `app.state.service` is still None, and be cancelled."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        ssl_certfile=tls.certfile or None,
        ssl_keyfile=tls.keyfile or None,
    )
    if logging.getLogger().handlers:  # else uvicorn brings its own
        for name in ("uvicorn", "uvicorn.error"):
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    server = _UvicornServer(config)
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    running = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(signals.get())
    looking = asyncio.create_task(_look_at_readers(server, idle_s))
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        service: Service | None = app.state.service
        left = 0
        if service is not None:
            left = await _drained(service, signals, drain_s)
        server.should_exit = True
        server.force_exit = not signals.empty()
        await running
        return left
    finally:
        for task in (running, stopping, looking):
            task.cancel()
        await asyncio.gather(running, stopping, looking, return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        sock.close()


@contextlib.asynccontextmanager
async def metrics_beside(app: Starlette, host: str, port: int, tls: Tls = PLAIN) -> AsyncIterator[None]:
    """/metrics of `app`, and its /health, at a port of their own, too, for scrapers that may reach no other; port 0: nowhere else. Raises
    UsageError where it cannot be had."""
    if not port:
        yield
        return

    async def answer(request: Request) -> Response:
        service: Service | None = app.state.service
        if service is None:
            return Response("loading\n", 503)
        if request.url.path == "/health":
            return Response(status_code=200 if service.engine.down is None else 503)
        return Response(service.metrics.exposition(), media_type=EXPOSITION)

    small = Starlette(routes=[Route("/metrics", answer), Route("/health", answer)])
    with contextlib.closing(bind(host, port)) as sock:
        options = {"ssl_certfile": tls.certfile or None, "ssl_keyfile": tls.keyfile or None}
        server = _UvicornServer(uvicorn.Config(small, ws="none", log_level="warning", access_log=False, lifespan="off", **options))  # type: ignore[arg-type]
        running = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.gather(running, return_exceptions=True)


async def _look_at_readers(server: uvicorn.Server, idle_s: float) -> None:
    """Give up connections whose other end is dead or idle. Who merely reads slowly, or pauses, has all the time it wants."""
    readings: dict[object, Reading] = {}
    while True:
        await asyncio.sleep(min(LOOK_S, idle_s / 2))
        connections = list(server.server_state.connections)
        readings = {one: readings.get(one) or Reading(idle_s) for one in connections}
        for one in connections:
            transport: asyncio.Transport | None = getattr(one, "transport", None)
            if transport is None or transport.is_closing():
                continue
            found = sent(transport.get_extra_info("socket"), transport.get_write_buffer_size())
            if found is not None and (why := readings[one].judge(found, time.monotonic())):
                log.warning("a connection from %s is given up: %s", transport.get_extra_info("peername"), why)
                transport.abort()


async def _drained(service: Service, signals: asyncio.Queue[int], drain_s: float) -> int:
    """Prompts still in flight after `drain_s`, a second signal, or the engine's end."""
    service.drain()
    deadline_s = time.monotonic() + drain_s
    while service.in_flight and time.monotonic() < deadline_s and signals.empty() and service.engine.down is None:
        await asyncio.sleep(0.02)
    return service.in_flight
