"""`pdlab serve` in all its roles: what was asked for is checked as a whole, then started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from pdlab import batching, cost
from pdlab.core.types import Role, UsageError, nearest
from pdlab.experiment.deployment import Deployment
from pdlab.real.engine.memory import check_cpu_kv
from pdlab.real.engine.options import EngineOptions
from pdlab.real.host.logs import tell
from pdlab.real.host.processes import MODULE
from pdlab.real.instance.rank_meeting import address_of
from pdlab.real.instance.vllm_sidecar import Keeper
from pdlab.real.launch.asked import Asked
from pdlab.real.launch.child_instances import Children
from pdlab.real.launch.ignored_keys import ignored
from pdlab.real.launch.instance import (
    ClusterPlace,
    engine_options,
    registry_at,
    run,
    run_until_stopped,
    served_name_of,
    tokenizer_of,
)
from pdlab.real.launch.node import run_node
from pdlab.real.launch.router import ChildInstances, RouterFront, route
from pdlab.real.models import config, gguf_file
from pdlab.real.net.credentials import MAKES_ONE, loopback, with_password, without_password
from pdlab.real.net.host_names import host_mistake, wildcard
from pdlab.real.registry import Registry
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.router.vllm import Vllm

if TYPE_CHECKING:
    from pdlab.real.api.traces import Traces

ROLES = (*(str(role) for role in Role), "router", "all")
TRANSPORTS = ("auto", "shm", "tcp", "cuda_ipc", "nixl")
CHILD_LEASE_S = 15.0
SECRETS = ("PDLAB_API_KEY", "PDLAB_INTERNAL_TOKEN", "PDLAB_UPSTREAM_API_KEY", "PDLAB_REGISTRY", "PDLAB_REGISTRY_PASSWORD")
NOT_FOR_CHILDREN = (*SECRETS, *(f"{name}_FILE" for name in SECRETS))
ENGINES = ("pdlab", "vllm")
ROUTER = Deployment(name="router", model="smollm2-135m")  # what one without a file follows
Say = Callable[[str], None]


def start(asked: Asked, say: Say) -> None:
    """Until stopped. Raises UsageError with a line for the first thing that is wrong."""
    asked = settled(asked)
    check(asked)
    asked.serving.tls.check()
    if not asked.is_child and (line := ignored(asked)):
        tell(line)
    with tracing(asked) as traces:
        _run(replace(asked, serving=replace(asked.serving, traces=traces)), say)


def _run(asked: Asked, say: Say) -> None:
    if asked.engine == "vllm":
        run_until_stopped(_keep(asked, say))
    elif asked.role == "router":
        run_until_stopped(_route(asked, say))
    elif asked.role == "all":
        run_until_stopped(_all(asked, say))
    elif asked.given.get("node_rank"):
        run_node(engine_of(asked), say)
    else:
        run_until_stopped(run(engine_of(asked), asked.serving, _place(asked), say=say))


@contextlib.contextmanager
def tracing(asked: Asked) -> Iterator[Traces | None]:
    """Where spans go, if anywhere. Raises UsageError where OpenTelemetry is not installed."""
    if not asked.otlp_endpoint:
        yield None
        return
    try:
        module = import_module("pdlab.real.api.traces")
    except ModuleNotFoundError as missing:
        raise UsageError(f"--otlp-endpoint needs OpenTelemetry: pip install 'pdlab[otel]' ({missing})") from None
    traces: Traces = module.Traces(asked.otlp_endpoint, asked.name, "router" if asked.role in ("router", "all") else "")
    try:
        yield traces
    finally:
        traces.close()


def otlp_mistake(endpoint: str) -> str:
    """What is wrong with a collector's URL; empty: nothing."""
    try:
        split = urlsplit(endpoint)
        wrong = split.scheme not in ("http", "https") or not split.hostname or bool(host_mistake(split.hostname)) or split.port == 0
    except ValueError:
        wrong = True
    if wrong:
        return f"--otlp-endpoint {without_password(endpoint)[:100]!r}: give a collector's URL for OTLP over HTTP, such as http://127.0.0.1:4318"
    if split.username or split.password:
        return "--otlp-endpoint must not have a password in it: put it into OTEL_EXPORTER_OTLP_HEADERS, as authorization=Basic%20..."
    return ""


def settled(asked: Asked) -> Asked:
    """With the file's registry, where the command line gives none; and what the command line says of the file's limits."""
    if asked.request_timeout_s is not None and asked.role in ("router", "all"):
        limits = {"limits.request_timeout_s": asked.request_timeout_s}
        asked = replace(asked, deployment=(asked.deployment or ROUTER).with_(limits))
    own = asked.deployment.registry if asked.deployment is not None and asked.role != "all" else None
    return asked if asked.registry or not own else replace(asked, registry=with_password(own))


