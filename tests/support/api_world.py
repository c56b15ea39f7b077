"""An app over a stand-in engine, on a free port, in a thread of this process, so that tests see both ends."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from pdlab.real.api.app import create_app
from pdlab.real.api.cors import NO_PAGES, Cors
from pdlab.real.api.http_server import bind
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from tests.support.echo_engine import EchoEngine
from tests.support.waiting import until

JSON = {"Content-Type": "application/json"}


@dataclass
class ApiWorld:
    url: str
    app: Starlette
    service: Service
    engine: EchoEngine
    loop: asyncio.AbstractEventLoop

    def at_rest(self) -> bool:
        return not self.engine.live and not self.service.in_flight

    def call(self, what: Callable[[], Any]) -> None:
        """In the server's own thread."""
        self.loop.call_soon_threadsafe(what)


@contextmanager
def served(folder: Path, *, engine: EchoEngine | None = None, cors: Cors = NO_PAGES, **options: Any) -> Iterator[ApiWorld]:
    engine = engine or EchoEngine()
    service = Service(engine, Tokenizer.load(folder), "tiny", **options)
    app = create_app(service, cors=cors)
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        until(lambda: server.started)
        yield ApiWorld(f"http://127.0.0.1:{sock.getsockname()[1]}", app, service, engine, loops[0])
    finally:
        server.should_exit = True
        thread.join(240)  # a machine may be busy
        sock.close()
        if thread.is_alive():
            faulthandler.dump_traceback(sys.__stderr__)
            raise AssertionError(f"the server does not end: {[task.get_stack() for task in asyncio.all_tasks(loops[0])]}")
