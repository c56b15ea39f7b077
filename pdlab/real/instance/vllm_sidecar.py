"""Registers an instance that cannot register itself, a vLLM server, and reports for it, for as long as it answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from pdlab.core.types import InstanceSpec, Report, Role, UsageError
from pdlab.real.net.http import Broken
from pdlab.real.registry import Registration, Registry
from pdlab.real.registry.wait import patiently

log = logging.getLogger(__name__)
RETRY_S = 0.2


class Upstream(Protocol):
    """`pdlab.real.router.vllm.Vllm` is one. Both raise Broken where it does not answer, UsageError where it never will."""

    async def probe(self, name: str, role: Role, model: str = "") -> tuple[InstanceSpec, int]: ...
    async def report(self, spec: InstanceSpec, now: float) -> Report: ...


class Keeper:
    """`run` until cancelled. An instance that does not answer for `lease_s` loses its place, and gets one again, as a new incarnation, when
    it answers. For the registry it waits `wait_s` at the start. `model` is which of several it serves; `say` tells the operator."""

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        name: str,
        role: Role,
        model: str = "",
        *,
        report_s: float = 0.5,
        lease_s: float = 3.0,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        say: Callable[[str], None] = print,
    ) -> None:
        self.registry, self.upstream, self.name, self.role, self.model = registry, upstream, name, role, model
        self.report_s, self.lease_s, self.wait_s = report_s, lease_s, wait_s
        self.clock, self.unix, self.say = clock, unix, say
        self.registration: Registration | None = None
        self.draining = False
        self.last: Report | None = None  # since routers know what the registration says

    async def run(self) -> None:
        """Raises UsageError for a name that is taken, or a model that it does not serve, unless it has had a place before."""
        joined = waiting = False
        while True:
            try:
                spec, _ = await self.upstream.probe(self.name, self.role, self.model)
                register = partial(self.registry.register, spec, lease_s=self.lease_s)
                self.registration = await (register() if joined else patiently(register, self.wait_s, self.say))
            except Broken as broken:
                if not waiting:
                    self.say(f"waiting for {self.name} to answer: {broken}")
                waiting = True
            except UsageError as error:
                if not joined:
                    raise
                log.info("%s cannot join again yet: %s", self.name, error)
            else:
                joined, waiting = True, False
                self.say(f"{self.name} has joined as {self.role}: {spec.url} with {spec.kv_blocks:,} KV blocks")
                try:
                    await self._keep(self.registration)
                finally:
                    await self._leave()
                self.say(f"{self.name} has lost its place in the registry")
            await asyncio.sleep(RETRY_S)

    async def drain(self, within_s: float) -> int:
        """Let routers send nothing more, and wait until nothing runs, `within_s` at most; how many requests are left."""
        self.draining = True
        until_s = self.clock() + within_s
        while (left := self._running()) and self.clock() < until_s:
            await asyncio.sleep(min(RETRY_S, self.report_s))
        return left

    def _running(self) -> int:
        here, last = self.registration, self.last
        if here is None:
            return 0
        return 1 if last is None or not here.spec.draining else last.waiting + last.running

    async def _leave(self) -> None:
        here, self.registration, self.last = self.registration, None, None
        if here is not None:
            await here.close()

    async def _keep(self, here: Registration) -> None:
        """Until the lease is lost, here or at the instance."""
        heard_s = self.clock()
        while not here.lost.is_set() and self.clock() < heard_s + self.lease_s:
            try:
                async with asyncio.timeout(self.lease_s):
                    report = await self.upstream.report(here.spec, self.unix())
            except (Broken, UsageError, TimeoutError) as trouble:
                log.info("%s does not answer: %s", self.name, trouble)
            else:
                heard_s = self.clock()
                await here.report(report)
                if here.spec.draining is self.draining:
                    self.last = report
                elif await here.update(msgspec.structs.replace(here.spec, draining=self.draining)):
                    self.last = None
            try:
                async with asyncio.timeout(self.report_s):
                    await here.lost.wait()
            except TimeoutError:
                continue