def check(asked: Asked) -> None:
    """Raises UsageError where options do not go together."""
    for option, value, known in (
        ("--role", asked.role, ROLES),
        ("--engine", asked.engine, ENGINES),
        ("--kv-transport", asked.kv_transport, TRANSPORTS),
    ):
        if value not in known:
            raise UsageError(f"{option} {value!r} is not one of {', '.join(known)}{nearest(value, known)}")
    try:
        batching.spelled(str(asked.given.get("batching") or "chunked"))
    except UsageError as error:
        raise UsageError(f"--batching {str(error).removeprefix('engine.batching: ')}") from None
    for wrong, line in _wrong(asked):
        if wrong:
            raise UsageError(line)
    if asked.deployment is not None and asked.engine == "pdlab" and asked.role != "router":
        _check_parallel(asked, asked.deployment)


def _check_parallel(asked: Asked, deployment: Deployment) -> None:
    placed = asked.placed if asked.role != "all" else None
    for one in deployment.placements() if placed is None else [placed]:
        for key in ("dp_attention", "pp"):
            if (value := getattr(one.parallel, key)) > 1:
                raise UsageError(
                    f"{asked.file}: cluster.instances.{one.row}.{key}: {value}, but pdlab's engine splits a model by tp alone: write "
                    f"{key}: 1, or start a vLLM server and register it with --engine vllm --upstream URL"
                )
        if one.engine.speculation is not None and one.engine.speculation.method == "mtp" and not asked.given.get("speculative_config"):
            raise UsageError(
                f"{asked.file}: engine.speculation: pdlab's engine drafts by method ngram or draft_model, not mtp: choose one of them, or "
                "start a vLLM server with --speculative-config and register it with --engine vllm --upstream URL"
            )


def _wrong(asked: Asked) -> list[tuple[bool, str]]:
    role, host, vllm = asked.role, asked.serving.host, asked.engine == "vllm"
    router = role in ("router", "all")
    exposed = not loopback(host) or bool(asked.advertise and not loopback(asked.advertise))
    return [
        (bool(asked.upstream) and not vllm, "--upstream is for --engine vllm: add it, or remove --upstream"),
        (vllm and not asked.upstream, "--engine vllm needs --upstream URL: where the vLLM server answers"),
        (vllm and router, f"--engine vllm is for instances: give --role prefill, decode or mixed, not {role}"),
        (vllm and not asked.registry, "--engine vllm needs --registry URL: the server at --upstream is registered there"),
        (
            bool(asked.otlp_endpoint) and vllm,
            "--otlp-endpoint is for pdlab's own servers: give the vLLM server --otlp-traces-endpoint, and the router --otlp-endpoint",
        ),
        (bool(asked.otlp_endpoint and otlp_mistake(asked.otlp_endpoint)), otlp_mistake(asked.otlp_endpoint)),
        (role == "router" and not asked.registry, "--role router needs --registry URL: it finds its instances there"),
        (
            role == "all" and bool(asked.registry),
            "--role all keeps its registry in memory: remove --registry, or start each role by itself",
        ),
        (
            role == "all" and not (asked.deployment is not None and asked.deployment.cluster.instances),
            "--role all needs an experiment file: its cluster.instances say what to start",
        ),
        (
            asked.registry.startswith("memory:"),
            "--registry memory:// is inside one process: use --role all, or an etcd:// or redis:// server",
        ),
        (
            asked.trace_events is not None and not router,
            "--trace-events is a router's: use it with --role router or all (an engine has --log)",
        ),
        (
            asked.request_timeout_s is not None and not router,
            "--request-timeout-s is a router's: use it with --role router or all",
        ),
        (bool(asked.given.get("decisions")) and (router or vllm), "--log is an engine's: use it with --role prefill, decode or mixed"),
        (
            (asked.given.get("nnodes") or 1) != 1 and (router or vllm),
            "--nnodes is for a single instance: use it with --role prefill, decode or mixed",
        ),
        (role == "router" and asked.kv_transport != "auto", "--kv-transport is for instances; a router moves no KV"),
        (bool(asked.kv_port) and (router or vllm), "--kv-port is for a single instance: use it with --role prefill, decode or mixed"),
        (bool(asked.advertise) and (role == "all" or vllm), "--advertise is for those that stand in a registry themselves: remove it"),
        (bool(host_mistake(asked.advertise)), f"--advertise {asked.advertise[:100]}: {host_mistake(asked.advertise)}"),
        (
            not (asked.alone or router or vllm) and wildcard(host) and not asked.advertise,
            f"--host {host} is no address that others can reach: give --advertise HOST, too",
        ),
        (
            exposed and not vllm and not asked.serving.token and (asked.alone or router) and not asked.serving.api_key,
            f"--host {host} can be reached by others: give --api-key (or PDLAB_API_KEY); this makes one: "
            + MAKES_ONE.format(name="PDLAB_API_KEY"),
        ),
        (
            exposed and not (vllm or asked.alone or router) and not asked.serving.token,
            f"--host {host} can be reached by others: give --internal-token (or PDLAB_INTERNAL_TOKEN), the same to all of the cluster; "
            "this makes one: " + MAKES_ONE.format(name="PDLAB_INTERNAL_TOKEN"),
        ),
        (
            bool(asked.serving.api_key and asked.registry and not (asked.serving.token or vllm)),
            "--api-key needs --internal-token (or PDLAB_INTERNAL_TOKEN), the same to all of the cluster: else its instances answer "
            "whoever asks them; this makes one: " + MAKES_ONE.format(name="PDLAB_INTERNAL_TOKEN"),
        ),
    ]


