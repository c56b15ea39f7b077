"""The `pdlab serve` commands that start what other systems' commands start, and those of the stores that they meet in."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from pdlab.experiment.imports import stores
from pdlab.experiment.imports.checks import collides, one_machine
from pdlab.experiment.imports.experiment_file import Instead, Row, one_device, registry, starts_all
from pdlab.experiment.imports.launches import LaunchReading, placeholder
from pdlab.experiment.imports.programs import Dropped, Launch
from pdlab.experiment.imports.shell import ScriptMistake

ROUTER_PORT = 8000
MASTER_PORT = 29501  # of vLLM's ranks
_FREE = "--role all gives its instances free ports; clients ask the router alone"
_ONE = "--role all starts all instances with its own: export it before the command"
ALIKE = {  # of instances that --role all starts
    **dict.fromkeys(("port", "metrics_port", "kv_port", "kv_ports"), _FREE),
    **dict.fromkeys(("visible", "nics", "nics_script", "ucx_devices"), _ONE),
    "transport": "--role all has one --kv-transport for all: give it there",
}
ASSUMED = "etcd://127.0.0.1:2379"


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """A line for a shell. `before` is what the line sets for the command alone, `line` where its original is (0: it has none)."""

    words: tuple[str, ...]
    before: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.before}{shlex.join(self.words)}"


def commands(reading: LaunchReading, rows: Sequence[Row], file: str, instead: Instead) -> list[ServeCommand]:
    """In the order in which they are to be started."""
    url = registry(reading)
    routers = reading.of("router")
    if not url and len(rows) == 1 and rows[0].role == "mixed" and not routers:
        return [_instance(reading, rows[0], file, instead, alone=True), *_ranks(reading, rows[0], file, instead)]
    if starts_all(reading, len(rows)):
        return [_all(reading, file, instead)]
    if not one_machine(reading):
        text = "these commands are for several machines: give each pdlab serve --host, --advertise and PDLAB_INTERNAL_TOKEN"
        reading.notes.append(ScriptMistake(0, text))
    meets = [] if url else ["--registry", ASSUMED]
    if not url:
        reading.notes.append(ScriptMistake(0, f"no command names a registry: {ASSUMED} is written, where an etcd is to run"))
    found = [*_stores(reading, url or ASSUMED)]
    seen: set[int] = set()
    for row in rows:
        first = id(row.launch) not in seen
        found.append(_instance(reading, row, file, instead, first=first, more=meets))
        seen.add(id(row.launch))
        if first:
            found += _ranks(reading, row, file, instead)
    if routers or rows:
        found.append(_router(reading, routers, file, instead, meets))
    return found


def _stores(reading: LaunchReading, url: str) -> Iterator[ServeCommand]:
    """The registry's own server, where a command starts one; it listens where the instances ask."""
    where = urlsplit(url)
    for store in reading.of("store"):
        if store.program is stores.REDIS and where.scheme == "redis":
            yield ServeCommand(("redis-server", "--port", str(where.port or 6379), "--appendonly", "yes"), line=store.line)
        if store.program is stores.ETCD and where.scheme == "etcd":
            client = f"http://{where.netloc.split(',')[0]}"
            peers = [word for one in store.dropped if one.flag == "--listen-peer-urls" for word in (one.flag, one.value)]
            yield ServeCommand(("etcd", "--listen-client-urls", client, "--advertise-client-urls", client, *peers), line=store.line)


def _instance(
    reading: LaunchReading, row: Row, file: str, instead: Instead, *, alone: bool = False, first: bool = True, more: Sequence[str] = ()
) -> ServeCommand:
    found, words = row.launch, ["pdlab", "serve", file, "--role", row.role]
    words += [] if alone else ["--instance-name", row.name]
    words += ["--port", str(found.number("port") if first else 0)]
    words += _options(found, "host", "metrics_port" if first else "", "log_level", "certfile", "keyfile")
    if not alone and first and (port := _kv_port(reading, found)):
        words += ["--kv-port", str(port)]
    if not alone and found.text("transport") not in ("", "auto"):
        words += ["--kv-transport", found.text("transport")]
    words += [*_names(found, instead), *_nodes(found, instead)]
    _reachable(reading, found, peers=not alone)
    return ServeCommand((*words, *more), _before(found, instead), found.line)


def _ranks(reading: LaunchReading, row: Row, file: str, instead: Instead) -> Iterator[ServeCommand]:
    """Of the row's instance, those on other nodes: they need nothing but to meet the first."""
    for follower in reading.followers:
        if (nodes := _nodes(follower, instead)) and joined(follower) == joined(row.launch):
            words = ("pdlab", "serve", file, "--role", row.role, "--instance-name", row.name, *nodes)
            yield ServeCommand(words, _before(follower, instead), follower.line)


def _nodes(found: Launch, instead: Instead) -> list[str]:
    """Where its ranks are on several."""
    nodes = found.number("nodes")
    if nodes < 2 or instead.device == "cpu":
        return []
    return ["--nnodes", str(nodes), "--node-rank", str(found.number("node_rank")), "--master", joined(found)]


def joined(found: Launch) -> str:
    """Where the ranks of an engine meet."""
    host, port = found.text("master_host"), found.number("master_port") or MASTER_PORT
    return found.text("master") or f"{host or '127.0.0.1'}:{port}"


