"""The source's book: which blocks peers may read, under which lease. When one ends is the worker's affair, or its reader's.

A lease id is used once in an incarnation. So a lease that is valid now has been valid since its offer, and all that was read under it
before was read from blocks that were held: asking after the copy is enough.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Literal

from pdlab.real.transfer.blocks import Ids
from pdlab.real.transfer.result import TransferStopped

End = Literal["read", "released", "expired"]
REMEMBERED = 8192  # ended leases, so that a question asked again is answered as before


class Leases:
    """Threads ask it; each answer holds for the moment it is given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, frozenset[int]] = {}
        self._ended: OrderedDict[str, tuple[End, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._open

    def offer(self, lease_id: str, blocks: Ids) -> None:
        with self._lock:
            assert lease_id not in self._open and lease_id not in self._ended, f"lease {lease_id} was used before"
            self._open[lease_id] = frozenset(blocks.tolist())

    def end(self, lease_id: str, how: End) -> bool:
        """False: it had ended before."""
        with self._lock:
            return self._end(lease_id, how, 0) is not None

    def check(self, lease_id: str, blocks: Ids) -> None:
        """Trouble unless these blocks may be read under it, now."""
        with self._lock:
            self._check(lease_id, blocks)

    def finish(self, lease_id: str, blocks: Ids, *, transfer: int, release: bool) -> frozenset[int] | None:
        """What was read is sound, or Trouble. The lease's blocks, if that ended it; None if it goes on or this answer was given before."""
        with self._lock:
            if self._ended.get(lease_id) == ("read", transfer):
                return None
            self._check(lease_id, blocks)
            return self._end(lease_id, "read", transfer) if release else None

    def _check(self, lease_id: str, blocks: Ids) -> None:
        lent = self._open.get(lease_id)
        if lent is None:
            known = lease_id in self._ended
            raise TransferStopped(
                f"lease {lease_id} has ended: {self._ended[lease_id][0]}" if known else f"lease {lease_id} is unknown", "expired"
            )
        if not lent.issuperset(blocks.tolist()):
            raise TransferStopped(f"lease {lease_id} does not cover block {min(set(blocks.tolist()) - lent)}")

    def _end(self, lease_id: str, how: End, transfer: int) -> frozenset[int] | None:
        lent = self._open.pop(lease_id, None)
        if lent is not None:
            self._ended[lease_id] = how, transfer
            while len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
        return lent
