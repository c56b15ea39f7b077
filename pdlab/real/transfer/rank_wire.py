"""What rank 0 of an instance tells the others about KV, and what they answer. Knows no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from pdlab.real.transfer.result import TransferResult

Layers = tuple[int, int]


class KvOffer(msgspec.Struct, frozen=True, tag=True):
    """Lease these blocks. Answered by `KvNoted`."""

    call: int
    lease: str
    blocks: list[int]


class KvRelease(msgspec.Struct, frozen=True, tag=True):
    lease: str
    how: Literal["read", "released", "expired"]


class KvPull(msgspec.Struct, frozen=True, tag=True):
    """Read one's heads of a peer's blocks; its lease goes on. Answered by `KvMoved`."""

    call: int
    descriptor: bytes
    lease: str
    source: list[int]
    target: list[int]
    tokens: tuple[int, int] | None  # from, and to before which
    layers: Layers | None
    deadline_s: float


class KvPush(msgspec.Struct, frozen=True, tag=True):
    """Write to what a peer's ranks expect. Answered by `KvMoved`."""

    call: int
    descriptor: bytes
    ticket: str
    source: list[int]
    target: list[int]
    tokens: tuple[int, int] | None  # from, and to before which
    layers: Layers | None
    deadline_s: float


class KvExpect(msgspec.Struct, frozen=True, tag=True):
    """Let a peer's ranks push. Answered by `KvNoted`, and by `KvMoved` in the end."""

    call: int
    ticket: str
    blocks: list[int]
    tokens: int | None
    layers: Layers | None
    deadline_s: float


class KvCancel(msgspec.Struct, frozen=True, tag=True):
    """End a ticket."""

    ticket: str
    reason: str


class KvAbort(msgspec.Struct, frozen=True, tag=True):
    """End a pull or push; it is answered when nothing of it writes any more."""

    call: int


class KvNoted(msgspec.Struct, frozen=True, tag=True):
    call: int


class KvMoved(msgspec.Struct, frozen=True, tag=True):
    call: int
    result: TransferResult


ToRankKv = KvOffer | KvRelease | KvPull | KvPush | KvExpect | KvCancel | KvAbort
FromRankKv = KvNoted | KvMoved
