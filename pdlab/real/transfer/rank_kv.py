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

import msgspec

from pdlab.real.host.background import Background
from pdlab.real.transfer import descriptor as descriptors
from pdlab.real.transfer.blocks import Layers
from pdlab.real.transfer.descriptor import incompatible
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
from pdlab.real.transfer.result import TransferResult, TransferStopped

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
            case KvPull(call, peer, lease, source, target, layers, deadline_s):
                self._start(
                    call,
                    lambda: self.endpoint.pull(peer, lease, source, target, layers=layers, deadline_s=deadline_s, release=False),
                )
            case KvPush(call, peer, ticket, source, target, layers, deadline_s):
                self._start(call, lambda: self.endpoint.push(peer, ticket, source, target, layers=layers, deadline_s=deadline_s))
            case KvExpect():
                self._start(message.call, lambda: self._expect(message))
            case KvCancel(ticket, reason):
                self.background.loop.call_soon_threadsafe(self.endpoint.cancel, ticket, reason)
            case KvAbort(call):
                if (future := self.under_way.get(call)) is not None:
                    future.cancel()

    async def _expect(self, message: KvExpect) -> TransferResult:
        future = self.endpoint.expect(message.ticket, message.blocks, layers=message.layers, deadline_s=message.deadline_s)
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

    def refusal(self, peer_descriptor: bytes) -> str | None:
        return incompatible(self.descriptor(), peer_descriptor)

    def _peers(self, peer_descriptor: bytes) -> list[bytes]:
        """Those of the peer's ranks, by rank; alone, a peer that does not fit is left to its rank 0, which says why."""
        try:
            peer = descriptors.decode(peer_descriptor)
        except TransferStopped:
            return [peer_descriptor]
        return [msgspec.structs.replace(peer, ranks=()).encode(), *peer.ranks]

    def _mistake(self, peer_descriptor: bytes) -> TransferResult | None:
        why = self.refusal(peer_descriptor)
        return TransferResult("failed", reason=why) if why is not None else None

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

    async def renew_at(self, peer_descriptor: bytes, lease_ids: Sequence[str], *, lease_s: float, deadline_s: float) -> list[str] | None:
        return await super().renew_at(self._peers(peer_descriptor)[0], lease_ids, lease_s=lease_s, deadline_s=deadline_s)

    async def pull(
        self,
        peer_descriptor: bytes,
        lease_id: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        layers: Layers | None = None,
        deadline_s: float,
        release: bool | None = None,
    ) -> TransferResult:
        if (mistake := self._mistake(peer_descriptor)) is not None:
            return mistake
        peers, source, target = self._peers(peer_descriptor), list(src_block_ids), list(dst_block_ids)
        end = self._span(layers)[1] == self._blocks.layers if release is None else release
        pull = super().pull
        if not source:
            return await pull(peers[0], lease_id, source, target, layers=layers, deadline_s=deadline_s, release=end)
        own = pull(peers[0], lease_id, source, target, layers=layers, deadline_s=deadline_s, release=False)
        result = await self._all_move(own, lambda rank, call: KvPull(call, peers[rank], lease_id, source, target, layers, deadline_s))
        if result.status == "done" and end:  # all ranks have read: the lease ends with rank 0's
            last = await pull(peers[0], lease_id, [], [], layers=layers, deadline_s=deadline_s, release=True)
            return result if last.status == "done" else last
        return result

    async def push(
        self,
        peer_descriptor: bytes,
        ticket: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        layers: Layers | None = None,
        deadline_s: float,
    ) -> TransferResult:
        if (mistake := self._mistake(peer_descriptor)) is not None:
            return mistake
        peers, source, target = self._peers(peer_descriptor), list(src_block_ids), list(dst_block_ids)
        own = super().push(peers[0], ticket, source, target, layers=layers, deadline_s=deadline_s)
        return await self._all_move(own, lambda rank, call: KvPush(call, peers[rank], ticket, source, target, layers, deadline_s))

    async def _all_move(self, own: Awaitable[TransferResult], message: Callable[[int, int], KvPull | KvPush]) -> TransferResult:
        """Each rank's part at once; where one fails the others are ended, and when this returns nothing writes any more."""
        loop = asyncio.get_running_loop()
        calls = {rank: next(self._calls) for rank in range(1, len(self.others) + 1)}
        parts: list[asyncio.Future[TransferResult]] = [asyncio.ensure_future(own)]
        for rank, call in calls.items():
            self._moving[call] = part = loop.create_future()
            parts.append(part)
            self.tell(rank, message(rank, call))

        def end() -> None:
            parts[0].cancel()
            for rank, call in calls.items():
                self.tell(rank, KvAbort(call))

        cancelled = False
        pending = set(parts)
        while pending:
            try:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                cancelled = True
                end()
                continue
            if any(part.cancelled() or part.result().status != "done" for part in done) and pending:
                end()
        if cancelled:
            raise asyncio.CancelledError
        return _together([TransferResult("failed", reason="cancelled") if part.cancelled() else part.result() for part in parts])

    def expect(
        self, ticket: str, dst_block_ids: Iterable[int], *, layers: Layers | None = None, deadline_s: float
    ) -> asyncio.Future[TransferResult]:
        loop = asyncio.get_running_loop()
        blocks = list(dst_block_ids)
        parts: list[asyncio.Future[TransferResult]] = []

        def message(call: int) -> KvExpect:
            self._moving[call] = part = loop.create_future()
            parts.append(part)
            return KvExpect(call, ticket, blocks, layers, deadline_s)

        self._all_note(message)
        parts.append(super().expect(ticket, blocks, layers=layers, deadline_s=deadline_s))
        whole: asyncio.Future[TransferResult] = loop.create_future()

        def one_ended(part: asyncio.Future[TransferResult]) -> None:
            if part.result().status != "done":
                self.cancel(ticket, part.result().reason)
            if all(each.done() for each in parts) and not whole.done():
                whole.set_result(_together([each.result() for each in parts]))

        for part in parts:
            part.add_done_callback(one_ended)
        return whole

    def cancel(self, ticket: str, reason: str = "cancelled") -> bool:
        for rank in range(1, len(self.others) + 1):
            self.tell(rank, KvCancel(ticket, reason))
        return super().cancel(ticket, reason)


def _together(parts: Sequence[TransferResult]) -> TransferResult:
    """What became of all; of several mistakes the first that is not of another's making."""
    failed = [part for part in parts if part.status != "done"]
    if failed:
        return next((part for part in failed if "cancelled" not in part.reason), failed[0])
    ways = {part.transport for part in parts if part.transport}
    return TransferResult("done", sum(part.bytes for part in parts), max(part.seconds for part in parts), "", ", ".join(sorted(ways)))
