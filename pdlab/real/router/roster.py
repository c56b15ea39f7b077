"""Who takes part, on a router's side: what the registry shows, checked, is told to the world's instances; and which router leads."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdlab.core.types import AnyEvent, InstanceSpec, Joined, Leads, Left, RegistryAway, Report, Role, Suspected, UsageError
from pdlab.real.net.http import Broken, HttpClient, server_at
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import PROTOCOL, About
from pdlab.real.registry import Registry
from pdlab.real.registry.observer import WatchEvent
from pdlab.real.transfer.descriptor import incompatible

log = logging.getLogger(__name__)
ASK_S = 1.0
Say = Callable[[str], None]

_read_about = msgspec.json.Decoder(About).decode


class InstanceEvents(Protocol):
    """Of `pdlab.real.router.instances.Instances`, what the registry tells it."""

    def join(self, spec: InstanceSpec) -> None: ...
    def leave(self, name: str, incarnation: int) -> None: ...
    def report(self, report: Report) -> None: ...
    def other(self, event: AnyEvent) -> None: ...
    def returned(self, spec: InstanceSpec) -> None: ...


@dataclass(slots=True, eq=False)
class Known:
    """An incarnation that is registered. `refusal` says why it takes no part; empty: it does."""

    spec: InstanceSpec
    protocol: int = PROTOCOL
    refusal: str = ""
    suspect: bool = False
    report: Report | None = None

    @property
    def state(self) -> str:
        if self.refusal:
            return "refused"
        if self.suspect:
            return "suspect"
        return "draining" if self.spec.draining else "ready"


class Members:
    """The book of who is there, sans-IO. Those that do not fit take no part: they speak another protocol, serve another `model` (empty: the
    first one's), or their KV cannot pass to and from the pdlab engines that came before."""

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.known: dict[str, Known] = {}

    def hear(self, event: WatchEvent, protocol: int = PROTOCOL) -> list[WatchEvent]:
        """What the world shall know of it. `protocol` is what an instance that has Joined speaks."""
        if isinstance(event, Joined):
            return self._joined(event, protocol)
        known = self.known.get(event.instance)
        if known is None or known.spec.incarnation != event.incarnation:
            return []
        if isinstance(event, Report):
            known.report = event
        elif isinstance(event, Suspected):
            known.suspect = event.lost
        elif isinstance(event, Left):
            del self.known[event.instance]
            return [] if known.refusal else [event, *self._again()]
        else:  # Switched: its Joined has said so
            return []
        return [] if known.refusal else [event]

    def _joined(self, event: Joined, protocol: int) -> list[WatchEvent]:
        known = self.known.get(event.spec.name)
        if known is not None and known.spec.incarnation == event.spec.incarnation:
            known.spec = event.spec
        else:
            known = Known(event.spec, protocol)
            known.refusal = self._misfit(known)
            self.known[event.spec.name] = known
            if known.refusal:
                log.warning("%s takes no part: %s", event.spec.name, known.refusal)
        return [] if known.refusal else [event]

    def _again(self) -> list[WatchEvent]:
        """One has left: whom it kept out may fit now."""
        admitted: list[WatchEvent] = []
        for known in self.known.values():
            if known.refusal and not (reason := self._misfit(known)):
                known.refusal = reason
                log.warning("%s takes part now", known.spec.name)
                admitted.append(Joined(known.spec))
                if known.report is not None:
                    admitted.append(known.report)
        return admitted

    def _misfit(self, new: Known) -> str:
        if new.protocol != PROTOCOL:
            return f"it speaks pdlab's protocol {new.protocol}, and this is {PROTOCOL}: run the same version of pdlab everywhere"
        if new.spec.url:
            try:
                server_at(new.spec.url)
            except UsageError as error:
                return f"it cannot be reached: {error}"
        inside = [known.spec for known in self.known.values() if not known.refusal and known is not new]
        model = self.model or (inside[0].model if inside else "")
        if model and new.spec.model and new.spec.model != model:
            return f"it serves {new.spec.model}, and this cluster {model}: start it with --served-model-name {model} if they are the same"
        engine = inside[0].engine if inside else new.spec.engine
        if new.spec.engine != engine:
            return f"its engine is {new.spec.engine}, this cluster's {engine}, and their KV does not pass: give it a ?namespace= of its own"
        if new.spec.engine != "pdlab" or not new.spec.descriptor:
            return ""
        others = {spec.descriptor for spec in inside if spec.descriptor and spec.name != new.spec.name}
        reasons = (incompatible(other.encode(), new.spec.descriptor.encode()) for other in sorted(others))
        return next((reason for reason in reasons if reason), "")


async def protocol_of(spec: InstanceSpec, token: str = "", tls: Tls = PLAIN) -> int:
    """What it says that it speaks. One that does not answer may be slow: nothing is held against it yet."""
    if spec.engine != "pdlab" or not spec.url:
        return PROTOCOL
    try:
        http = HttpClient(spec.url, token, tls=tls)
    except UsageError:
        return PROTOCOL
    try:
        status, raw = await http.call(b"GET", b"/pdlab/v1/instance", within_s=ASK_S)
        return _read_about(raw).protocol if status == 200 else PROTOCOL
    except (Broken, msgspec.MsgspecError):
        return PROTOCOL
    finally:
        http.close()


async def follow(
    registry: Registry,
    instances: InstanceEvents,
    members: Members,
    *,
    ask: Callable[[InstanceSpec], Awaitable[int]] = protocol_of,
    say: Say | None = None,
) -> None:
    """Tell the world what happens in the registry, until that is closed. `ask` tells an instance's protocol, `say` the operator."""
    watched = registry.watch(ill=lambda away: instances.other(RegistryAway(away)), returned=lambda spec: instances.returned(spec))
    async with aclosing(watched) as events:
        async for event in events:
            protocol = PROTOCOL
            if isinstance(event, Joined):
                known = members.known.get(event.spec.name)
                if known is None or known.spec.incarnation != event.spec.incarnation:
                    protocol = await ask(event.spec)
            before = {name: (known.spec.role, known.state) for name, known in members.known.items()}
            for told in members.hear(event, protocol):
                _tell(instances, told)
            if say is not None:
                _say(say, before, members)


def _tell(instances: InstanceEvents, event: WatchEvent) -> None:
    match event:
        case Joined(spec):
            instances.join(spec)
        case Left(name, incarnation):
            instances.leave(name, incarnation)
        case Report():
            instances.report(event)
        case _:
            instances.other(event)


def _say(say: Say, before: Mapping[str, tuple[Role, str]], members: Members) -> None:
    for name in before.keys() - members.known.keys():
        say(f"{name} has left")
    for name, known in members.known.items():
        if before.get(name) != (known.spec.role, known.state):
            say(f"{name} is {known.state}: {known.spec.role}, {known.spec.url}")


async def lead(registry: Registry, instances: InstanceEvents, name: str, *, lease_s: float = 3.0, url: str = "") -> None:
    """Campaign as `name` for the routers' leadership until cancelled, and tell the world when it is won and lost. `url` is told
    to others."""
    instances.other(Leads(False))
    leadership = await registry.elect(name, lease_s=lease_s, url=url)
    try:
        while True:
            instances.other(Leads(await leadership.changed()))
    finally:
        await leadership.resign()
