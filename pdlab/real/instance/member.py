"""An instance's life in a cluster: it joins, reports its load, fences itself when the registry has lost it, changes role, and leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import islice

import msgspec

from pdlab.core.instance_spec import MeasuredInstance
from pdlab.core.types import CAPABILITIES, InstanceSpec, Report, Role, UsageError
from pdlab.cost import InstanceProfile, measured_profiles
from pdlab.real.api.backend import Exchanging
from pdlab.real.api.errors import ApiError, fenced
from pdlab.real.api.service import Service
from pdlab.real.engine.messages import Ready
from pdlab.real.registry.lease import CALL_S, answering
from pdlab.real.registry.records import Garbage, read_instance
from pdlab.real.registry.registry import Registration, Registry
from pdlab.real.registry.store import INSTANCE, RegistrySilent, StoreAway
from pdlab.real.transfer.descriptor import incompatible

log = logging.getLogger(__name__)
MOST_HASHES = 40_000  # in one report, so that it stays below the registry's bound
AGAIN_S = 0.02  # between two tries to publish


def measured_of(ready: Ready, profile: InstanceProfile | None = None, *, max_batch_tokens: int = 0, max_seqs: int = 0) -> MeasuredInstance:
    """What an engine has found out about itself; of its steps, what was measured before, where a `profile` is given."""
    prefill, decode = ready.prefill_profile, ready.decode_profile
    if profile is not None:
        prefill, decode = measured_profiles(profile, max_batch_tokens, max_seqs, ready.kv_blocks * ready.block_tokens)
    return MeasuredInstance(
        kv_blocks=ready.kv_blocks,
        block_tokens=ready.block_tokens,
        block_bytes=ready.block_bytes,
        context_tokens=ready.context_tokens or ready.max_tokens,
        prefill_profile=prefill,
        decode_profile=decode,
        capabilities=CAPABILITIES if ready.descriptor else (),
        descriptor=ready.descriptor.decode(),
    )


class Member:
    """`await join()`, and in the end `await close()`. Without a registry it only drains and changes its role. `left` is called when it has
    drained for good: the server may end."""

    def __init__(
        self,
        service: Service,
        engine: Exchanging,
        registry: Registry | None,
        spec: InstanceSpec,
        *,
        report_s: float = 0.5,
        lease_s: float = 3.0,
        left: Callable[[], None] | None = None,
    ) -> None:
        self.service, self.engine, self.registry = service, engine, registry
        self.spec, self.state = spec, "ready"
        self.report_s, self.lease_s, self.left = report_s, lease_s, left
        self._registration: Registration | None = None
        self._cached: set[int] = set()  # as last reported by the engine
        self._unsent: dict[int, bool] = {}  # prefix hashes that the registry has not heard of: stored, or evicted
        self._keeping: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[None] | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._ailing = False  # its last report went wrong, and the log says so
        self._wanted = spec.role
        self._stirred = asyncio.Event()  # it may be at rest
        service.on_end = engine.on_load = self._stirred.set
        service.metrics.place = lambda: (self.spec.name, str(self.spec.role))

    async def join(self) -> None:
        """Raises RegistrySilent, NameHeld, and UsageError where the KV here does not fit that of the model's others."""
        if self.registry is None:
            return
        _check_fit(self.spec, await _present(self.registry))
        await self._register(self.registry)
        self._keeping = asyncio.create_task(self._keep(self.registry), name=f"membership of {self.spec.name}")

    async def close(self) -> None:
        """Deregister."""
        tasks = [task for task in (self._keeping, self._changing, self._giving_up) if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._deregister()

    def switch(self, role: Role) -> None:
        """Begin to drain, then change. Raises ApiError while it drains for good."""
        if self.state == "draining":
            raise ApiError(503, "the instance is draining and will leave", code="draining")
        self._wanted = role
        if self.state == "ready" and role is not self.spec.role:
            self._start("switching", self._switch())

    def drain(self) -> None:
        """Begin to drain, then leave."""
        if self.state == "draining":
            return
        if self._changing is not None:
            self._changing.cancel()
        self._start("draining", self._leave())

    def rejoin(self, incarnation: int) -> None:
        """Give up one's place as that incarnation, and take it again as a new one. Harmless where it is over already."""
        here = self._registration
        if here is not None and here.incarnation == incarnation and self._giving_up is None:
            self._giving_up = asyncio.create_task(here.close(), name=f"{self.spec.name} gives up its place")

    # ------------------------------------------------------------ changes

    def _start(self, state: str, change: Coroutine[None, None, None]) -> None:
        self.state = state
        self._open()
        self._changing = asyncio.create_task(change, name=f"{state} of {self.spec.name}")

    def _open(self) -> None:
        """Take new requests only where routers know that it does."""
        here = self.registry is None or self._registration is not None
        self.service.fenced = not here
        self.service.closed = self.state if self.state != "ready" else "" if here else "not registered"

    async def _switch(self) -> None:
        await self._publish(msgspec.structs.replace(self.spec, draining=True))
        await self._at_rest()
        while self.spec.draining or self.spec.role is not self._wanted:
            await self._publish(msgspec.structs.replace(self.spec, draining=False, role=self._wanted))
        self.state = "ready"
        self._open()

    async def _leave(self) -> None:
        await self._publish(msgspec.structs.replace(self.spec, draining=True))
        await self._at_rest()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await self._deregister()
        if self.left is not None:
            self.left()

    async def _at_rest(self) -> None:
        """Nobody is being answered, and the engine's worker has nothing: a sequence may outlive its client, a lease its request."""
        while (self.service.in_flight or not self.engine.load.idle) and self.engine.down is None:
            self._stirred.clear()
            await self._stirred.wait()

    async def _publish(self, spec: InstanceSpec) -> None:
        """Until the registry has it, or the next registration will say it."""
        self.spec = spec
        while (here := self._registration) is not None and not await here.update(spec):
            await asyncio.sleep(AGAIN_S)

    # ------------------------------------------------------------ the registry

    async def _register(self, registry: Registry) -> None:
        self._registration = await registry.register(self.spec, lease_s=self.lease_s, patient=True)
        self.spec = self._registration.spec
        self._open()

    async def _deregister(self) -> None:
        if (here := self._registration) is not None:
            self._registration = None
            await here.close()

    async def _keep(self, registry: Registry) -> None:
        """What goes wrong here is logged, once until a report succeeds, and tried again: requests are served meanwhile."""
        while True:
            try:
                if (here := self._registration) is None:
                    await self._rejoin(registry)
                else:
                    await self._report_until_lost(here)
                    self._fence()
            except Exception:
                if not self._ailing:
                    log.exception("%s cannot report its load, and tries again", self.spec.name)
                self._ailing = True
                await asyncio.sleep(self.report_s)

    async def _rejoin(self, registry: Registry) -> None:
        if self._giving_up is not None:
            await self._giving_up
            self._giving_up = None
        while self._registration is None:
            try:
                await self._register(registry)
            except UsageError as error:
                log.info("%s cannot join again yet: %s", self.spec.name, error)
                await asyncio.sleep(self.lease_s / 10)
        self._unsent = dict.fromkeys(self._cached, True)  # nothing is known of a new incarnation's cache
        log.warning("%s has joined again, as incarnation %d", self.spec.name, self.spec.incarnation)

    async def _report_until_lost(self, here: Registration) -> None:
        while here.alive:
            await self._report(here)
            try:
                async with asyncio.timeout(self.report_s):
                    await here.lost.wait()
            except TimeoutError:
                continue

    async def _report(self, here: Registration) -> None:
        """What the registry did not take, or was too much for one report, waits for the next."""
        report = self.engine.report(self.spec.name, self.spec.incarnation)
        self._note(report)
        changes = dict(islice(self._unsent.items(), MOST_HASHES))
        stored = tuple(hash for hash, there in changes.items() if there)
        evicted = tuple(hash for hash, there in changes.items() if not there)
        if await here.report(msgspec.structs.replace(report, stored=stored, evicted=evicted)):
            for hash in changes:
                del self._unsent[hash]
        self._ailing = False

    def _note(self, report: Report) -> None:
        """Of each prefix hash the registry is to hear where it is now."""
        self._cached.update(report.stored)
        self._cached.difference_update(report.evicted)
        self._unsent.update(dict.fromkeys(report.stored, True))
        self._unsent.update(dict.fromkeys(report.evicted, False))

    def _fence(self) -> None:
        """Others may hold that this incarnation has left: what it does for them must end."""
        log.warning("%s has lost its place in the registry: what is under way is dropped", self.spec.name)
        self._registration = None
        self._open()
        self.service.break_off(fenced())


async def _present(registry: Registry) -> list[InstanceSpec]:
    """Who is registered. Raises RegistrySilent."""
    try:
        async with answering(CALL_S):
            _, entries = await registry.store.snapshot()
    except StoreAway as away:
        raise RegistrySilent(f"registry {registry.store.where} can't be used ({away}): is the server running?") from None
    found = []
    for key, value in sorted(entries.items()):
        kind, _, name = key.partition("/")
        with suppress(Garbage):
            if kind == INSTANCE:
                found.append(read_instance(name, value).spec)
    return found


def _check_fit(ours: InstanceSpec, others: list[InstanceSpec]) -> None:
    """Raises UsageError that names what differs, where KV cannot pass to or from another instance of the same model."""
    for other in others:
        if other.name == ours.name or other.engine != "pdlab" or other.model != ours.model or not (ours.descriptor and other.descriptor):
            continue
        if why := incompatible(ours.descriptor.encode(), other.descriptor.encode()):
            raise UsageError(f"instance {ours.name!r} cannot join {other.name!r}, which serves {other.model} too: {why}")
