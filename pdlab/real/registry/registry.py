"""The registry as instances and routers see it; the same over every store."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Self

import msgspec

from pdlab.core.types import InstanceSpec, Report, UsageError
from pdlab.real.registry import lease
from pdlab.real.registry.election import Leadership
from pdlab.real.registry.lease import HeldLease
from pdlab.real.registry.observer import WatchEvent
from pdlab.real.registry.records import MAX_BYTES, Garbage, InstanceRecord, check_lease, check_name, encode, read_instance
from pdlab.real.registry.store import INSTANCE, REPORT, NameHeld, RegistrySilent, Store, StoreAway
from pdlab.real.registry.watch import Feed, watch


class Registration:
    """An instance's place in the registry, its lease renewed in the background.

    When `lost` is set the place is lost, and the instance must fence itself: others may already hold that it has Left. It may
    register again then, as a new incarnation. `close` sets it too.
    """

    def __init__(self, holding: HeldLease, spec: InstanceSpec) -> None:
        self._holding = holding
        self.spec = spec
        self.lost = holding.lost

    @property
    def incarnation(self) -> int:
        return self.spec.incarnation

    @property
    def alive(self) -> bool:
        """False from the moment the place is lost: where it isn't `patient`, when the lease ends, also in a process that was paused and
        could not set `lost` yet."""
        return self._holding.alive

    async def update(self, spec: InstanceSpec) -> bool:
        """Publish a changed spec (a role switch) of this incarnation. False: the store has not got it (lost, or not answering)."""
        if spec.name != self.spec.name:
            raise UsageError(f"instance {self.spec.name!r} can't become {spec.name!r}: close it and register the other")
        new = msgspec.structs.replace(spec, incarnation=self.incarnation)
        value = _instance(new, self._holding.claim.lease_s)
        if not await self._holding.write(self._holding.claim.key, value):
            return False
        self.spec, self._holding.value = new, value
        return True

    async def report(self, report: Report) -> bool:
        """Publish the load. False: dropped; keep its `stored` and `evicted` for the next one, since they are differences."""
        named = msgspec.structs.replace(report, instance=self.spec.name, incarnation=self.incarnation)
        value = encode(named)
        if len(value) > MAX_BYTES:
            raise UsageError(f"a report of {len(value)} bytes, at most {MAX_BYTES}: send `stored` and `evicted` in parts")
        return await self._holding.write(f"{REPORT}/{self.spec.name}", value)

    async def close(self) -> None:
        """Deregister at once."""
        await self._holding.release()

    async def drop(self) -> None:
        """Fall silent without deregistering, as a killed process does (for faults and tests)."""
        await self._holding.drop()


class Registry:
    """Close it when done: what it still holds is given up cleanly then."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.clock = store, clock
        self._registrations: list[Registration] = []
        self._leaderships: list[Leadership] = []
        self._feeds: set[Feed] = set()

    async def register(self, spec: InstanceSpec, *, lease_s: float = 3.0, patient: bool = False) -> Registration:
        """The incarnation is above all earlier ones of that name and above `spec.incarnation`. `patient`: while the registry is silent it
        keeps its place, and takes it again afterwards (`tenure`). Raises RegistrySilent, NameHeld while another holds the name, and
        UsageError for what can't be registered."""
        check_name(spec.name, "instance name")
        check_lease(lease_s)

        def value_of(incarnation: int) -> bytes:
            return _instance(msgspec.structs.replace(spec, incarnation=incarnation), lease_s)

        try:
            key = f"{INSTANCE}/{spec.name}"
            holding = await lease.claim(self.store, self.clock, key, value_of, lease_s, floor=spec.incarnation, patient=patient)
        except StoreAway as away:
            raise RegistrySilent(f"registry {self.store.where} can't be used ({away}): is the server running?") from None
        if holding is None:
            raise NameHeld(
                f"instance {spec.name!r} is registered at {self.store.where} already: choose another name, or, if its holder died, "
                f"try again when the lease has run out"
            )
        made = Registration(holding, msgspec.structs.replace(spec, incarnation=holding.claim.number))
        self._registrations = [one for one in self._registrations if not one.lost.is_set()] + [made]
        return made

    async def watch(
        self, *, ill: Callable[[bool], None] | None = None, returned: Callable[[InstanceSpec], None] | None = None
    ) -> AsyncGenerator[WatchEvent, None]:
        """The current state, then its changes, until the registry is closed. `ill` is told when the registry falls silent or shows nobody
        any more, and when it is well again; `returned` of an incarnation that is there again though it has Left: it must come back as a
        new one. Leave it earlier by `aclosing`."""
        feed = Feed(self.store)
        self._feeds.add(feed)
        try:
            async with aclosing(watch(self.store, self.clock, feed, ill, returned)) as events:
                async for event in events:
                    yield event
        finally:
            self._feeds.discard(feed)
            await feed.stop()

    async def elect(self, candidate: str, *, election: str = "router", lease_s: float = 3.0, url: str = "") -> Leadership:
        """Campaign from now on, until `resign`. All candidates of an election should use the same lease. `url` is where
        this one answers."""
        check_name(candidate, "candidate")
        check_name(election, "election")
        check_lease(lease_s)
        made = Leadership(self.store, self.clock, candidate, election, lease_s, url)
        self._leaderships.append(made)
        return made

    async def close(self) -> None:
        """Deregister, resign, disconnect."""
        for leadership in self._leaderships:
            await leadership.resign()
        for registration in self._registrations:
            if not registration.lost.is_set():
                await registration.close()
        for feed in list(self._feeds):
            await feed.stop()
        await self.store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def _instance(spec: InstanceSpec, lease_s: float) -> bytes:
    value = encode(InstanceRecord(lease_s=lease_s, spec=spec))
    try:
        read_instance(spec.name, value)
    except Garbage as garbage:
        raise UsageError(f"instance {spec.name!r} can't be registered: {garbage}") from None
    return value