def _reachable(reading: LaunchReading, found: Launch, *, peers: bool) -> None:
    """What pdlab serve asks for where others than this machine reach it."""
    host, line, flag = found.text("host"), found.line_of("host"), found.flag_of("host")
    secret = "PDLAB_INTERNAL_TOKEN, the same for all of the cluster" if peers else "PDLAB_API_KEY, which clients send"
    if peers and host in ("0.0.0.0", "::"):
        reading.notes.append(ScriptMistake(line, f"{flag} {host} is every address: give --advertise the one that others reach it by"))
    if host not in ("", "127.0.0.1", "localhost", "::1"):
        reading.notes.append(ScriptMistake(line, f"{flag} {host} can be reached by others: set {secret}"))


def _kv_port(reading: LaunchReading, found: Launch) -> int:
    """The first of what the command names, unless another has it, too."""
    ports = found.get("kv_ports")
    setting = "kv_ports" if isinstance(ports, tuple) else "kv_port"
    port = ports[0] if isinstance(ports, tuple) and ports else found.number("kv_port")
    if not port or collides(reading, found, setting):
        return 0
    if isinstance(ports, tuple) and len(ports) > 1:
        rest = ",".join(map(str, ports[1:]))
        why = "an instance has one port for KV, --kv-port, which is the first"
        reading.dropped.append(Dropped(found.line_of("kv_ports"), found.flag_of("kv_ports"), rest, why))
    return int(port)


def _router(reading: LaunchReading, routers: Sequence[Launch], file: str, instead: Instead, more: Sequence[str]) -> ServeCommand:
    if routers:
        _reachable(reading, routers[0], peers=False)
        return _front(routers[0], ["pdlab", "serve", file, "--role", "router"], instead, [*_served(reading, instead), *more])
    taken = {one.number(name) for one in reading.launches for name in ("port", "metrics_port")}
    port = next(port for port in range(ROUTER_PORT, 65536) if port not in taken)
    text = f"no command starts a router, which pdlab's instances need: it answers clients at port {port}"
    reading.notes.append(ScriptMistake(0, text))
    names = _names(reading.instances[0], instead) if reading.instances else []
    return ServeCommand(("pdlab", "serve", file, "--role", "router", "--port", str(port), *names, *more))


def _all(reading: LaunchReading, file: str, instead: Instead) -> ServeCommand:
    """One command for all, since they are on one machine and name nowhere to meet."""
    fronts = [*reading.of("router"), *reading.of("cluster"), *reading.instances]
    for one in reading.of("instance"):
        for setting, why in ALIKE.items():
            if setting in one.settings and not (setting == "port" and one is fronts[0]) and not (setting == "visible" and one_device(one)):
                value = one.get(setting)
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                reading.dropped.append(Dropped(one.line_of(setting), one.flag_of(setting), shown, why))
    _reachable(reading, fronts[0], peers=False)
    found = _front(fronts[0], ["pdlab", "serve", file, "--role", "all"], instead, _served(reading, instead))
    return replace(found, before=_before(fronts[0], instead)) if fronts[0].program.kind == "cluster" else found


def _front(found: Launch, words: list[str], instead: Instead, more: Sequence[str]) -> ServeCommand:
    """`more`: what the instances call the model comes first, unless the command itself has a name for it."""
    options = ["--port", str(found.number("port")), *_options(found, "host", "log_level", "certfile", "keyfile"), *_names(found, instead)]
    known = "--served-model-name" in options
    options += more[2:] if known and more[:1] == ["--served-model-name"] else more
    return ServeCommand((*words, *options), line=found.line)


def _served(reading: LaunchReading, instead: Instead) -> list[str]:
    """What the instances call the model: a router has to do so, too."""
    names = next((names for one in reading.instances if (names := _names(one, instead))), [])
    return names[:2] if names[:1] == ["--served-model-name"] else []


def _options(found: Launch, *settings: str) -> Iterator[str]:
    flags = {"certfile": "--ssl-certfile", "keyfile": "--ssl-keyfile", "log_level": "--log-level"}
    for setting in settings:
        if setting in found.settings:
            yield from (flags.get(setting, f"--{setting.replace('_', '-')}"), found.text(setting))


def _names(found: Launch, instead: Instead) -> list[str]:
    """What clients call the model, where another is served in its place; and its vocabulary."""
    words = []
    model = found.text("served_name") or (PurePosixPath(found.text("model")).name if instead.model else "")
    if model:
        words += ["--served-model-name", model]
    tokenizer = found.text("tokenizer")
    if tokenizer and not instead.model and not placeholder(tokenizer):
        words += ["--tokenizer", tokenizer]
    return words


def _before(found: Launch, instead: Instead) -> str:
    """Which accelerators and NICs it sees."""
    parts = []
    nics, script, ucx = found.get("nics"), found.text("nics_script"), found.text("ucx_devices")
    if "get_rdma_nics" in script:
        parts.append(f"$(pdlab nics {'cpu' if script.split()[-1] == 'cpu' else 'gpu'})")
    elif isinstance(nics, tuple):
        parts.append(f"UCX_NET_DEVICES={','.join(nic if ':' in nic else f'{nic}:1' for nic in nics)}")
    elif ucx:
        parts.append(f"UCX_NET_DEVICES={ucx}")
    visible = found.get("visible")
    if isinstance(visible, tuple) and instead.device != "cpu":
        parts.append(f"CUDA_VISIBLE_DEVICES={','.join(visible)}")
    return f"env {' '.join(parts)} " if parts else ""
