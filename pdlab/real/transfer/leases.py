"""The source's book: which blocks peers may read, under which lease, until when. Times are monotonic seconds.

A lease id is used once in an incarnation. So a lease that is valid now has been valid since its offer, and all that was read under it
before was read from blocks that were held: asking after the copy is enough.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from pdlab.real.transfer.blocks import Ids
from pdlab.real.transfer.result import Trouble

End = Literal["read", "released", "expired"]
REMEMBERED = 8192  # ended leases, so that a question asked again is answered as before


@dataclass(frozen=True, slots=True)
class Lease:
    """`expires_s` is when it ends unless renewed."""

    blocks: frozenset[int]
    tokens: int
    expires_s: float


class Leases:
    """Threads ask it; each answer holds for the moment it is given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Lease] = {}
        self._ended: OrderedDict[str, tuple[End, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def offer(self, lease_id: str, blocks: Ids, tokens: int, expires_s: float) -> None:
        with self._lock:
            assert lease_id not in self._open and lease_id not in self._ended, f"lease {lease_id} was used before"
            self._open[lease_id] = Lease(frozenset(blocks.tolist()), tokens, expires_s)

    def renew(self, lease_id: str, until_s: float) -> bool:
        """Never shortens. False: it has ended."""
        with self._lock:
            lease = self._open.get(lease_id)
            if lease is None:
                return False
            self._open[lease_id] = Lease(lease.blocks, lease.tokens, max(lease.expires_s, until_s))
            return True

    def end(self, lease_id: str, how: End, transfer: int = 0) -> Lease | None:
        """The lease that has now ended; None if it had before."""
        with self._lock:
            return self._end(lease_id, how, transfer)

    def expire(self, now: float) -> list[tuple[str, Lease]]:
        """Those that end now."""
        with self._lock:
            due = [(lease_id, lease) for lease_id, lease in self._open.items() if lease.expires_s <= now]
            for lease_id, _ in due:
                self._end(lease_id, "expired", 0)
            return due

    def next_s(self) -> float | None:
        """When the next one expires."""
        with self._lock:
            return min((lease.expires_s for lease in self._open.values()), default=None)

    def check(self, lease_id: str, blocks: Ids, now: float) -> None:
        """Trouble unless these blocks may be read under it, now."""
        with self._lock:
            self._check(lease_id, blocks, now)

    def finish(self, lease_id: str, blocks: Ids, now: float, *, transfer: int, release: bool) -> Lease | None:
        """What was read is sound, or Trouble. The lease, if that ended it; None if it goes on or this answer was given before."""
        with self._lock:
            if self._ended.get(lease_id) == ("read", transfer):
                return None
            self._check(lease_id, blocks, now)
            return self._end(lease_id, "read", transfer) if release else None

    def _check(self, lease_id: str, blocks: Ids, now: float) -> None:
        lease = self._open.get(lease_id)
        if lease is None or lease.expires_s <= now:
            how = self._ended[lease_id][0] if lease_id in self._ended else "unknown" if lease is None else "expired"
            raise Trouble(f"lease {lease_id} is {how}" if how == "unknown" else f"lease {lease_id} has ended: {how}", "expired")
        if not lease.blocks.issuperset(blocks.tolist()):
            raise Trouble(f"lease {lease_id} does not cover block {min(set(blocks.tolist()) - lease.blocks)}")

    def _end(self, lease_id: str, how: End, transfer: int) -> Lease | None:
        lease = self._open.pop(lease_id, None)
        if lease is not None:
            self._ended[lease_id] = how, transfer
            while len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
        return lease
