"""At most one leader: who holds the key `leader/<election>`, and knows by its own clock that it still does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pdlab.real.registry import lease
from pdlab.real.registry.lease import HeldLease
from pdlab.real.registry.records import LeaderRecord, encode
from pdlab.real.registry.store import LEADER, Store, StoreAway

log = logging.getLogger(__name__)
POLL_S = 0.5


class Leadership:
    """A candidate of an election, campaigning until it resigns; a deposed leader campaigns again.

    Ask `is_leader` before each action and send `fencing` with it: what was decided just before a pause can arrive after another
    was elected, and only its receiver can refuse the lower number.
    """

    def __init__(self, store: Store, clock: Callable[[], float], candidate: str, election: str, lease_s: float, url: str = "") -> None:
        self.store, self.clock, self.lease_s = store, clock, lease_s
        self.candidate, self.election, self.url = candidate, election, url
        self.fencing = 0  # of the last term, 0 before the first
        self.holding: HeldLease | None = None
        self._told = (False, 0)
        self._turn = asyncio.Event()
        self.task = asyncio.create_task(self._campaign(), name=f"{candidate} campaigns for {election}")

    @property
    def is_leader(self) -> bool:
        return self.holding is not None and self.holding.alive

    async def changed(self) -> bool:
        """Wait until leadership is won or lost, or a new term began, since the last call (at first: since no leader); `is_leader` then."""
        while (state := (self.is_leader, self.fencing)) == self._told:
            self._turn.clear()
            await self._turn.wait()
        self._told = state
        return state[0]

    async def resign(self) -> None:
        """Give leadership up at once, and stop campaigning."""
        self.task.cancel()
        await asyncio.wait([self.task])
        if self.holding is not None:
            await self.holding.release()
        self._turn.set()

    async def drop(self) -> None:
        """Fall silent without resigning, as a killed process does (for faults and tests)."""
        self.task.cancel()
        await asyncio.wait([self.task])
        if self.holding is not None:
            await self.holding.drop()
        self._turn.set()

    async def _campaign(self) -> None:
        quiet = False
        while True:
            try:
                self.holding = await lease.claim(
                    self.store,
                    self.clock,
                    f"{LEADER}/{self.election}",
                    lambda number: encode(LeaderRecord(lease_s=self.lease_s, candidate=self.candidate, fencing=number, url=self.url)),
                    self.lease_s,
                    floor=self.fencing,
                    settle_s=self.lease_s,
                )
                quiet = False
            except StoreAway as away:
                self.holding = None
                if not quiet:
                    log.warning(
                        "registry: %s can't vote in %s at %s (%s), trying on", self.candidate, self.election, self.store.where, away
                    )
                quiet = True
            if self.holding is None:
                await asyncio.sleep(min(POLL_S, self.lease_s / 5))
                continue
            self.fencing = self.holding.claim.number
            self._turn.set()
            await self.holding.lost.wait()
            self._turn.set()
