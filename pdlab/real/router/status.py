"""`pdlab status`, `drain`, `switch`: the cluster as the registry or a running router sees it, and what an operator asks of an instance."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pdlab.core.types import DRAIN, PULL, SWITCH, InstanceSpec, Report, Role, UsageError, nearest
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import RoleChange
from pdlab.real.registry import Registry, open_registry
from pdlab.real.registry.lease import CALL_S, answering
from pdlab.real.registry.observer import Observer
from pdlab.real.registry.records import LeaderRecord
from pdlab.real.registry.store import LEADER, StoreAway
from pdlab.real.router.roster import Known, Members
from pdlab.real.transfer.descriptor import Descriptor, decode
from pdlab.real.transfer.result import TransferStopped

LOOK_S = 0.2
WATCH_S = 1.0
WIDE = 400
REPORTED = (
    "taken_s",
    "waiting",
    "waiting_tokens",
    "running",
    "context_tokens",
    "used_blocks",
    "free_blocks",
    "preempted",
    "decode_steps",
    "decode_s",
)
TRANSPORTS = ("cuda_ipc", "shm", "tcp", "nixl")


class InstanceRow(msgspec.Struct, frozen=True):
    """One instance. `state` is ready, draining, suspect or refused; `refusal` says why."""

    spec: InstanceSpec
    state: str
    refusal: str = ""
    report: Report | None = None


class View(msgspec.Struct, frozen=True):
    """A cluster. `leader` is the router that leads, or empty; `leader_url` where it answers, as far as a registry knows."""

    rows: list[InstanceRow] = []
    leader: str = ""
    leader_url: str = ""

    def find(self, name: str) -> InstanceRow:
        """Raises UsageError that names the nearest."""
        for row in self.rows:
            if row.spec.name == name:
                return row
        names = [row.spec.name for row in self.rows]
        there = nearest(name, names) or (f"; there are {', '.join(names)}" if names else "; nobody is registered")
        raise UsageError(f"no instance is named {name!r}{there}")


_read_view = msgspec.json.Decoder(View).decode
_read_leader = msgspec.json.Decoder(LeaderRecord).decode

Source = Callable[[], Awaitable[View]]


async def view_of(registry: Registry, members: Members) -> View:
    """`members` and who leads. Raises StoreAway."""
    async with answering(CALL_S):
        entries = (await registry.store.snapshot()).entries
    return _view(members, entries)


@asynccontextmanager
async def source(registry_url: str | None, router_url: str | None, token: str = "", tls: Tls = PLAIN) -> AsyncIterator[Source]:
    """Where views come from: the registry itself, or a router that runs. Raises UsageError where neither answers."""
    if (registry_url is None) == (router_url is None):
        raise UsageError("give either --registry URL, or --router URL of a running router")
    if registry_url is not None:
        if registry_url.startswith("memory:"):
            raise UsageError("a memory:// registry is inside its router: give --router URL in place of --registry")
        async with await open_registry(registry_url, tls=tls) as registry:
            yield lambda: of_registry(registry)
        return
    http = HttpClient(router_url or "", token, tls=tls)
    try:
        yield lambda: _from_router(http)
    finally:
        http.close()


async def of_registry(registry: Registry) -> View:
    """As a router that starts now would see it. Raises UsageError where the registry does not answer."""
    try:
        async with answering(CALL_S):
            entries = (await registry.store.snapshot()).entries
    except StoreAway as away:
        raise UsageError(f"registry {registry.store.where} does not answer: {away}") from None
    members = Members()
    for event in Observer().snapshot(entries, time.monotonic()):
        members.hear(event)
    return _view(members, entries)


async def _from_router(http: HttpClient) -> View:
    raw = await _call(http, b"GET", b"/pdlab/v1/cluster")
    try:
        return _read_view(raw)
    except msgspec.MsgspecError:
        raise UsageError(f"{http.url} is no pdlab router: its /pdlab/v1/cluster cannot be read") from None


def _rows(members: Members) -> list[InstanceRow]:
    def row(known: Known) -> InstanceRow:
        return InstanceRow(known.spec, known.state, known.refusal, known.report)

    return [row(known) for _, known in sorted(members.known.items())]


def _view(members: Members, entries: dict[str, bytes]) -> View:
    try:
        leads = _read_leader(entries.get(f"{LEADER}/router", b""))
    except msgspec.MsgspecError:
        return View(_rows(members))
    return View(_rows(members), leads.candidate, leads.url)


# ---------------------------------------------------------------- showing it


def table(view: View, unix_s: float, *, urls: bool = True) -> Table:
    """A row for each instance; its `life` is its incarnation. Reports carry Unix time."""
    found = Table(box=None, pad_edge=False, header_style="bold", caption=_caption(view), caption_justify="left")
    for column in ("instance", "role", "state", "life", "engine", *(["URL"] if urls else [])):
        found.add_column(column, no_wrap=True)
    for column in ("wait/run", "KV blocks", "reported"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("links", no_wrap=True)
    devices = [nics(row.spec) for row in view.rows]
    if any(devices):
        found.add_column("NICs", no_wrap=True)
    for row, device in zip(view.rows, devices, strict=True):
        spec, report = row.spec, row.report
        load = ("", f"{spec.kv_blocks:,}", "never")
        if report is not None:
            age_s = max(0.0, unix_s - report.taken_s)
            load = (f"{report.waiting:,}/{report.running:,}", f"{report.used_blocks:,}/{spec.kv_blocks:,}", f"{age_s:.1f} s ago")
        mark = "" if row.state == "ready" else "red" if row.state == "refused" else "yellow"
        words = [spec.name, str(spec.role), row.state, str(spec.incarnation), spec.engine]
        words += [*([spec.url] if urls else []), *load, " ".join(links(spec))]
        if any(devices):
            words.append(" ".join(device))
        found.add_row(*(escape(word) for word in words), style=mark)
    return found


def _caption(view: View) -> str:
    lines = [f"{view.leader} leads" if view.leader else "no router leads"]
    lines += [f"{row.spec.name} is refused: {row.refusal}" for row in view.rows if row.refusal]
    return escape("\n".join(lines if view.rows else ["nobody is registered", *lines]))


def links(spec: InstanceSpec) -> list[str]:
    """The transports by which its KV can be reached."""
    if not spec.descriptor:
        return ["nixl"] if PULL in spec.capabilities else []
    found = _descriptor(spec)
    return [] if found is None else [name for name in TRANSPORTS if getattr(found, name) is not None]


def nics(spec: InstanceSpec) -> list[str]:
    """The RDMA NICs near its device, and the address of its NPU's own."""
    found = _descriptor(spec)
    return [] if found is None else [*found.nics, *filter(None, [found.npu_address])]


