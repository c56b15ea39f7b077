"""Who listens to a job hears its newest state: what comes faster than a listener reads is left out, and so nobody is waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

QUIET_S = 15.0  # after which a line is sent, so that a dead connection is seen
Snapshot = Mapping[str, Any]


class FeedListener:
    """Of one job, or of all. `changed` are the jobs of which there is news."""

    def __init__(self, job: str | None) -> None:
        self.job = job
        self.changed: dict[str, None] = {}
        self.woken = asyncio.Event()


class JobFeed:
    """`put`, `forget` and `touch` may be called by any thread. `versions` count the news of each job."""

    def __init__(self) -> None:
        self.newest: dict[str, Snapshot] = {}
        self.versions: dict[str, int] = {}
        self.listeners: set[FeedListener] = set()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closed = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """In the loop where those who listen wait."""
        self.loop = asyncio.get_running_loop()

    def close(self) -> None:
        self.closed = True
        for listener in self.listeners:
            listener.woken.set()

    def put(self, job: str, snapshot: Snapshot) -> None:
        with self._lock:
            self.newest[job] = snapshot
        self.touch(job)

    def forget(self, job: str) -> None:
        """It has ended: the database has the rest."""
        with self._lock:
            self.newest.pop(job, None)
        self.touch(job)

    def touch(self, job: str) -> None:
        """There is news of it."""
        with self._lock:
            self.versions[job] = self.versions.get(job, 0) + 1
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._wake, job)

    def get(self, job: str) -> Snapshot:
        with self._lock:
            return self.newest.get(job, {})

    @contextmanager
    def listening(self, job: str | None) -> Iterator[FeedListener]:
        listener = FeedListener(job)
        self.listeners.add(listener)
        try:
            yield listener
        finally:
            self.listeners.discard(listener)

    async def changes(self, listener: FeedListener) -> AsyncIterator[list[str]]:
        """The jobs of which there is news; none after a quiet while."""
        while not self.closed:
            try:
                await asyncio.wait_for(listener.woken.wait(), QUIET_S)
            except TimeoutError:
                yield []
                continue
            listener.woken.clear()
            changed, listener.changed = list(listener.changed), {}
            if changed:
                yield changed

    def _wake(self, job: str) -> None:
        for listener in self.listeners:
            if listener.job in (None, job):
                listener.changed[job] = None
                listener.woken.set()