# ---------------------------------------------------------------- an instance


def engine_of(asked: Asked) -> EngineOptions:
    options = engine_options(asked.deployment, asked.given, asked.placed)
    _check_nodes(options, asked.serving.token)
    if options.nnodes > 1:
        options = msgspec.structs.replace(options, kv_token=asked.serving.token)
    if asked.alone:
        return options
    return msgspec.structs.replace(
        options,
        kv_name=asked.name,
        kv_transport=asked.kv_transport,
        kv_host=asked.serving.host,
        kv_port=asked.kv_port,
        kv_advertise=asked.advertise,
        kv_token=asked.serving.token,
        self_profile=asked.self_profile and profile_of(asked) is None,
    )


def _check_nodes(options: EngineOptions, token: str) -> None:
    """Raises UsageError where an instance cannot be spread as asked."""
    if options.nnodes == 1:
        if options.node_rank or options.master:
            raise UsageError("--node-rank and --master are for an instance on several hosts: give --nnodes, too")
        return
    if options.tp % options.nnodes:
        raise UsageError(f"--nnodes {options.nnodes} does not divide tp {options.tp}: give --tensor-parallel-size a multiple of it")
    if options.node_rank >= options.nnodes:
        raise UsageError(f"--node-rank {options.node_rank}: nodes are numbered from 0 to {options.nnodes - 1}")
    if not options.master:
        raise UsageError("--nnodes needs --master HOST:PORT: where the first node is met by the others")
    host, _ = address_of(options.master)
    if not loopback(host) and not token:
        raise UsageError(
            f"--master {options.master} can be reached by others: give --internal-token (or PDLAB_INTERNAL_TOKEN), the same to all nodes; "
            "this makes one: " + MAKES_ONE.format(name="PDLAB_INTERNAL_TOKEN")
        )


def profile_of(asked: Asked) -> cost.InstanceProfile | None:
    """What `pdlab calibrate` has measured of the instance, where its row of the experiment names that as `hardware`; None where the command
    line has another model."""
    placed = asked.placed
    if asked.deployment is None or placed is None or not placed.hardware or asked.given.get("model"):
        return None
    return cost.hardware(placed.hardware, asked.deployment.base_dir).profile


def _place(asked: Asked) -> ClusterPlace | None:
    if asked.alone:
        return None
    report_s, lease_s = _times(asked.deployment)
    if asked.is_child:  # the parent notices at once when a child dies, and a loaded machine may pause one
        lease_s = max(lease_s, CHILD_LEASE_S)
    return ClusterPlace(
        name=asked.name,
        role=Role(asked.role),
        registry=asked.registry,
        advertise=asked.advertise,
        report_s=report_s,
        lease_s=lease_s,
        wait_s=asked.registry_wait_s,
        profile=profile_of(asked),
        rack=asked.placed.rack if asked.placed is not None else "",
        zone=asked.placed.zone if asked.placed is not None else "",
    )


def _times(deployment: Deployment | None) -> tuple[float, float]:
    """Between reports, and of a lease."""
    plain = deployment or ROUTER
    return plain.cluster.reports.period_s, plain.limits.lease_s