def _descriptor(spec: InstanceSpec) -> Descriptor | None:
    try:
        return decode(spec.descriptor.encode()) if spec.descriptor else None
    except TransferStopped:
        return None


async def show(registry_url: str | None, router_url: str | None, token: str, console: Console, watch: bool, tls: Tls = PLAIN) -> None:
    """Print the table; with `watch` anew each second until cancelled, also while nobody answers any more."""
    if not console.is_terminal:  # what reads a pipe has no width
        console = Console(width=WIDE, file=console.file)
    async with source(registry_url, router_url, token, tls) as views:
        first = fitting(await views(), console)
        if not watch:
            console.print(first)
        elif not console.is_terminal:
            await watching(views, console, first, console.print)
        else:
            with Live(console=console, auto_refresh=False) as live:
                await watching(views, console, first, partial(live.update, refresh=True))


def plain(view: View) -> dict[str, Any]:
    """The same for programs. Times are Unix seconds; `report` is None before the first."""

    def told(row: InstanceRow) -> dict[str, Any]:
        spec, report = row.spec, row.report
        own = None if report is None else {name: getattr(report, name) for name in REPORTED}
        return {
            "name": spec.name,
            "role": str(spec.role),
            "state": row.state,
            "refusal": row.refusal,
            "incarnation": spec.incarnation,
            "engine": spec.engine,
            "model": spec.model,
            "url": spec.url,
            "host": spec.host,
            "kv_blocks": spec.kv_blocks,
            "block_tokens": spec.block_tokens,
            "context_tokens": spec.context_tokens,
            "transports": links(spec),
            "nics": nics(spec),
            "report": own,
        }

    return {"leader": view.leader, "instances": [told(row) for row in view.rows]}


async def show_json(registry_url: str | None, router_url: str | None, token: str, console: Console, watch: bool, tls: Tls = PLAIN) -> None:
    """Print an object; with `watch` one a line, each second until cancelled. Where nobody answers then, an object says so: `error`."""
    async with source(registry_url, router_url, token, tls) as views:
        found: dict[str, Any] = plain(await views())
        while True:
            print(msgspec.json.encode(found).decode(), file=console.file, flush=True)
            if not watch:
                return
            await asyncio.sleep(WATCH_S)
            try:
                found = plain(await views())
            except UsageError as trouble:
                found = {"error": str(trouble)}


async def watching(views: Source, console: Console, shown: Table, put: Callable[[RenderableType], None]) -> None:
    """Put the table anew each second. Where nobody answers the last one stays, with the reason below it."""
    put(shown)
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            shown = fitting(await views(), console)
            put(shown)
        except UsageError as trouble:
            put(Group(shown, Text(str(trouble), "red")))


