"""Whom an instance connects to: whom its registry shows. A request names the instances that hold its KV, and can name anybody; but the
cluster's token is sent, and KV is fetched and written, only where a member has registered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from pdlab.real.api.legs import kv_lost
from pdlab.real.registry.lease import answering
from pdlab.real.registry.records import Garbage, read_instance
from pdlab.real.registry.registry import Registry
from pdlab.real.registry.store import INSTANCE, StoreAway

log = logging.getLogger(__name__)
FRESH_S = 10.0  # so long a member that has left still counts
LOOK_S = 1.0  # for the registry's answer, and between two tries while it is away


class Registered:
    """A `pdlab.real.api.exchange.Directory`. Whoever is not known is looked up; while the registry is away those last seen count."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._urls: frozenset[str] = frozenset()
        self._descriptors: frozenset[bytes] = frozenset()
        self._seen_s = self._away_s = float("-inf")
        self._looking = asyncio.Lock()

    async def check_descriptor(self, descriptor: bytes) -> None:
        if descriptor not in self._descriptors or self._clock() >= self._seen_s + FRESH_S:
            await self._look()
        if descriptor not in self._descriptors:
            raise kv_lost("no instance is registered under the descriptor that the request names")

    async def check_url(self, url: str) -> None:
        """Looked up each time: what is sent there is a secret."""
        await self._look()
        if url not in self._urls:
            raise kv_lost(f"no instance is registered at {url}")

    async def _look(self) -> None:
        asked_s = self._clock()
        async with self._looking:
            now = self._clock()
            if self._seen_s >= asked_s or now < self._away_s + LOOK_S:
                return
            try:
                async with answering(LOOK_S):
                    entries = (await self._registry.store.snapshot()).entries
            except StoreAway as away:
                self._away_s = self._clock()
                log.warning("the registry does not answer (%s): instances that were registered when last seen count", away)
                return
            specs = []
            for key, value in entries.items():
                kind, _, name = key.partition("/")
                with suppress(Garbage):
                    if kind == INSTANCE:
                        specs.append(read_instance(name, value).spec)
            own = [spec for spec in specs if spec.engine == "pdlab"]
            self._urls = frozenset(spec.url.rstrip("/") for spec in own if spec.url)
            self._descriptors = frozenset(spec.descriptor.encode() for spec in own if spec.descriptor)
            self._seen_s = now


class NamedByProxies:
    """Without a registry, and with a token: who has that says between whom KV passes; both ends of a transfer prove that they have it.
    Nobody is known to whom it could be sent."""

    async def check_descriptor(self, descriptor: bytes) -> None:
        pass

    async def check_url(self, url: str) -> None:
        raise kv_lost(f"{url} is not known: migrations need a --registry")
