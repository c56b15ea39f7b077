"""What a backend has to do. Keys are `kind/name`, values are bytes; all calls raise `StoreAway` when the store does not answer.

A key is *claimed* with a number that only ever grows for that key (the last one outlives the claim), and is held under a lease that
has to be renewed. So one primitive makes incarnations (`instance/<name>`) and fencing numbers (`leader/<election>`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

from pdlab.core.types import UsageError

INSTANCE, REPORT, LEADER = "instance", "report", "leader"


class StoreAway(Exception):
    """The store did not answer: it is down, unreachable, or too slow."""


class Denied(StoreAway):
    """It answers that this user, or this password, may not: to ask again is of no use."""


class RegistrySilent(UsageError):
    """The registry does not answer: the user's to start, or to wait for."""


class NameHeld(UsageError):
    """Another is registered under the name, or was until a moment ago."""


class Peek(NamedTuple):
    """`held`: somebody has the key; `last`: the highest number it was ever claimed with, 0 for never. `store` is the name that it got
    when it was first used: one without the data that it had gets another."""

    held: bool
    last: int
    store: str = ""


class Claim(NamedTuple):
    """A claimed key. `token` is the backend's own: etcd's lease, the redis server's run."""

    key: str
    number: int
    lease_s: float
    token: str = ""


class Change(NamedTuple):
    """A key was written, or is gone (`value` None). Revisions grow."""

    revision: int
    key: str
    value: bytes | None


class Snapshot(NamedTuple):
    """Everything that is held as of `revision`."""

    revision: int
    entries: dict[str, bytes]


class Store(Protocol):
    where: str  # for messages
    poll_s: float  # how often a watcher calls `check`

    async def peek(self, key: str, settle_s: float) -> Peek:
        """A store that may have lost writes says `held` until it has been seen for `settle_s`: who held the key in the one before may not
        know yet that it is over."""

    async def claim(self, key: str, seen: Peek, number: int, value: bytes, lease_s: float) -> Claim | None:
        """Take a key that nobody holds, in the store and after the last number that were seen; else None."""

    async def renew(self, claim: Claim, value: bytes, retake: bool = False) -> Claim | None:
        """Renew the lease; None when the claim is over. A store that lost its data takes the claim again, with `value`; with `retake` so
        does one whose lease has run out, unless another has claimed the key since."""

    async def put(self, claim: Claim, key: str, value: bytes) -> bool:
        """Write `key`, the claim's own or another (its report), under the claim's lease; False when the claim is over."""

    async def release(self, claim: Claim) -> None:
        """End a claim at once."""

    async def snapshot(self) -> Snapshot: ...

    def changes(self) -> AsyncIterator[Change | None]:
        """Changes in order. None says that they run from here on: after it, and after each reconnection, take a snapshot."""

    async def check(self) -> int:
        """Is the store there, and do its leases end? The newest revision, or 0 where `changes` misses none without saying so."""

    async def close(self) -> None: ...
