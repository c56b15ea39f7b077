"""KV exchange of an instance of several ranks: each has an endpoint of its own over its own heads, and rank 0 speaks for all.

A lease holds at every rank until it ends at rank 0's, which a reader's rank 0 asks for when all of its ranks have read. A ticket has served
when all ranks' parts have come. What a rank is told, it does at once, beside the pass that it computes.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from pdlab.real.host.background import Background
from pdlab.real.transfer.blocks import Layers
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.leases import End
from pdlab.real.transfer.rank_wire import (
    FromRankKv,
    KvAbort,
    KvCancel,
    KvExpect,
    KvMoved,
    KvNoted,
    KvOffer,
    KvPull,
    KvPush,
    KvRelease,
    ToRankKv,
)
from pdlab.real.transfer.result import TransferResult
from pdlab.real.transfer.together import all_of, together

ANSWER_S = 30.0  # for a rank to note a lease or a ticket: it does so beside its pass


class RankKv:
    """A rank's own side: does with its endpoint what rank 0 tells. `answer` may be called from any thread."""

    def __init__(self, endpoint: KvEndpoint, background: Background, answer: Callable[[FromRankKv], None]) -> None:
        self.endpoint, self.background, self.answer = endpoint, background, answer
        self.under_way: dict[int, Future[None]] = {}

    def take(self, message: ToRankKv) -> None:
        """From one thread at a time."""
        match message:
            case KvOffer(call, lease, blocks):
                self.endpoint.offer(lease, blocks)
                self.answer(KvNoted(call))
            case KvRelease(lease, how):
                self.endpoint.release(lease, how)
            case KvPull(call, peer, lease, source, target, tokens, layers, deadline_s):
                of, end = _range(tokens), dict[str, Any](layers=layers, deadline_s=deadline_s)
                self._start(call, lambda: self.endpoint.pull(peer, lease, source, target, tokens=of, release=False, **end))
            case KvPush(call, peer, ticket, source, target, tokens, layers, deadline_s):
                of, end = _range(tokens), dict[str, Any](layers=layers, deadline_s=deadline_s)
                self._start(call, lambda: self.endpoint.push(peer, ticket, source, target, tokens=of, **end))
            case KvExpect():
                self._start(message.call, lambda: self._expect(message))
            case KvCancel(ticket, reason):
                self.background.loop.call_soon_threadsafe(self.endpoint.cancel, ticket, reason)
            case KvAbort(call):
                if (future := self.under_way.get(call)) is not None:
                    future.cancel()

    async def _expect(self, message: KvExpect) -> TransferResult:
        end: dict[str, Any] = {"layers": message.layers, "deadline_s": message.deadline_s}
        future = self.endpoint.expect(message.ticket, message.blocks, tokens=message.tokens, **end)
        self.answer(KvNoted(message.call))
        return await asyncio.shield(future)

    def _start(self, call: int, work: Callable[[], Awaitable[TransferResult]]) -> None:
        def done(result: TransferResult | BaseException) -> None:
            self.under_way.pop(call, None)
            self.answer(KvMoved(call, _as_result(result)))

        self.under_way[call] = self.background.start(work, done)


def _as_result(result: TransferResult | BaseException) -> TransferResult:
    if isinstance(result, TransferResult):
        return result
    return TransferResult("failed", reason=str(result) or type(result).__name__)


