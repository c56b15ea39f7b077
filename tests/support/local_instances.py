"""Instances over stand-in engines, each on a free port, in the loop of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette

from pdlab.core.instance_spec import Placed, instance_spec
from pdlab.core.types import Role
from pdlab.real.api.app import create_app
from pdlab.real.api.exchange import KvExchange, SameHost
from pdlab.real.api.http_server import bind
from pdlab.real.api.service import Service
from pdlab.real.instance.control import ROUTES
from pdlab.real.instance.member import Member, measured_of
from pdlab.real.instance.migrate import Migrations
from pdlab.real.instance.registered import Registered
from pdlab.real.instance.relay import Relays
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.registry.registry import Registry
from tests.support.kv_engine import KvEngine

TOKEN = "of-the-cluster"


class Lending(KvEngine):
    async def leased(self, lease: str) -> bool:
        return lease in self.shelf


@dataclass
class Instance:
    url: str
    app: Starlette
    service: Service
    engine: KvEngine
    member: Member
    http: httpx.AsyncClient

    def at_rest(self) -> bool:
        return not (self.engine.live or self.engine.inbound or self.engine.moving or self.service.in_flight)

    async def ask(self, path: str = "/v1/completions", request_id: str = "", **fields: Any) -> httpx.Response:
        return await self.http.post(path, json=fields, headers={"X-Request-Id": request_id} if request_id else {})

    @asynccontextmanager
    async def stream(self, request_id: str = "", **fields: Any) -> AsyncIterator[Stream]:
        headers = {"X-Request-Id": request_id} if request_id else {}
        async with self.http.stream("POST", "/v1/completions", json={"stream": True, **fields}, headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            yield Stream(answer)


class Stream:
    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def next(self) -> Any:
        """The next chunk, or None for [DONE]."""
        async for line in self._lines:
            if line and not line.startswith(":"):
                return None if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream broke off")

    async def event(self) -> Any:
        chunk = await self.next()
        assert chunk["choices"] == []
        return chunk["pdlab"]

    async def rest(self) -> list[Any]:
        found = []
        while (chunk := await self.next()) is not None:
            found.append(chunk)
        return found


def tokens_of(chunks: list[Any]) -> list[int]:
    return [token for chunk in chunks for choice in chunk.get("choices", []) for token in choice["token_ids"]]


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def instance(
    folder: Path, name: str, *, role: Role = Role.MIXED, registry: Registry | None = None, engine: Any = None, **options: Any
) -> AsyncIterator[Instance]:
    """`engine`: a KvEngine, or a real one's client."""
    engine = engine or Lending(name)
    directory = SameHost() if registry is None else Registered(registry)
    migrations = Migrations(engine, TOKEN, directory)
    service = Service(engine, Tokenizer.load(folder), "tiny", token=TOKEN, exchange=KvExchange(engine, migrations, directory=directory))
    app = create_app(service, ROUTES)
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        placed = Placed(name=name, role=role, host="here", url=url, model="tiny", max_seqs=256, max_batch_tokens=8192)
        spec = instance_spec(placed, measured_of(engine.ready))
        app.state.relays = relays = Relays(directory, TOKEN)
        app.state.member = member = Member(service, engine, registry, spec, **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1))
        running = asyncio.create_task(server._serve([sock]))
        try:
            await until(lambda: server.started)
            await member.join()
            async with httpx.AsyncClient(base_url=url, timeout=300, verify=False, headers={"X-PDLab-Token": TOKEN}) as http:
                yield Instance(url, app, service, engine, member, http)
        finally:
            await member.close()
            relays.close()
            await migrations.close()
            server.should_exit = True
            await running
