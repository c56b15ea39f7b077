"""The loop around an `Observer`: subscribe, take a snapshot, follow the changes; again after every trouble."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from pdlab.real.registry.lease import CALL_S, answering
from pdlab.real.registry.observer import Observer, WatchEvent
from pdlab.real.registry.store import Change, Store, StoreAway

log = logging.getLogger(__name__)
RETRY_S = 0.1
INBOX = 10_000


class Feed:
    """A store's changes, read ahead of a consumer that may be slow. None in the inbox: take a snapshot."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.inbox: asyncio.Queue[Change | None] = asyncio.Queue(INBOX)
        self.task = asyncio.create_task(self._pump(), name="registry watch")

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    async def next(self, timeout_s: float) -> Change | None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self.inbox.get()

    async def _pump(self) -> None:
        while True:
            try:
                async for change in self.store.changes():
                    if self.inbox.full():  # a snapshot says it all
                        while not self.inbox.empty():
                            self.inbox.get_nowait()
                        change = None
                    self.inbox.put_nowait(change)
            except StoreAway:
                await asyncio.sleep(RETRY_S)


async def watch(store: Store, clock: Callable[[], float], feed: Feed) -> AsyncIterator[WatchEvent]:
    observer = Observer()
    seen, synced, behind, wait_s = 0, False, False, CALL_S
    while True:
        events: list[WatchEvent] = []
        try:
            if not synced:
                async with answering(CALL_S):
                    seen, entries = await store.snapshot()
                if observer.away:
                    log.warning("registry: %s is back", store.where)
                events, synced = observer.snapshot(entries, clock()), True
            wait_s = store.poll_s if observer.due_s is None else max(0.0, min(store.poll_s, observer.due_s - clock()))
        except StoreAway as away:
            if not observer.away:
                log.warning("registry: %s does not answer (%s); what is known of the instances stays as it is", store.where, away)
            observer.outage()
            wait_s = RETRY_S
        for event in (*events, *observer.expire(clock())):
            yield event