class RankedEndpoint(KvEndpoint):
    """Rank 0's endpoint, which speaks for all: as a KvEndpoint, to its callers and to peers."""

    tell: Callable[[int, ToRankKv], None]
    others: Sequence[bytes]

    def lead(self, others: Sequence[bytes], tell: Callable[[int, ToRankKv], None]) -> None:
        """Before it is started. `others` are the descriptors of the ranks from 1 on; `tell(rank, message)` reaches one from any thread, and
        what it answers comes by `came`, from any thread."""
        self.others, self.tell = others, tell
        self._calls = itertools.count(1)
        self._noted: dict[int, threading.Event] = {}
        self._moving: dict[int, asyncio.Future[TransferResult]] = {}
        if (read := self._lease_read) is not None:

            def lease_read(lease: str, blocks: list[int]) -> None:
                self._release_others(lease, "read")
                read(lease, blocks)

            self._lease_read = lease_read

    def came(self, message: KvNoted | KvMoved) -> None:
        """A rank's answer."""
        if isinstance(message, KvNoted):
            if (event := self._noted.get(message.call)) is not None:
                event.set()
        else:
            self._from_thread(self._moved, message)

    def _moved(self, message: KvMoved) -> None:
        if (future := self._moving.pop(message.call, None)) is not None and not future.done():
            future.set_result(message.result)

    # ------------------------------------------------------------ what it is to peers

    def descriptor(self) -> bytes:
        return msgspec.structs.replace(self._own.descriptor, ranks=tuple(self.others)).encode()

    # ------------------------------------------------------------ leases

    def offer(self, lease_id: str, block_ids: Iterable[int]) -> None:
        blocks = list(block_ids)
        self._all_note(lambda call: KvOffer(call, lease_id, blocks))
        super().offer(lease_id, blocks)

    def release(self, lease_id: str, how: End = "released") -> bool:
        ended = super().release(lease_id, how)
        if ended:
            self._release_others(lease_id, how)
        return ended

    def _release_others(self, lease_id: str, how: End) -> None:
        for rank in range(1, len(self.others) + 1):
            self.tell(rank, KvRelease(lease_id, how))

    def _all_note(self, message: Callable[[int], KvOffer | KvExpect]) -> dict[int, int]:
        """Tell each, and wait until each has heard. The calls, by rank."""
        calls = {rank: next(self._calls) for rank in range(1, len(self.others) + 1)}
        for call in calls.values():
            self._noted[call] = threading.Event()
        for rank, call in calls.items():
            self.tell(rank, message(call))
        for call in calls.values():
            self._noted[call].wait(ANSWER_S)
            del self._noted[call]
        return calls

    # ------------------------------------------------------------ transfers

    async def pull(
        self,
        peer_descriptor: bytes,
        lease_id: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        tokens: range | None = None,
        layers: Layers | None = None,
        deadline_s: float,
        release: bool | None = None,
    ) -> TransferResult:
        peer, source, target = peer_descriptor, list(src_block_ids), list(dst_block_ids)
        end = self._span(layers)[1] == self._blocks.layers if release is None else release
        pull = partial(super().pull, peer, lease_id, layers=layers, deadline_s=deadline_s)
        if not (source if tokens is None else tokens):
            return await pull([], [], release=end)
        bounds = None if tokens is None else (tokens.start, tokens.stop)
        result = await self._all_move(
            pull(source, target, tokens=tokens, release=False),
            lambda call: KvPull(call, peer, lease_id, source, target, bounds, layers, deadline_s),
        )
        if result.status == "done" and end:  # all ranks have read: the lease ends with rank 0's
            last = await pull([], [], release=True)
            return result if last.status == "done" else last
        return result

    async def push(
        self,
        peer_descriptor: bytes,
        ticket: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        tokens: range | None = None,
        layers: Layers | None = None,
        deadline_s: float,
    ) -> TransferResult:
        peer, source, target = peer_descriptor, list(src_block_ids), list(dst_block_ids)
        bounds = None if tokens is None else (tokens.start, tokens.stop)
        own = super().push(peer, ticket, source, target, tokens=tokens, layers=layers, deadline_s=deadline_s)
        return await self._all_move(own, lambda call: KvPush(call, peer, ticket, source, target, bounds, layers, deadline_s))

    async def _all_move(self, own: Awaitable[TransferResult], message: Callable[[int], KvPull | KvPush]) -> TransferResult:
        """Each rank's part at once."""
        loop = asyncio.get_running_loop()
        calls = {rank: next(self._calls) for rank in range(1, len(self.others) + 1)}
        parts: list[Awaitable[TransferResult]] = [own]
        for rank, call in calls.items():
            self._moving[call] = part = loop.create_future()
            parts.append(part)
            self.tell(rank, message(call))

        def end() -> None:
            for rank, call in calls.items():
                self.tell(rank, KvAbort(call))

        return await all_of(parts, end)

    def expect(
        self, ticket: str, dst_block_ids: Iterable[int], *, tokens: int | None = None, layers: Layers | None = None, deadline_s: float
    ) -> asyncio.Future[TransferResult]:
        loop = asyncio.get_running_loop()
        blocks = list(dst_block_ids)
        parts: list[asyncio.Future[TransferResult]] = []

        def message(call: int) -> KvExpect:
            self._moving[call] = part = loop.create_future()
            parts.append(part)
            return KvExpect(call, ticket, blocks, tokens, layers, deadline_s)

        self._all_note(message)
        parts.append(super().expect(ticket, blocks, tokens=tokens, layers=layers, deadline_s=deadline_s))
        whole: asyncio.Future[TransferResult] = loop.create_future()

        def one_ended(part: asyncio.Future[TransferResult]) -> None:
            if part.result().status != "done":
                self.cancel(ticket, part.result().reason)
            if all(each.done() for each in parts) and not whole.done():
                whole.set_result(together([each.result() for each in parts]))

        for part in parts:
            part.add_done_callback(one_ended)
        return whole

    def cancel(self, ticket: str, reason: str = "cancelled") -> bool:
        for rank in range(1, len(self.others) + 1):
            self.tell(rank, KvCancel(ticket, reason))
        return super().cancel(ticket, reason)


def _range(bounds: tuple[int, int] | None) -> range | None:
    return None if bounds is None else range(*bounds)