async def _keep(asked: Asked, say: Say) -> None:
    """A vLLM server's place, until a signal; then it drains."""
    report_s, lease_s = _times(asked.deployment)
    upstream = Vllm(asked.upstream, asked.upstream_api_key, asked.serving.tls, profile_of(asked))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.closing(upstream):
        async with await registry_at(asked.registry, asked.serving.tls, asked.registry_wait_s, say) as registry:
            role, model = Role(asked.role), asked.serving.served_name
            keeper = Keeper(
                registry, upstream, asked.name, role, model, report_s=report_s, lease_s=lease_s, wait_s=asked.registry_wait_s, say=say
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            keeping, stopping = asyncio.create_task(keeper.run()), asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((keeping, stopping), return_when=asyncio.FIRST_COMPLETED)
                for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends it at once
                    loop.remove_signal_handler(number)
                if keeping.done():
                    keeping.result()
                if left := await keeper.drain(asked.serving.drain_s):
                    say(f"left with {left} requests at {asked.upstream}")
            finally:
                for task in (keeping, stopping):
                    task.cancel()
                await asyncio.gather(keeping, stopping, return_exceptions=True)


# ---------------------------------------------------------------- a router


async def _route(asked: Asked, say: Say) -> None:
    front = _front(asked)
    async with await registry_at(asked.registry, asked.serving.tls, asked.registry_wait_s, say) as registry:
        await route(asked.deployment or ROUTER, front, registry, say=say)


async def _all(asked: Asked, say: Say) -> None:
    """The instances of the file's cluster, each a child, and their router."""
    assert asked.deployment is not None, "checked"
    front = _front(asked)
    if not front.token:  # the instances ask for one all the same: each user of this host could reach them
        token = secrets.token_hex(32)
        front = replace(front, token=token, asks_token=token if front.api_key else "")
    placed = asked.deployment.placements()
    first = {one.name: one.role for one in placed}
    check_cpu_kv(*(engine_options(asked.deployment, asked.given, one) for one in placed))
    threads = max(1, int(str(asked.given.get("threads") or len(os.sched_getaffinity(0)))) // len(first))
    store = MemoryStore()
    environment = {**dict.fromkeys(NOT_FOR_CHILDREN, ""), "PDLAB_INTERNAL_TOKEN": front.token}
    children = Children(store, environment=environment, say=say)
    say(f"starting {len(first)} instances of {front.model} with {threads} CPU threads each: {', '.join(first)}")
    async with Registry(store) as registry:
        child_instances = ChildInstances(children, first, partial(child_command, asked, front.model, threads))
        await route(asked.deployment, front, registry, child_instances=child_instances, say=say)


def child_command(asked: Asked, model: str, threads: int, name: str, role: Role, fd: int) -> list[str]:
    """That starts an instance which finds its registry at the socket `fd`."""
    options: dict[str, object] = {
        **asked.given,
        "role": role,
        "registry": f"fd://{fd}",
        "instance_name": name,
        "port": 0,
        "threads": threads,
        "served_model_name": model,
        "kv_transport": asked.kv_transport,
        "tokenizer": asked.serving.tokenizer,
        "max_requests": asked.serving.max_requests,
        "drain_s": asked.serving.drain_s,
        "tool_call_parser": asked.serving.tool_call_parser,
        "idle_timeout_s": asked.serving.idle_s,
        "otlp_endpoint": asked.otlp_endpoint or None,
    }
    switches = {key: value for key, value in options.items() if isinstance(value, bool)}
    words = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items() if value is not None and key not in switches]
    flags = [f"--{'' if held else 'no-'}{key.replace('_', '-')}" for key, held in switches.items()]
    flags += [] if asked.self_profile else ["--no-self-profile"]
    return [*MODULE, "pdlab", "serve", str(asked.file), *(word for pair in words for word in pair), *flags]


def _front(asked: Asked) -> RouterFront:
    how = asked.serving
    options = engine_options(asked.deployment, asked.given)
    tokenizer = tokenizer_of(options, how.tokenizer)
    return RouterFront(
        name=asked.name,
        model=served_name_of(options, how.served_name),
        tokenizer=tokenizer,
        host=how.host,
        port=how.port,
        metrics_port=how.metrics_port,
        api_key=how.api_key,
        token=how.token,
        upstream_api_key=asked.upstream_api_key,
        max_requests=how.max_requests,
        drain_s=how.drain_s,
        idle_s=how.idle_s,
        context_tokens=options.max_model_len or _context_tokens(Path(options.model)),
        trace_events=asked.trace_events,
        traceback=asked.traceback,
        tool_parser=how.tool_parser(tokenizer),
        open_to_clients=loopback(how.host),
        tls=how.tls,
        cors=how.cors,
        traces=how.traces,
        advertise=asked.advertise,
    )


def _context_tokens(path: Path) -> int:
    """What the model's own files allow; 0 where they say nothing."""
    if path.suffix == ".gguf":
        return config.parse(gguf_file.config(path), path.name, str(path)).max_positions
    return config.read(path).max_positions if (path / "config.json").is_file() else 0
