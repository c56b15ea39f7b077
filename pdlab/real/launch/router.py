"""The router's process: the OpenAI API over a cluster whose members come and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pdlab.core.endless_hooks import watched
from pdlab.core.router import Router
from pdlab.core.types import InstanceSpec, Role, UsageError
from pdlab.experiment import make_router as control
from pdlab.experiment.deployment import Deployment
from pdlab.real.api.app import Route, as_json, create_app
from pdlab.real.api.cors import NO_PAGES, Cors
from pdlab.real.api.errors import ApiError, encode
from pdlab.real.api.http_server import IDLE_S, bind, metrics_beside, serve
from pdlab.real.api.service import Service
from pdlab.real.launch.child_instances import Children
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net import credentials
from pdlab.real.net.host_names import url_of, wildcard
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.registry import Registry
from pdlab.real.registry.store import StoreAway
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.onlooker import MOST_SHOWN
from pdlab.real.router.roster import Members, follow, lead, protocol_of
from pdlab.real.router.status import view_of
from pdlab.real.router.world import LiveWorld
from pdlab.replay.log import EventLog, head_of

if TYPE_CHECKING:
    from pdlab.real.api.traces import Traces

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
LOOK_S = 0.05  # between looks whether all have joined
MOST_TRACE_BYTES = 1 << 18  # of the event log in one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFront:
    """Where clients come in. `token` is the cluster's internal one, `upstream_api_key` that of vLLM servers; `asks_token` is what this
    router's own /pdlab asks for where the cluster has made its token for itself (empty: nothing). `max_requests` holds where the experiment
    has no `limits.max_in_flight`. Without an API key /v1 is `open_to_clients`, or asks for the token. `context_tokens`: the model's bound
    on prompt plus output (0: not known). `advertise` is the host by which others
    reach it where it listens on every address. With `traceback` a policy's mistake is logged with all that Python says of it."""

    name: str
    model: str
    tokenizer: Tokenizer
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int = 0
    api_key: str | None = None
    token: str = ""
    upstream_api_key: str = ""
    max_requests: int = 1024
    drain_s: float = 30.0
    idle_s: float = IDLE_S
    context_tokens: int = 0
    trace_events: Path | None = None
    traceback: bool = False
    tool_parser: str = ""
    asks_token: str | None = None
    open_to_clients: bool = True
    tls: Tls = PLAIN
    cors: Cors = NO_PAGES
    traces: Traces | None = None
    advertise: str = ""

    @property
    def guard(self) -> str:
        return self.token if self.asks_token is None else self.asks_token


@dataclass(frozen=True, slots=True)
class ChildInstances:
    """The instances that a router starts itself: the `first` ones by name, and more of a role where the policy scales. `command` starts one
    of that name and role, given its socket's number."""

    children: Children
    first: Mapping[str, Role]
    command: Callable[[str, Role, int], list[str]]

    async def all_joined(self, members: Members) -> None:
        """Start the first ones, and wait until all have a place."""
        for name, role in self.first.items():
            self.children.add(name, partial(self.command, name, role))
        while not all((known := members.known.get(name)) and not known.refusal for name in self.first):
            await asyncio.sleep(LOOK_S)

    async def scale(self, role: Role) -> None:
        """One more, under a name that nobody has had."""
        name = next(name for n in count() if (name := f"{role}-{n}") not in self.children.names)
        self.children.say(f"starting {name}, which the policy asks for")
        self.children.add(name, partial(self.command, name, role), needed=False)


class ClusterService(Service):
    """How many requests are too many its router says. Where nobody can serve it says who is missing."""

    def __init__(self, engine: ClusterEngine, front: RouterFront, members: Members) -> None:
        super().__init__(
            engine,
            front.tokenizer,
            front.model,
            max_requests=None,
            api_key=front.api_key,
            token=front.guard or None,
            tool_parser=front.tool_parser,
            open_to_clients=front.open_to_clients,
            traces=front.traces,
        )
        self.members, self.router = members, engine.world.router

    def not_ready(self) -> list[str]:
        reasons = super().not_ready()
        if self.router.overloaded:
            most = self.router.limits.max_in_flight
            reasons.append(f"overloaded: {len(self.router.cluster.live)} requests in flight, at most {most}")
        if self.engine.down is not None or not self.router.cluster.ready:
            there = sorted(self.members.known.items())
            who = ", ".join(f"{name} ({known.spec.role}) is {known.state}" for name, known in there) or "nobody is registered"
            reasons.append(f"no instance can prefill or decode: {who}")
        return reasons


class Connected:
    """The Remotes of a World, the latest of each name."""

    def __init__(self, front: RouterFront) -> None:
        self.front = front
        self.remotes: dict[str, HttpRemote] = {}

    def connect(self, spec: InstanceSpec) -> HttpRemote:
        if (before := self.remotes.get(spec.name)) is not None:
            before.close()
        api_key = "" if spec.engine == "pdlab" else self.front.upstream_api_key
        made = self.remotes[spec.name] = HttpRemote(spec, token=self.front.token, api_key=api_key, tls=self.front.tls)
        return made

    def close(self) -> None:
        for remote in self.remotes.values():
            remote.close()


def _told_url(front: RouterFront, port: int) -> str:
    """Where others reach it; empty where it listens on every address and nobody has said which one is for others."""
    host = front.advertise or ("" if wildcard(front.host) else front.host)
    return url_of(host, port, front.tls.scheme) if host else ""


