"""The registry inside one process: the embedded default, and the world of virtual time in tests. Give `clock` the loop's own there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from pdlab.real.registry.store import INSTANCE, REPORT, Change, Claim, Peek, Snapshot, StoreAway


class _Entry:
    def __init__(self, claim: Claim, value: bytes, until_s: float) -> None:
        self.claim, self.value, self.until_s = claim, value, until_s


class MemoryStore:
    where = "memory://"
    poll_s = 0.1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.up = True
        self.wiped_s = float("-inf")
        self.wipes = 0
        self.revision = 0
        self.entries: dict[str, _Entry] = {}
        self.reports: dict[str, bytes] = {}
        self.last: dict[str, int] = {}
        self.watchers: set[asyncio.Queue[Change | StoreAway | None]] = set()

    def stop(self) -> None:
        """An outage, until `start`."""
        self.up = False
        for watcher in self.watchers:
            watcher.put_nowait(StoreAway("stopped"))

    def start(self, *, wipe: bool = False) -> None:
        self.up = True
        if wipe:
            self.entries, self.reports, self.last, self.revision = {}, {}, {}, 0
            self.wiped_s, self.wipes = self.clock(), self.wipes + 1

    async def peek(self, key: str, settle_s: float) -> Peek:
        self._sweep()
        settling = self.clock() < self.wiped_s + settle_s
        return Peek(settling or key in self.entries, self.last.get(key, 0), str(self.wipes))

    async def claim(self, key: str, seen: Peek, number: int, value: bytes, lease_s: float) -> Claim | None:
        self._sweep()
        if key in self.entries or (seen.last, seen.store) != (self.last.get(key, 0), str(self.wipes)):
            return None
        return self._take(Claim(key, number, lease_s), value)

    async def renew(self, claim: Claim, value: bytes, retake: bool = False) -> Claim | None:
        self._sweep()
        entry = self.entries.get(claim.key)
        if entry is None and self.last.get(claim.key, 0) < claim.number + retake:
            return self._take(claim, value)
        if entry is None or entry.claim.number != claim.number:
            return None
        entry.until_s = self.clock() + claim.lease_s
        return claim

    async def put(self, claim: Claim, key: str, value: bytes) -> bool:
        self._sweep()
        entry = self.entries.get(claim.key)
        if entry is None or entry.claim.number != claim.number:
            return False
        if key == claim.key:
            entry.value = value
        else:
            self.reports[key] = value
        self._publish(key, value)
        return True

    async def release(self, claim: Claim) -> None:
        self._sweep()
        entry = self.entries.get(claim.key)
        if entry is not None and entry.claim.number == claim.number:
            self._drop(claim.key)

    async def snapshot(self) -> Snapshot:
        self._sweep()
        return Snapshot(self.revision, {key: entry.value for key, entry in self.entries.items()} | self.reports)

    async def changes(self) -> AsyncIterator[Change | None]:
        self._sweep()
        watcher: asyncio.Queue[Change | StoreAway | None] = asyncio.Queue()
        self.watchers.add(watcher)
        try:
            yield None
            while True:
                change = await watcher.get()
                if isinstance(change, StoreAway):
                    raise change
                yield change
        finally:
            self.watchers.discard(watcher)

    async def check(self) -> int:
        self._sweep()
        return 0

    async def close(self) -> None:
        self.stop()

    def _take(self, claim: Claim, value: bytes) -> Claim:
        self.last[claim.key] = claim.number
        self.entries[claim.key] = _Entry(claim, value, self.clock() + claim.lease_s)
        self._publish(claim.key, value)
        return claim

    def _drop(self, key: str) -> None:
        del self.entries[key]
        self.reports.pop(key.replace(INSTANCE, REPORT, 1), None)
        self._publish(key, None)

    def _sweep(self) -> None:
        if not self.up:
            raise StoreAway("stopped")
        now = self.clock()
        for key in [key for key, entry in self.entries.items() if entry.until_s <= now]:
            self._drop(key)

    def _publish(self, key: str, value: bytes | None) -> None:
        self.revision += 1
        for watcher in self.watchers:
            watcher.put_nowait(Change(self.revision, key, value))
