"""`pdlab serve`: from the command line and an experiment to a server that answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pdlab.core import garbage_collection
from pdlab.core.instance_spec import Placed, instance_spec
from pdlab.core.types import Role, UsageError
from pdlab.cost import InstanceProfile, model_names
from pdlab.experiment import spellings
from pdlab.experiment.cluster import Placement, SpeculationSpec
from pdlab.experiment.deployment import Deployment
from pdlab.real.api.app import create_app
from pdlab.real.api.cors import NO_PAGES, Cors
from pdlab.real.api.exchange import Directory, KvExchange, SameHost
from pdlab.real.api.http_server import IDLE_S, bind, metrics_beside, serve
from pdlab.real.api.service import Service
from pdlab.real.api.tools import parser_of
from pdlab.real.engine.memory import check_cpu_kv
from pdlab.real.engine.options import EngineOptions, SpeculationOptions
from pdlab.real.host.logs import tell
from pdlab.real.instance.control import ROUTES
from pdlab.real.instance.engine_client import EngineClient
from pdlab.real.instance.member import Member, measured_of
from pdlab.real.instance.migrate import Migrations
from pdlab.real.instance.registered import NamedByProxies, Registered
from pdlab.real.instance.relay import Relays
from pdlab.real.launch.drafts import parsed
from pdlab.real.models.gguf_file import default_model
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.host_names import url_of
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.registry import Registry, open_registry
from pdlab.real.registry.child_registry import SCHEME, ParentStore
from pdlab.real.registry.wait import patiently

if TYPE_CHECKING:
    from pdlab.real.api.traces import Traces

EMBEDDED = ("smollm2-135m", "smollm2-135m-instruct")
Say = Callable[[str], None]
LOOK_S = 0.1
STILL_S = 10.0  # between two lines of a stage that lasts


def engine_options(deployment: Deployment | None, given: Mapping[str, object], placed: Placement | None = None) -> EngineOptions:
    """What the deployment says of the model and its engines (of the instance that is `placed`), replaced by what the command line gives.
    Raises UsageError where there are no weights."""
    found: dict[str, Any] = {}
    if deployment is not None:
        engine = placed.engine if placed is not None else deployment.engine
        found = {
            "device": placed.device if placed is not None else deployment.device,
            "tp": placed.parallel.tp if placed is not None else 1,
            "ep": placed.parallel.ep if placed is not None else 1,
            "dtype": deployment.dtype,
            "kv_cache_dtype": engine.kv_cache_dtype,
            "quantization": deployment.quantization or "",
            "block_tokens": engine.block_tokens,
            "max_batch_tokens": engine.max_batch_tokens,
            "max_seqs": engine.max_seqs,
            "batching": engine.batching,
            "prefix_cache": engine.prefix_cache,
            "watermark": engine.watermark,
            "hbm_utilization": engine.hbm_utilization,
            "kv_blocks": engine.kv_blocks or 0,
            "max_model_len": engine.max_model_len or 0,
            "speculation": engine.speculation,
            "seed": deployment.seed,
            "ttft_slo_s": deployment.slo.ttft_s,
            "tpot_slo_s": deployment.slo.tpot_s,
        }
    whole = found.get("ep", 1) > 1 and found["ep"] == found["tp"]
    found |= {key: value for key, value in given.items() if value is not None}
    if (spread := found.pop("enable_expert_parallel", None)) is not None or (whole and given.get("tp")):
        found["ep"] = found.get("tp", 1) if spread is not False else 1
    config = found.pop("speculative_config", None)
    speculation = found.pop("speculation", None) if config is None else parsed(str(config))
    if given.get("kv_gib") is not None:
        found["kv_blocks"] = 0
    dummy = found.get("load_format") == "dummy"
    name = given.get("model") or (deployment.model if deployment is not None else "")
    base = deployment.base_dir if deployment is not None and not given.get("model") else Path()
    drafts = speculation_options(speculation, deployment.base_dir if deployment is not None and config is None else Path(), dummy)
    return EngineOptions(**{**found, "model": str(model_path(str(name), base, dummy)), "speculation": drafts})


def speculation_options(spec: SpeculationSpec | None, base_dir: Path, dummy: bool) -> SpeculationOptions | None:
    """Raises UsageError where the model that drafts has no weights."""
    if spec is None or spec.method == "mtp":  # which `check` refuses where it would be this engine's
        return None
    model = "" if spec.model is None else model_path(spec.model, base_dir, dummy)
    least, most = spec.lookup
    return SpeculationOptions(method=spec.method, tokens=spec.tokens, model=model, prompt_lookup_min=least, prompt_lookup_max=most)


def model_path(name: str, base_dir: Path, dummy: bool = False) -> str:
    """Where a model's files are: a folder, a .gguf, or for no name (or its own) the embedded SmolLM2. With `dummy` weights the name of the
    catalogue alone will do."""
    if not name or name.lower() in EMBEDDED:
        return str(default_model())
    path = base_dir / name
    if path.name == "config.json":
        path = path.parent
    if path.exists():
        return str(path)
    if name.lower() in model_names():
        if dummy:
            return name.lower()
        raise UsageError(
            f"model {name} is known by its shape only: give its Hugging Face folder with --model DIR, "
            "or --load-format dummy for random weights"
        )
    if spellings.of_hub(name):
        raise UsageError(f"--model {name}: there is no such folder; {spellings.download(name, serve=True)}")
    raise UsageError(
        f"--model {path}: no such folder or file; give a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf"
    )


def tokenizer_of(options: EngineOptions, path: Path | None) -> Tokenizer:
    """The model's own; for random weights without one, the embedded model's."""
    if path is None:
        path = Path(options.model)
        if options.random and not (path / "tokenizer.json").is_file() and path.suffix != ".gguf":
            path = default_model()
    return Tokenizer.load(path)


def served_name_of(options: EngineOptions, given: str) -> str:
    """What clients call the model."""
    path = Path(options.model)
    return given or ("smollm2-135m-instruct" if path == _embedded() else path.stem if path.suffix == ".gguf" else path.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlace:
    """An instance's place in a cluster. `registry` empty: it has none, and whoever drives it knows where it is. `advertise` is the host by
    which others reach it. `wait_s`: for a registry that is away at the start. `profile`: what was measured of its steps before."""

    name: str
    role: Role
    registry: str = ""
    advertise: str = ""
    report_s: float = 0.5
    lease_s: float = 3.0
    wait_s: float = 0.0
    profile: InstanceProfile | None = None
    rack: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """How requests come in. With `token` only who sends it, or for /v1 the key, is answered. A reader that takes nothing for `idle_s` is
    hung up on."""

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int = 0
    served_name: str = ""
    tokenizer: Path | None = None
    api_key: str | None = None
    token: str = ""
    max_requests: int = 1024
    drain_s: float = 30.0
    idle_s: float = IDLE_S
    tool_call_parser: str | None = None
    auto_tool_choice: bool | None = None
    tls: Tls = PLAIN
    cors: Cors = NO_PAGES
    traces: Traces | None = None

    def tool_parser(self, tokenizer: Tokenizer) -> str:
        """How calls of tools are read; "": they are not. Raises UsageError."""
        return parser_of(tokenizer, self.tool_call_parser, self.auto_tool_choice)


def run_until_stopped(main: Coroutine[Any, Any, None]) -> None:
    """Run it, until SIGTERM or Ctrl-C. While the model still loads these exit with 130."""
    try:
        with garbage_collection.seldom():
            asyncio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)


async def run(options: EngineOptions, how: Listening, place: ClusterPlace | None = None, *, say: Say = print) -> None:
    """Bind, load, serve, drain. Raises UsageError on mistakes; Ctrl-C while loading ends it at once."""
    started_s = time.monotonic()
    async with AsyncExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(bind(how.host, how.port)))
        registry = None
        if place is not None and place.registry:
            registry = await stack.enter_async_context(await registry_at(place.registry, how.tls, place.wait_s, say))
        text = tokenizer_of(options, how.tokenizer)
        tool_parser = how.tool_parser(text)
        options = msgspec.structs.replace(options, eos_ids=tuple(sorted(text.eos_ids)))
        app = create_app(more=() if place is None else ROUTES, cors=how.cors)  # answers "loading" until it has a service
        await stack.enter_async_context(metrics_beside(app, how.host, how.metrics_port, how.tls))
        check_cpu_kv(options)  # before a process loads the model for a minute only to say so
        progress = Progress(started_s, place.name if place is not None else "")
        progress.begin("starting the engine")
        starting = asyncio.create_task(EngineClient.start(options, progress.begin))
        serving = asyncio.create_task(serve(app, sock, drain_s=how.drain_s, idle_s=how.idle_s, tls=how.tls))
        stack.push_async_callback(_ended, starting, serving)
        while not (starting.done() or serving.done()):
            await asyncio.wait((starting, serving), timeout=STILL_S, return_when=asyncio.FIRST_COMPLETED)
            progress.still()
        if not starting.done():
            raise KeyboardInterrupt
        engine = starting.result()
        model, ready = served_name_of(options, how.served_name), engine.ready
        url = url_of((place.advertise if place is not None else "") or how.host, sock.getsockname()[1], how.tls.scheme)
        if place is None:
            app.state.service = Service(
                engine,
                text,
                model,
                max_requests=how.max_requests,
                api_key=how.api_key,
                token=how.token or None,
                tool_parser=tool_parser,
                traces=how.traces,
            )
        else:
            directory = _directory(how, registry)
            app.state.service = service = await stack.enter_async_context(_member_service(engine, text, model, how, directory))
            app.state.relays = stack.enter_context(contextlib.closing(Relays(directory, how.token, how.tls)))
            placed = Placed(
                name=place.name,
                role=place.role,
                host=platform.node(),
                rack=place.rack,
                zone=place.zone,
                url=url,
                model=model,
                max_seqs=options.max_seqs,
                max_batch_tokens=options.max_batch_tokens,
                max_requests=how.max_requests,
                prefix_cache=options.prefix_cache,
                watermark=options.watermark,
            )
            measured = measured_of(ready, place.profile, max_batch_tokens=options.max_batch_tokens, max_seqs=options.max_seqs)
            spec = instance_spec(placed, measured)
            service.member = Member(service, engine, registry, spec, report_s=place.report_s, lease_s=place.lease_s, left=service.left)
            stack.push_async_callback(service.member.close)
            app.state.member = service.member
            progress.begin("joining")
            await patiently(service.member.join, place.wait_s, say)
        kept = "" if ready.kv_dtype in ("", ready.dtype) else f" in {ready.kv_dtype}"
        say(
            f"{model} on {ready.device} in {ready.dtype}: {ready.kv_blocks:,} KV blocks of {ready.block_tokens} tokens{kept}, "
            f"up to {ready.max_tokens:,} tokens a request\nready after {time.monotonic() - started_s:.1f} s: {url}/v1"
        )
        if registry is not None:
            await _while_alive(engine, serving)
        if left := await serving:
            say(f"stopped with {left} requests unfinished")
        elif place is not None:
            await service.at_rest(how.drain_s)


class Progress:
    """Says on stderr what a start is doing, and every now and then that it still does."""

    def __init__(self, started_s: float, name: str) -> None:
        self.started_s, self.prefix, self.stage = started_s, f"{name}: " if name else "", ""
        self.said_s = started_s

    def begin(self, stage: str) -> None:
        self.stage = stage
        self._say(stage)

    def still(self) -> None:
        """For a loop that waits: a line, unless there was one lately."""
        if time.monotonic() - self.said_s >= STILL_S:
            self._say(f"still {self.stage}")

    def _say(self, what: str) -> None:
        self.said_s = time.monotonic()
        tell(f"{self.prefix}{what} ({self.said_s - self.started_s:.1f} s)")


class MemberService(Service):
    """A service that routers know: when it drains, they are told."""

    member: Member
    stopping = False
    rested = False

    def drain(self) -> None:
        self.stopping = True
        super().drain()
        self.member.drain()

    def left(self) -> None:
        """The member has drained for good."""
        self.rested = True
        if not self.stopping:
            os.kill(os.getpid(), signal.SIGTERM)

    async def at_rest(self, within_s: float) -> None:
        """Until what waits here for a decode instance was read. The engine still answers for it."""
        until_s = time.monotonic() + within_s
        while not self.rested and self.engine.down is None and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)


def _directory(how: Listening, registry: Registry | None) -> Directory:
    """To whom this instance connects."""
    return Registered(registry) if registry is not None else NamedByProxies() if how.token else SameHost()


@asynccontextmanager
async def _member_service(
    engine: EngineClient, text: Tokenizer, model: str, how: Listening, directory: Directory
) -> AsyncIterator[MemberService]:
    migrations = Migrations(engine, how.token or None, directory, how.tls)
    exchange = KvExchange(engine, migrations, directory=directory) if engine.ready.descriptor else None
    try:
        yield MemberService(
            engine,
            text,
            model,
            max_requests=how.max_requests,
            api_key=how.api_key,
            token=how.token or None,
            exchange=exchange,
            tool_parser=how.tool_parser(text),
            traces=how.traces,
        )
    finally:
        await migrations.close()


async def _ended(starting: asyncio.Task[EngineClient], serving: asyncio.Task[int]) -> None:
    for task in (starting, serving):
        task.cancel()
    await asyncio.gather(starting, serving, return_exceptions=True)
    if not starting.cancelled() and starting.exception() is None:
        await starting.result().close()


async def _while_alive(engine: EngineClient, serving: asyncio.Task[int]) -> None:
    """Raises UsageError where the engine ends before the server: routers must not count on this instance any more."""
    while not serving.done():
        if engine.down is not None:
            raise UsageError(engine.down)
        await asyncio.wait((serving,), timeout=LOOK_S)


async def registry_at(url: str, tls: Tls, wait_s: float, say: Say) -> Registry:
    """As `open_registry`, waiting for one that is away; also the parent's, at fd://N."""
    if url.startswith(SCHEME):
        return Registry(await ParentStore.connect(int(url.removeprefix(SCHEME))))
    return await patiently(partial(open_registry, url, tls=tls), wait_s, say)


def _embedded() -> Path | None:
    try:
        return default_model()
    except UsageError:
        return None