async def route(
    deployment: Deployment, front: RouterFront, registry: Registry, *, child_instances: ChildInstances | None = None, say: Say = print
) -> None:
    """Bind, follow the registry, serve, drain. Raises UsageError on mistakes."""
    started_s = time.monotonic()
    if deployment.limits.max_in_flight is None:
        deployment = deployment.with_({"limits.max_in_flight": front.max_requests})
    blocks = [deployment.engine.block_tokens, *(one.engine.block_tokens for one in deployment.placements())]
    router = control.router(deployment, hash_tokens=math.lcm(*blocks))  # prefixes that end with a block of every instance
    connected, members = Connected(front), Members(front.model)
    with (
        contextlib.ExitStack() as opened,
        contextlib.closing(bind(front.host, front.port)) as sock,
        watched(router.policy),
        event_log(deployment, router, front.trace_events) as log,
    ):
        world = LiveWorld(
            router,
            connected.connect,
            transfer=deployment.transfer,
            now=lambda: time.monotonic() - started_s,
            log=log,
            seed=deployment.seed,
            start=None if child_instances is None else child_instances.scale,
            traceback=front.traceback,
            traces=front.traces,
        )
        engine = ClusterEngine(world, front.model, front.tokenizer.vocab, context_tokens=front.context_tokens)
        app = create_app(None, _routes(registry, members, world, log), front.cors)  # answers "loading" until it has a service
        beside = contextlib.AsyncExitStack()
        await beside.enter_async_context(metrics_beside(app, front.host, front.metrics_port, front.tls))
        serving = asyncio.create_task(serve(app, sock, drain_s=front.drain_s, idle_s=front.idle_s, tls=front.tls))
        jobs: list[asyncio.Future[Any]] = [
            serving,
            asyncio.create_task(
                follow(registry, world.instances, members, ask=partial(protocol_of, token=front.token, tls=front.tls), say=say)
            ),
            asyncio.create_task(lead(registry, world.instances, front.name, url=_told_url(front, sock.getsockname()[1]))),
        ]
        try:
            if child_instances is not None:
                jobs.append(child_instances.children.failed)
                await _first_of(jobs, asyncio.create_task(child_instances.all_joined(members)))
            world.open()  # no sooner: the policy would scale up for want of those that still start
            if not serving.done():
                app.state.service = ClusterService(engine, front, members)
                host, port = f"[{front.host}]" if ":" in front.host else front.host, sock.getsockname()[1]
                where = f"{front.tls.scheme}://{host}:{port}"
                if front.asks_token is not None:
                    try:
                        opened.enter_context(credentials.kept(port, front.token))
                    except UsageError as error:
                        say(f"pdlab drain and switch will lack the token: {error}")
                say(f"{front.model}: {len(members.known) or 'no'} instances have joined")
                say(f"ready after {time.monotonic() - started_s:.1f} s: {where}/v1")
                await _first_of(jobs)
            if left := serving.result():
                say(f"stopped with {left} requests unfinished")
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await beside.aclose()
            await world.close()
            connected.close()
            if child_instances is not None:
                await child_instances.children.close()


async def _first_of(jobs: list[asyncio.Future[Any]], *more: asyncio.Future[None]) -> None:
    """Wait until one has ended; raises what it raised. Those of `more` are cancelled then."""
    try:
        done, _ = await asyncio.wait((*jobs, *more), return_when=asyncio.FIRST_COMPLETED)
        for job in done:
            job.result()
    finally:
        for job in more:
            job.cancel()


@contextmanager
def event_log(deployment: Deployment, router: Router, path: Path | None) -> Iterator[EventLog | None]:
    """The event log that `pdlab replay` reads. Raises UsageError where it cannot be opened."""
    if path is None:
        yield None
        return
    try:
        log = EventLog(path, head_of(deployment, router.policy, router.cluster.hash_tokens), warn=logger.warning)
    except OSError as error:
        raise UsageError(f"--trace-events {path}: {error.strerror}") from None
    with log:
        yield log


def _routes(registry: Registry, members: Members, world: LiveWorld, log: EventLog | None) -> tuple[Route, ...]:
    log_id = uuid.uuid4().hex  # a router that is started again writes another log

    async def cluster(service: Service, request: Request) -> Response:
        try:
            return as_json(await view_of(registry, members))
        except StoreAway as away:
            raise ApiError(503, f"the registry does not answer: {away}", code="registry_away") from None

    async def requests(service: Service, request: Request) -> Response:
        most = _number(request, "limit", 200, MOST_SHOWN)
        return as_json({"now_s": world.now(), "requests": world.lines.latest(most)})

    async def events(service: Service, request: Request) -> Response:
        return as_json(world.onlooker.after(_number(request, "after", 0, 1 << 53)))

    async def trace(service: Service, request: Request) -> Response:
        """A line of the log's id and length, then so many of its own lines as one answer may have."""
        if log is None:
            raise ApiError(409, "this router keeps no event log: start it with --trace-events FILE", code="no_event_log")
        try:
            lines, size = log.since(_number(request, "offset", 0, 1 << 53), MOST_TRACE_BYTES)
        except OSError as error:
            raise ApiError(409, f"the event log cannot be read: {error.strerror or error}", code="no_event_log") from None
        about = encode({"log": log_id, "bytes": size, "stopped": log.stopped})
        return Response(about + b"\n" + lines, media_type="application/x-ndjson")

    return (
        ("GET", "/pdlab/v1/cluster", cluster),
        ("GET", "/pdlab/v1/requests", requests),
        ("GET", "/pdlab/v1/events", events),
        ("GET", "/pdlab/v1/trace", trace),
    )


def _number(request: Request, name: str, otherwise: int, most: int) -> int:
    """Of the query. Raises ApiError."""
    text = request.query_params.get(name, str(otherwise))
    if not (text.isascii() and text.isdecimal() and len(text) < 17):
        raise ApiError(400, f"{name} must be a number, not {text[:40]!r}")
    return min(int(text), most)
