"""KV that is computed elsewhere, on its way here: reservations, reads, and what others push.

All books are the engine thread's. What the endpoint has to say comes back through `post`, to be called between two steps. Blocks are not
given back while anything may still write them: a read or push under way is called off first, and they are freed when it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pdlab.real.engine.engine import Engine
from pdlab.real.engine.handover import Handover, ReservedBlocks
from pdlab.real.engine.messages import Cancel, Full, Landed, Missed, Proceed, Receive, Reserved, Source, Staged, Tokens
from pdlab.real.host.background import Background
from pdlab.real.instance.kv_news import KvNews
from pdlab.real.instance.pushes import Post
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.result import TransferResult

log = logging.getLogger(__name__)
RENEWALS = 6  # a lease is renewed that often in its time while it is read
READ_S = 1.0  # for the word that all was read to arrive here


@dataclass(slots=True, eq=False)
class Inbound:
    """A request whose KV is on its way. That of its first `copied` tokens is here, in full blocks. `last`: nothing more will be made
    elsewhere."""

    id: int
    place: ReservedBlocks
    due_s: float
    deadline_s: float  # that long before
    last: bool
    pushed: bool
    copied: int = 0
    complete: bool = False
    landing: bool = False
    ended: bool = False  # called off; its blocks are freed when nothing writes there
    prefix: bool = False  # of its prompt alone: the rest is computed
    computes: bool = False  # nothing comes, and all of it is
    came_s: float = field(default_factory=time.monotonic)  # when the last of its bytes did
    bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    work: Future[None] | None = None
    ticket: str = ""
    reason: str = ""


class KvReceiving:
    """`inbound` are the requests whose KV is not here yet; `failed` of all were called off."""

    def __init__(
        self, engine: Engine, exchange: Handover, endpoint: KvEndpoint, background: Background, post: Post, news: KvNews, *, lease_s: float
    ) -> None:
        self.engine, self.exchange, self.endpoint, self.news, self.lease_s = engine, exchange, endpoint, news, lease_s
        self.background, self.post = background, post
        self.inbound: dict[int, Inbound] = {}
        self.received_bytes = self.failed = 0

    def receive(self, message: Receive, now: float) -> None:
        submit = message.submit
        if reason := self.engine.impossible(submit):
            self.news.refuse(submit, reason)
            return
        if message.source is not None and not message.source.descriptor:
            self.exchange.begin(submit, message.made, now)
            self.news.told.append(Landed(submit.id, 0, 0.0, "", len(message.made)))
            return
        due_s = time.monotonic() + message.deadline_s
        place = self.exchange.receive(submit, list(message.made), now, due_s)
        if place is None and message.prefix:
            self.exchange.begin(submit, [], now)
            return
        if place is None:
            self.news.told.append(Full(submit.id, "no KV blocks are free, or max_seqs sequences run"))
            return
        pushed = message.source is None
        inbound = Inbound(submit.id, place, due_s, message.deadline_s, message.last, pushed, prefix=message.prefix)
        inbound.copied = place.cached_tokens
        self.inbound[submit.id] = inbound
        if message.source is not None:
            self.news.told.append(Reserved(submit.id, "", place.blocks, place.cached_tokens))
            self._read(inbound, message.source)
        else:
            self._expect(inbound)

    def proceed(self, message: Proceed) -> None:
        inbound = self.inbound.get(message.id)
        if inbound is None or inbound.ended or inbound.landing:
            return  # it ended meanwhile, and whoever waits was told
        place = self.exchange.proceed(message.id, list(message.made))
        if place is None:
            self._call_off(inbound, "no room for what was made meanwhile", full=True)
            return
        inbound.place, inbound.last = place, message.last
        if message.source is not None:
            if inbound.pushed:
                self._endpoint_soon(lambda: self.endpoint.cancel(inbound.ticket, "it is read instead"))
            inbound.pushed, inbound.complete = False, False
            self._read(inbound, message.source)
        else:
            self._maybe_land(inbound)

    def _endpoint_soon(self, call: Callable[[], object]) -> None:
        self.background.loop.call_soon_threadsafe(call)

    def _read(self, inbound: Inbound, source: Source) -> None:
        """Its tokens beyond those copied; whatever was read before of a block that was not full is read again."""
        tokens = min(inbound.place.kv_tokens, source.kv_tokens)
        wanted, into = range(min(inbound.copied, tokens), tokens), inbound.place.blocks

        async def pull() -> TransferResult:
            left_s = max(0.01, inbound.due_s - time.monotonic())
            try:
                async with asyncio.timeout(None) as while_leased:
                    renewing = asyncio.create_task(self._renewing(source, while_leased))
                    try:
                        return await self.endpoint.pull(
                            source.descriptor, source.lease, source.blocks, into, tokens=wanted, deadline_s=left_s, release=True
                        )
                    finally:
                        renewing.cancel()
            except TimeoutError:
                return TransferResult("expired", reason=f"lease {source.lease} has ended at its source")

        def done(result: TransferResult | BaseException) -> None:
            inbound.came_s = time.monotonic()
            self.post(lambda: self._was_read(inbound, result, tokens))

        inbound.work = self.background.start(pull, done)

    async def _renewing(self, source: Source, while_leased: asyncio.Timeout) -> None:
        """Until the source says that the lease has ended: then the read ends, too, unless it was the read that ended it."""
        period_s, leases = self.lease_s / RENEWALS, [source.lease]
        known: list[str] | None = leases
        while known is None or known:
            await asyncio.sleep(period_s)
            known = await self.endpoint.renew_at(source.descriptor, leases, lease_s=self.lease_s, deadline_s=period_s)
        await asyncio.sleep(READ_S)
        while_leased.reschedule(asyncio.get_running_loop().time())

    def _was_read(self, inbound: Inbound, result: TransferResult | BaseException, tokens: int) -> None:
        inbound.work = None
        if inbound.ended:
            self._forget(inbound)
        elif isinstance(result, TransferResult) and result.status == "done":
            inbound.copied = max(inbound.copied, tokens - tokens % self.engine.runner.block_tokens)
            self._came(inbound, result)
            if inbound.prefix:
                self._land_prefix(inbound, tokens)
                return
            missing = inbound.place.kv_tokens - tokens - (0 if self.engine.groups[inbound.id][0].row.made else 1)
            if inbound.last and missing > 0:
                self._call_off(inbound, f"the KV of {missing} tokens is not there", "incomplete")
            elif not inbound.last:
                self.news.told.append(Staged(inbound.id))
            else:
                inbound.complete = True
                self._maybe_land(inbound)
        else:
            self._failed(inbound, result)

    def _came(self, inbound: Inbound, result: TransferResult) -> None:
        inbound.bytes += result.bytes
        inbound.seconds += result.seconds
        inbound.transport = result.transport or inbound.transport
        self.received_bytes += result.bytes

    def _expect(self, inbound: Inbound) -> None:
        """Let a peer push."""
        inbound.ticket = self.news.name()
        tokens = inbound.place.kv_tokens - inbound.copied
        blocks = inbound.place.blocks[inbound.copied // self.engine.runner.block_tokens :]

        async def expect() -> TransferResult:
            try:
                left_s = max(0.01, inbound.due_s - time.monotonic())
                future = self.endpoint.expect(inbound.ticket, blocks, tokens=tokens, deadline_s=left_s)
            finally:
                self.post(lambda: self._expected(inbound))
            return await asyncio.shield(future)

        def done(result: TransferResult | BaseException) -> None:
            inbound.came_s = time.monotonic()
            self.post(lambda: self._was_pushed(inbound, result))

        inbound.work = self.background.start(expect, done)

    def _expected(self, inbound: Inbound) -> None:
        if not inbound.ended:
            place = inbound.place
            self.news.told.append(Reserved(inbound.id, inbound.ticket, place.blocks, place.cached_tokens))

    def _was_pushed(self, inbound: Inbound, result: TransferResult | BaseException) -> None:
        if inbound.pushed:
            inbound.work = None
        if inbound.ended:
            if inbound.work is None:
                self._forget(inbound)
        elif not inbound.pushed:
            return  # it is read instead
        elif isinstance(result, TransferResult) and result.status == "done":
            self._came(inbound, result)
            inbound.complete = True
            self._maybe_land(inbound)
        else:
            self._failed(inbound, result)

    def _maybe_land(self, inbound: Inbound) -> None:
        if not (inbound.last and inbound.complete):
            return
        inbound.landing = True
        del self.inbound[inbound.id]
        made = self.exchange.arrived(inbound.id)
        waited_s = time.monotonic() - inbound.came_s
        self.news.told.append(Landed(inbound.id, inbound.bytes, inbound.seconds, inbound.transport, made, waited_s))

    def _land_prefix(self, inbound: Inbound, tokens: int) -> None:
        del self.inbound[inbound.id]
        tokens = max(tokens, inbound.place.cached_tokens)
        self.exchange.arrived(inbound.id, tokens)
        self.news.told.append(Landed(inbound.id, inbound.bytes, inbound.seconds, inbound.transport, 0, prefix_tokens=tokens))

    def overdue(self, inbound: Inbound) -> None:
        """Not all of it has come in time."""
        if not inbound.ended:
            self._call_off(inbound, f"not all KV was here after {inbound.deadline_s:g} s", "deadline")

    def _failed(self, inbound: Inbound, result: TransferResult | BaseException) -> None:
        if time.monotonic() >= inbound.due_s:
            self.overdue(inbound)  # the endpoint has the same deadline, and may be the first to say so
        elif isinstance(result, TransferResult):
            self._call_off(inbound, result.reason, "expired" if result.status == "expired" else "failed")
        else:
            self._call_off(inbound, f"{type(result).__name__}: {result}")

    def _call_off(self, inbound: Inbound, reason: str, cause: str = "failed", *, full: bool = False) -> None:
        """It will not come; whoever waits is told at once, or it is computed."""
        self.failed += not full
        if inbound.prefix:
            log.info("the prefix of a prompt is computed: %s", reason)
            self.news.told.append(Missed(inbound.id, cause))
            inbound.computes = True
            self._drop(inbound)
            return
        if full:
            self.news.told.append(Full(inbound.id, reason))
        else:
            self.news.told.append(Missed(inbound.id, cause))
            for index in self.engine.groups[inbound.id]:
                self.news.outputs.append(Tokens(inbound.id, index, 0, [], "error", error=reason))
        self._drop(inbound)

    def _drop(self, inbound: Inbound) -> None:
        inbound.ended = True
        if inbound.work is None:
            self._forget(inbound)
        elif inbound.pushed:
            self._endpoint_soon(lambda: self.endpoint.cancel(inbound.ticket))
        else:
            inbound.work.cancel()

    def _forget(self, inbound: Inbound) -> None:
        self.inbound.pop(inbound.id, None)
        if inbound.computes:
            self.exchange.compute(inbound.id)
        else:
            self.exchange.failed(inbound.id)

    def cancel(self, message: Cancel) -> bool:
        """True: it was this side's affair."""
        inbound = self.inbound.get(message.id)
        if inbound is None:
            return False
        if not inbound.ended or inbound.computes:
            for index in self.engine.groups[message.id]:
                self.news.outputs.append(Tokens(message.id, index, 0, [], "abort"))
            inbound.computes = False
            if not inbound.ended:
                self._drop(inbound)
        return True
