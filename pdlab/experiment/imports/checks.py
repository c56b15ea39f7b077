"""What the authors of launch commands got wrong, or would have to know: each with its line, and what is made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pdlab.core.types import UsageError
from pdlab.experiment.imports import fastdeploy, stores, xllm
from pdlab.experiment.imports.launches import LaunchReading, placeholder, ports_of
from pdlab.experiment.imports.programs import Launch
from pdlab.experiment.imports.shell import ScriptMistake

PORTS = ("port", "metrics_port", "kv_port", "kv_ports", "pd_ports")
# of those that are not carried over, and still would collide: FastDeploy's queues
OTHER_PORTS = {
    "--engine-worker-queue-port",
    "--cache-queue-port",
    "--disagg-pd-port",
    "--rpc-server-port",
    "--disaggregation-bootstrap-port",
}
LOCAL = ("", "127.0.0.1", "localhost", "0.0.0.0", "::", "::1")


def check(reading: LaunchReading) -> list[ScriptMistake]:
    """In the order of their lines. Raises UsageError where no reading makes sense."""
    found = [
        *_stores(reading),
        *_registries(reading),
        *_ports(reading),
        *_accelerators(reading),
        *_roles(reading),
        *_dispatchable(reading),
        *_switched_off(reading),
        *_requests(reading),
        *_placeholders(reading),
    ]
    return sorted({(one.line, one.text): one for one in found}.values(), key=lambda one: one.line)


def one_machine(reading: LaunchReading) -> bool:
    """Does no address name another one?"""
    named = [one.text(setting) for one in reading.launches for setting in ("host", "redis_host") if one.program.kind != "client"]
    urls = [one.text("registry").partition("://")[2] for one in reading.launches]
    hosts = [part.rpartition(":")[0] for url in urls for part in url.split(",")]
    proxied = [host for one in reading.of("router") for name in ("prefill_hosts", "decode_hosts") for host in _several(one.get(name))]
    return all(host.strip("[]") in LOCAL for host in (*named, *hosts, *proxied))


def _several(value: object) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def registry_of(found: Launch) -> str:
    """Where the command says that its peers meet; empty where it does not."""
    if found.program is fastdeploy.API_SERVER and found.get("scheduler") in ("splitwise", "global"):
        database, topic = found.number("redis_db"), found.text("namespace")
        url = f"redis://{found.text('redis_host') or '127.0.0.1'}:{found.number('redis_port') or 6379}"
        return f"{url}{f'/{database}' if database else ''}{f'?namespace={topic}' if topic else ''}"
    return found.text("registry")


def registry_line(found: Launch) -> tuple[int, str]:
    name = "redis_port" if found.program is fastdeploy.API_SERVER else "registry"
    return found.line_of(name), found.flag_of(name)


# ---------------------------------------------------------------- where they meet


def _stores(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for store in reading.of("store"):
        listens = {port for port, _, _ in ports_of(store, "client_ports")}
        for port, line, flag in ports_of(store, "advertised_ports"):
            if port not in listens:
                yield ScriptMistake(
                    line, f"{flag} is {port}, but clients are listened to at {_or(listens)}: it is written so that both are one"
                )
        yield from _unheard(reading, store, listens)


def _unheard(reading: LaunchReading, store: Launch, listens: set[int]) -> Iterator[ScriptMistake]:
    """Who asks the store where it does not listen."""
    kind, name = "redis" if store.program is stores.REDIS else "etcd", store.program.names[0]
    asking: dict[str, list[tuple[int, str]]] = {}
    for one in (*reading.of("router"), *reading.instances):
        url = registry_of(one)
        asked = {int(port) for port in re.findall(r":(\d+)", url.partition("://")[2])}
        if url.startswith(kind) and asked and not asked & listens:
            asking.setdefault(url, []).append(registry_line(one))
    for url, where in asking.items():
        (line, flag), *rest = sorted(where)
        asked = {int(port) for port in re.findall(r":(\d+)", url.partition("://")[2])}
        too = f" (so do lines {', '.join(str(other) for other, _ in rest)})" if rest else ""
        text = f"{flag} asks {_or(asked)}{too}, but {name} (line {store.line}) listens at {_or(listens)}"
        yield ScriptMistake(line, f"{text}: pdlab's registry is {url}, and {name} is to listen there")


def _or(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _registries(reading: LaunchReading) -> Iterator[ScriptMistake]:
    named = [(registry_of(one), one) for one in (*reading.of("router"), *reading.instances) if registry_of(one)]
    for url, one in named[1:]:
        if url != named[0][0]:
            line, flag = registry_line(one)
            yield ScriptMistake(
                line, f"{flag}: {url} is not {named[0][0]} of line {registry_line(named[0][1])[0]}: the latter is written for all"
            )


# ---------------------------------------------------------------- ports and devices


def _ports(reading: LaunchReading) -> Iterator[ScriptMistake]:
    """Ports that two processes of one machine would listen to."""
    if not one_machine(reading):
        return
    taken: dict[int, tuple[int, str]] = {}
    twice: dict[tuple[int, str, int, str], list[int]] = {}
    for one in _in_order(reading):
        for port, line, flag in _listens(one):
            if port in taken:
                twice.setdefault((line, flag, *taken[port]), []).append(port)
            else:
                taken[port] = (line, flag)
    for (line, flag, first, whose), ports in twice.items():
        shown = ", ".join(map(str, ports))
        yield ScriptMistake(
            line, f"{flag} {shown} is taken on this machine by {whose} of line {first}: pdlab serve takes a free one where it needs one"
        )


def _in_order(reading: LaunchReading) -> list[Launch]:
    return [*reading.of("store", "router"), *reading.instances]


def _listens(found: Launch) -> list[tuple[int, int, str]]:
    """(port, line, flag) of all that the process listens to."""
    return [*ports_of(found, *PORTS, "client_ports"), *_uncarried(found)]


def _uncarried(found: Launch) -> Iterator[tuple[int, int, str]]:
    for one in found.dropped:
        if one.flag in OTHER_PORTS and one.value.isdigit():
            yield int(one.value), one.line, one.flag


def collides(reading: LaunchReading, found: Launch, setting: str) -> bool:
    """Is a port of that setting also one of a process before it?"""
    if not one_machine(reading):
        return False
    ordered = _in_order(reading)
    before = ordered[: next(at for at, one in enumerate(ordered) if one is found)]
    taken = {port for one in before for port, _, _ in _listens(one)}
    return any(port in taken for port, _, _ in ports_of(found, setting))


def _accelerators(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for one in reading.instances:
        tp, visible, ports = one.number("tp") or 1, one.get("visible"), one.get("kv_ports")
        if isinstance(ports, tuple) and len(ports) != tp:
            text = f"{one.flag_of('kv_ports')} has {len(ports)} ports for {tp} accelerators, and they must be as many"
            yield ScriptMistake(one.line_of("kv_ports"), f"{text}: pdlab needs one for all")
        if isinstance(visible, tuple) and "tp" in one.settings and len(visible) != tp:
            text = f"CUDA_VISIBLE_DEVICES has {len(visible)} accelerators, {one.flag_of('tp')} asks for {tp}"
            yield ScriptMistake(one.line_of("visible"), f"{text}: the latter is written")
    sizes = {one.number("tp"): one for one in reading.instances if one.program is fastdeploy.API_SERVER}
    if len(sizes) > 1:
        last = list(sizes.values())[-1]
        yield ScriptMistake(
            last.line_of("tp"), f"{last.flag_of('tp')} differs between prefill and decode: FastDeploy needs it equal, pdlab does not"
        )


# ---------------------------------------------------------------- roles


def _roles(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for one in reading.instances:
        wants = one.get("disaggregated") is True or one.get("scheduler") == "splitwise"
        if wants and one.program.kind == "instance" and "role" not in one.settings:
            flag = "--instance-role" if one.program is xllm.ENGINE else "--splitwise-role"
            yield ScriptMistake(one.line, f"{flag} is missing, so this instance is mixed: it is written so")
        if one.get("disaggregated") is False and one.text("role") in ("prefill", "decode"):
            flag = one.flag_of("disaggregated")
            yield ScriptMistake(
                one.line_of("disaggregated"), f"{flag} is false, which leaves {one.flag_of('role')} without effect: the role is written"
            )


def _dispatchable(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for one in reading.of("cluster"):
        if one.get("disaggregated") is not True:
            continue
        count, prefill = one.number("instances"), one.number("prefill")
        if prefill >= count:
            shown = f"{one.flag_of('prefill')} {prefill}" if prefill else "--enable-pd-disagg"
            where = f"line {one.line_of('prefill')}: {shown} leaves none of {count} instances to decode"
            raise UsageError(f"{where}: give --initial-instances more than that")
        if not prefill and not one.get("ratio"):
            yield ScriptMistake(one.line, "--num-available-dispatch-instances is missing: one instance prefills")


# ---------------------------------------------------------------- what newer versions allow, and what requests ask


def _switched_off(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for one in reading.instances:
        for setting, what in (("prefix_cache", "the prefix cache"), ("chunked", "chunked prefill")):
            if setting in one.settings and one.get(setting) is False:
                text = f"{one.flag_of(setting)} switches {what} off, which newer versions and pdlab have for prefill and decode alike"
                yield ScriptMistake(one.line_of(setting), f"{text}: it is written as it is; leave it out to have it")


def _requests(reading: LaunchReading) -> Iterator[ScriptMistake]:
    fronts = {port for one in reading.of("router") for port, _, _ in ports_of(one, "port")}
    uncached = [one for one in reading.instances if one.text("role") == "decode" and one.get("prefix_cache") is False]
    for asked in reading.of("client"):
        ports = {int(port) for port in re.findall(r"://[^/:]+:(\d+)/v1/", asked.text("url"))}
        if ports and fronts and not ports & fronts:
            yield ScriptMistake(asked.line_of("url"), f"this asks port {_or(ports)}, but the router answers at {_or(fronts)}")
        try:
            body = json.loads(asked.text("body") or "{}")
        except ValueError:
            continue
        best_of = body.get("best_of") if isinstance(body, dict) else None
        if isinstance(best_of, int) and best_of > 1 and uncached:
            text = (
                f"best_of {best_of} needs the decode instance's prefix cache, which line {uncached[0].line_of('prefix_cache')} switches off"
            )
            yield ScriptMistake(
                asked.line_of("body"), f"{text}: xLLM refuses it; pdlab answers, and computes the prompt anew for each further candidate"
            )


def _placeholders(reading: LaunchReading) -> Iterator[ScriptMistake]:
    for one in reading.launches:
        for setting in ("model", "tokenizer"):
            if placeholder(one.text(setting)):
                yield ScriptMistake(one.line_of(setting), f"{one.text(setting)} stands for a path of yours")
        for left in one.dropped:
            if placeholder(left.value):
                yield ScriptMistake(left.line, f"{left.flag} {left.value} stands for a value of yours")
