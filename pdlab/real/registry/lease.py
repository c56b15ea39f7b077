"""A claimed key, kept alive; and the knowledge of when it no longer is (`tenure`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pdlab.real.registry.store import Claim, Peek, Store, StoreAway
from pdlab.real.registry.tenure import Tenure

CALL_S = 2.0  # for a call that no lease limits


async def claim(
    store: Store,
    clock: Callable[[], float],
    key: str,
    value_of: Callable[[int], bytes],
    lease_s: float,
    *,
    floor: int = 0,
    settle_s: float = 0.0,
    patient: bool = False,
) -> HeldLease | None:
    """Claim `key` with a number above `floor` and all earlier ones; None while another holds it. `patient` holders keep it while the store
    is silent. Raises StoreAway."""
    before: Peek | None = None
    while True:
        since = clock()
        async with answering(CALL_S):
            seen = await store.peek(key, settle_s)
            if seen.held:
                return None
            if seen == before:  # it was not a faster one
                raise StoreAway(f"the count of {key} can't be raised from {seen.last}")
            before = seen
            number = max(seen.last, floor) + 1
            value = value_of(number)
            made = await store.claim(key, seen, number, value, lease_s)
        if made is not None:
            return HeldLease(store, clock, made, value, since, patient=patient)


@asynccontextmanager
async def answering(seconds: float) -> AsyncIterator[None]:
    """Limits a store's call to `seconds`: a late answer is none."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise StoreAway("no answer in time") from None


class HeldLease:
    """A claim that renews itself until it is released, dropped, or `lost`."""

    def __init__(
        self, store: Store, clock: Callable[[], float], claim: Claim, value: bytes, since: float, *, patient: bool = False
    ) -> None:
        self.store, self.clock, self.claim, self.value = store, clock, claim, value
        self.tenure = Tenure(claim.lease_s, since, patient=patient)
        self.lost = asyncio.Event()
        self.task = asyncio.create_task(self._keep(), name=f"lease of {claim.key}")

    @property
    def deadline(self) -> float:
        return self.tenure.deadline_s

    @property
    def alive(self) -> bool:
        """Read off the clock, hence true of a process that was paused a moment ago too."""
        return not self.lost.is_set() and self.tenure.alive(self.clock())

    async def write(self, key: str, value: bytes) -> bool:
        """False when the claim is over or the store did not answer."""
        if not self.alive:
            return False
        try:
            async with answering(self.claim.lease_s / 3):
                return await self.store.put(self.claim, key, value)
        except StoreAway:
            return False

    async def release(self) -> None:
        """Give the key up at once. A store that is away will notice by the lease."""
        await self.drop()
        with contextlib.suppress(StoreAway):
            async with answering(CALL_S):
                await self.store.release(self.claim)

    async def drop(self) -> None:
        """Stop without a word, as a killed process does."""
        self.lost.set()
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _keep(self) -> None:
        try:
            await self._renew_in_time()
        finally:
            self.lost.set()
        with contextlib.suppress(StoreAway):  # a renewal on its way may still reach the store
            async with answering(CALL_S):
                await self.store.release(self.claim)

    async def _renew_in_time(self) -> None:
        """Returns when the claim is over."""
        lease_s, tenure = self.claim.lease_s, self.tenure
        await asyncio.sleep(max(0.0, min(lease_s / 3, tenure.deadline_s - self.clock())))
        while tenure.alive(since := self.clock()):
            retakes = tenure.ask(since)
            try:
                async with answering(lease_s / 3 if tenure.patient else min(lease_s / 3, tenure.deadline_s - since)):
                    renewed = await self.store.renew(self.claim, self.value, retakes)
            except StoreAway:
                tenure.unanswered()
                pause_s = lease_s / 20
                await asyncio.sleep(pause_s if tenure.patient else min(pause_s, max(0.0, tenure.deadline_s - self.clock())))
                continue
            if renewed is None:
                tenure.refused()
                return
            self.claim = renewed
            tenure.granted()
            await asyncio.sleep(lease_s / 3)
