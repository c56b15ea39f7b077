"""The loop around an `Observer`: subscribe, take a snapshot, follow the changes; again after every trouble."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from pdlab.core.types import InstanceSpec
from pdlab.real.registry.lease import CALL_S, answering
from pdlab.real.registry.observer import Observer, WatchEvent
from pdlab.real.registry.store import Change, Store, StoreAway

log = logging.getLogger(__name__)
RETRY_S = 0.1
CHECK_S = 1.0  # a store that takes longer to say that it is there is taken for silent
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
        self.clear()
        self.inbox.put_nowait(None)

    def clear(self) -> None:
        while not self.inbox.empty():
            self.inbox.get_nowait()

    async def next(self, timeout_s: float) -> Change | None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self.inbox.get()

    async def _pump(self) -> None:
        while True:
            try:
                async for change in self.store.changes():
                    if self.inbox.full():  # a snapshot says it all
                        self.clear()
                        change = None
                    self.inbox.put_nowait(change)
            except StoreAway:
                await asyncio.sleep(RETRY_S)


async def watch(
    store: Store,
    clock: Callable[[], float],
    feed: Feed,
    ill: Callable[[bool], None] | None = None,
    returned: Callable[[InstanceSpec], None] | None = None,
) -> AsyncGenerator[WatchEvent, None]:
    """`ill` is told when the store falls silent or shows nobody any more, and when it is well again; `returned` of an incarnation that is
    there again though it has Left."""
    observer = Observer()
    seen, synced, away, behind, check_s, was_ill = 0, False, False, False, 0.0, False
    with contextlib.suppress(TimeoutError):  # subscribe first, so that one snapshot will do
        await feed.next(CALL_S)
    while not feed.task.done():
        now = clock()
        events = observer.expire(now)
        try:
            if not synced:
                feed.clear()
                async with answering(CALL_S):
                    seen, entries = await store.snapshot()
                if away:
                    log.warning("registry: %s is back", store.where)
                    away = False
                observer.heard(clock())
                events += observer.snapshot(entries, clock())
                synced, behind, check_s = True, False, clock() + store.poll_s
            elif now >= check_s:
                async with answering(CHECK_S):
                    missed = await store.check() > seen and feed.inbox.empty()
                if feed.inbox.empty():  # else what waits there was said before
                    observer.heard(clock())
                synced, behind, check_s = not (missed and behind), missed, clock() + store.poll_s
            else:
                until = check_s if observer.due_s is None else min(check_s, observer.due_s)
                change = await feed.next(max(0.0, until - now))
                if change is None:  # connected again: who knows what happened meanwhile
                    observer.outage()
                    synced = False
                elif change.revision > seen:
                    observer.heard(clock())
                    seen = change.revision
                    events += observer.delete(change.key, clock()) if change.value is None else observer.put(change.key, change.value)
        except TimeoutError:
            pass
        except StoreAway as trouble:
            if not away:
                log.warning("registry: %s does not answer (%s); the instances stay as last seen", store.where, trouble)
            observer.outage()
            synced, away = False, True
            await asyncio.sleep(RETRY_S)
        for event in events:
            yield event
        if ill is not None and observer.ill is not was_ill:
            was_ill = observer.ill
            ill(was_ill)
        back, observer.returned = observer.returned, []
        if returned is not None:
            for spec in back:
                returned(spec)
    if not feed.task.cancelled():
        feed.task.result()