def fitting(view: View, console: Console) -> Table:
    """The table, without its URLs where these do not fit."""
    unix_s = time.time()
    whole = table(view, unix_s)
    fits = console.measure(whole, options=console.options.update_width(WIDE)).maximum <= console.width
    return whole if fits else table(view, unix_s, urls=False)


# ---------------------------------------------------------------- what an operator asks


async def command(
    registry_url: str | None, router_url: str | None, token: str, ask: Callable[[Source], Awaitable[str]], tls: Tls = PLAIN
) -> None:
    """Print what `ask` answers."""
    async with source(registry_url, router_url, token, tls) as views:
        print(await ask(views))


def run(main: Coroutine[Any, Any, None]) -> None:
    """Until it ends, or Ctrl-C."""
    try:
        asyncio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)


async def drain(views: Source, name: str, token: str = "", *, force: bool = False, wait: bool = True, tls: Tls = PLAIN) -> str:
    """Ask an instance to drain and leave; what has happened, in words. Raises UsageError where that would leave a role empty."""
    view = await views()
    row = _able(view, name, DRAIN, "drain")
    if not force:
        _check_roles(view, row, None)
    await _post(row.spec, b"/pdlab/v1/drain", b"", token, tls)
    if not wait:
        return f"{name} drains"
    while await _present(views, row.spec) is not None:
        await asyncio.sleep(LOOK_S)
    return f"{name} has drained and left"


async def switch(views: Source, name: str, role: Role, token: str = "", *, force: bool = False, wait: bool = True, tls: Tls = PLAIN) -> str:
    """Ask an instance to change its role; what has happened, in words. Raises UsageError where that would leave the old one empty."""
    view = await views()
    row = _able(view, name, SWITCH, "change its role")
    if row.spec.role is role and not row.spec.draining:
        return f"{name} is {role} already"
    if not force:
        _check_roles(view, row, role)
    await _post(row.spec, b"/pdlab/v1/role", msgspec.json.encode(RoleChange(role)), token, tls)
    if not wait:
        return f"{name} drains, and will be {role}"
    while (now := await _present(views, row.spec)) is not None:
        if now.role is role and not now.draining:
            return f"{name} is {role}"
        await asyncio.sleep(LOOK_S)
    raise UsageError(f"{name} has left before it was {role}")


def _able(view: View, name: str, capability: str, what: str) -> InstanceRow:
    row = view.find(name)
    if row.spec.engine != "pdlab" and capability not in row.spec.capabilities:
        raise UsageError(f"{name} is a {row.spec.engine} server, which cannot {what}: stop the `pdlab serve` that registered it")
    return row


def _check_roles(view: View, row: InstanceRow, role: Role | None) -> None:
    """Raises UsageError where nobody could prefill or decode any more if it had `role` (None: left)."""
    if row.state == "refused":
        return
    after = [other.spec.role for other in view.rows if other.state == "ready" and other is not row]
    after += [] if role is None else [role]
    for lacking, had, there in (
        ("prefill", row.spec.role.prefills, any(one.prefills for one in after)),
        ("decode", row.spec.role.decodes, any(one.decodes for one in after)),
    ):
        if had and not there:
            raise UsageError(f"{row.spec.name} stays {row.spec.role}: nobody else can {lacking}; start another instance, or use --force")


async def _present(views: Source, spec: InstanceSpec) -> InstanceSpec | None:
    """What that incarnation says of itself now; None: it has left."""
    for row in (await views()).rows:
        if row.spec.name == spec.name and row.spec.incarnation == spec.incarnation:
            return row.spec
    return None


async def _post(spec: InstanceSpec, path: bytes, body: bytes, token: str, tls: Tls) -> None:
    http = HttpClient(spec.url, token, tls=tls)
    try:
        await _call(http, b"POST", path, body)
    finally:
        http.close()


async def _call(http: HttpClient, method: bytes, path: bytes, body: bytes = b"") -> bytes:
    """The answer. Raises UsageError in place of an error."""
    try:
        status, raw = await http.call(method, path, body)
    except Broken as broken:
        raise UsageError(f"{http.url} does not answer: {broken}") from None
    if status == 401:
        raise UsageError(f"{http.url} wants the cluster's token: give --internal-token, or set PDLAB_INTERNAL_TOKEN")
    if status >= 300:
        raise UsageError(f"{http.url}{path.decode()} answered {status}: {_message(raw)}")
    return raw


def _message(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw)["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return raw[:200].decode("utf-8", "replace")
