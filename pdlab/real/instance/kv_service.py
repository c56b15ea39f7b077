"""The engine's side of KV exchange: leases and exports for those who read here, reservations and reads of what is computed elsewhere.

All books are the engine thread's. The endpoint works in a loop beside it, and what it has to say comes back through `post`, to be called
between two steps. Blocks are not given back while anything may still read or write them: a read or push under way is called off first, and
they are freed when it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf

import msgspec

from pdlab.real.engine.engine import Engine
from pdlab.real.engine.handover import Handover, Lease, ReservedBlocks
from pdlab.real.engine.messages import (
    AskLease,
    Cancel,
    Export,
    Exported,
    Full,
    Held,
    Holds,
    Landed,
    Missed,
    News,
    Proceed,
    Receive,
    Release,
    RenewLease,
    Reserved,
    Resume,
    Source,
    Staged,
    Submit,
    Tokens,
)
from pdlab.real.host.background import Background
from pdlab.real.instance.pushes import Pushes
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.result import TransferResult

Post = Callable[[Callable[[], None]], None]
RENEWALS = 6  # a lease is renewed that often in its time while it is read
READ_S = 1.0  # for the word that all was read to arrive here


@dataclass(slots=True, eq=False)
class Inbound:
    """A request whose KV is on its way. `copied` blocks of it are here. `last`: nothing more will be made elsewhere."""

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
    came_s: float = field(default_factory=time.monotonic)  # when the last of its bytes did
    bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    work: Future[None] | None = None
    ticket: str = ""
    reason: str = ""


class Peers:
    """`post` calls a function on the engine's thread, between two steps. `told` are news for the other process, `outputs` tokens."""

    def __init__(self, engine: Engine, endpoint: KvEndpoint, background: Background, post: Post, *, engine_id: str, lease_s: float) -> None:
        self.engine, self.exchange = engine, Handover(engine)
        self.endpoint, self.background, self.post = endpoint, background, post
        self.engine_id, self.lease_s = engine_id, lease_s
        self.inbound: dict[int, Inbound] = {}
        self.lent: dict[str, int] = {}  # leases of ours, of requests whose KV is held, or that run while it is copied
        self.leases: dict[int, str] = {}  # the same the other way
        self.told: list[News | Exported | Holds] = []
        self.outputs: list[Tokens] = []
        self.received_bytes = self.failed = self.expired = 0
        self.pushes = Pushes(engine, endpoint, background, post, self.pushed)
        engine.pusher = self.pushes
        self._names = 0

    def take(self, message: Receive | Resume | Proceed | Release | RenewLease | AskLease | Export, now: float) -> None:
        match message:
            case Receive():
                self.receive(message, now)
            case Resume():
                self.resume(message, now)
            case Proceed():
                self.proceed(message)
            case Release():
                self.release(message)
            case RenewLease():
                self.renewed([message.lease], message.lease_s)
            case AskLease(call, lease):
                self.told.append(Holds(call, self.endpoint.holds(lease)))
            case Export():
                self.told.append(self._export(message))

    # ------------------------------------------------------------ what is computed here

    def submitted(self, submit: Submit) -> None:
        if submit.push is not None and submit.id in self.engine.groups:
            self.pushes.add(submit)

    def looked_at(self, outputs: list[Tokens]) -> None:
        """A pass has made these: lease what is held now, and end the leases on what has ended."""
        self.pushes.ended(outputs)
        for output in outputs:
            if output.finish == "held":
                self._held(output)
            elif output.finish is not None:
                self._recall(output.id)

    def _held(self, output: Tokens) -> None:
        id = output.id
        if not self.pushes.finish(id):
            kv = self.exchange.lease(id)
            lease = self._lend(kv)
            self.exchange.renew(id, time.monotonic() + self.lease_s)
            self.told.append(Held(id, lease, kv.blocks, kv.kv_tokens))

    def _lend(self, kv: Lease) -> str:
        """Let others read it, in place of what they might before."""
        self._recall(kv.id)
        lease = self._lease_name()
        self.lent[lease], self.leases[kv.id] = kv.id, lease
        self.endpoint.offer(lease, kv.blocks)
        return lease

    def _recall(self, id: int) -> None:
        lease = self.leases.pop(id, None)
        if lease is not None:
            del self.lent[lease]
            self.endpoint.release(lease)

    def pushed(self, id: int) -> None:
        """All of a prompt's KV was written, or cannot be: nobody needs it here any more."""
        self.exchange.release(id)

    def lease_read(self, lease: str, blocks: list[int]) -> None:
        """The endpoint says so, in its own thread."""
        self.post(lambda: self._ended(lease, read=True))

    def leases_renewed(self, leases: list[str], lease_s: float) -> None:
        """Likewise."""
        self.post(lambda: self.renewed(leases, lease_s))

    def renewed(self, leases: list[str], lease_s: float) -> None:
        for lease in leases:
            if lease in self.lent:
                self.exchange.renew(self.lent[lease], time.monotonic() + lease_s)

    def deadlines(self) -> None:
        """Those that have come: of leases that nobody has renewed, and of KV that is not here yet."""
        worker = self.engine.worker
        for seq in worker.overdue(time.monotonic()):
            worker.renew(seq, inf)  # it ends now, or when whoever writes or reads there has ended
            id = seq.request_id
            if (inbound := self.inbound.get(id)) is not None:
                self._late(inbound)
            elif (lease := self.leases.get(id)) is not None and self.endpoint.release(lease, "expired"):
                self.expired += not seq.decodes_here
                self._ended(lease, read=False)

    def _ended(self, lease: str, *, read: bool) -> None:
        id = self.lent.pop(lease, None)
        if id is None:
            return
        del self.leases[id]
        c = self.exchange.sole(id)
        if c is None or not self.engine.holds(id):
            return  # it runs
        if c.seq.decodes_here and not read:
            self.exchange.resume(id)
            return
        if c.seq.decodes_here:
            self.outputs.append(Tokens(id, 0, c.row.made, [], "moved"))
        self.exchange.release(id)

    def release(self, message: Release) -> None:
        if self.endpoint.release(message.lease):
            self._ended(message.lease, read=False)

    def _export(self, message: Export) -> Exported:
        id, call = message.id, message.call
        if message.resume:
            if not self.engine.holds(id) or self.endpoint.release(self.leases[id]):
                self._recall(id)
                self.exchange.resume(id)
            return Exported(call, "" if id in self.engine.groups else "it does not run here")
        kv = self.exchange.stop(id, time.monotonic(), message.lease_s) if message.stop else self.exchange.snapshot(id)
        if isinstance(kv, str):
            return Exported(call, kv)
        return Exported(call, "", self._lend(kv), kv.blocks, kv.kv_tokens, kv.tokens[len(kv.tokens) - kv.made :])

    def resume(self, message: Resume, now: float) -> None:
        id, submit = self.lent.get(message.lease, -1), message.submit
        if reason := self.engine.unreadable(submit):
            self._refuse(submit, reason)
            return
        c = self.exchange.sole(id)
        if c is None or c.held is None or not self.endpoint.release(message.lease):
            self._refuse(submit, f"lease {message.lease} has ended")
            return
        del self.lent[message.lease], self.leases[id]
        first = c.held
        if submit.sampling.max_tokens == 1:
            self.exchange.release(id)
            if not message.made:
                self.outputs.append(msgspec.structs.replace(first, id=submit.id, finish="length"))
            return
        self.exchange.resume_as(id, submit, now)
        self.told.append(Landed(submit.id, 0, 0.0, "", len(message.made)))
        if not message.made:
            self.outputs.append(msgspec.structs.replace(first, id=submit.id, finish=None))

    # ------------------------------------------------------------ what is computed elsewhere

    def receive(self, message: Receive, now: float) -> None:
        submit = message.submit
        if reason := self.engine.impossible(submit):
            self._refuse(submit, reason)
            return
        if message.source is not None and not message.source.descriptor:
            self.exchange.begin(submit, message.made, now)
            self.told.append(Landed(submit.id, 0, 0.0, "", len(message.made)))
            return
        due_s = time.monotonic() + message.deadline_s
        place = self.exchange.receive(submit, list(message.made), now, due_s)
        if place is None:
            self.told.append(Full(submit.id, "no KV blocks are free, or max_seqs sequences run"))
            return
        pushed = message.source is None
        inbound = Inbound(submit.id, place, due_s, message.deadline_s, message.last, pushed)
        inbound.copied = place.cached_tokens // self.engine.runner.block_tokens
        self.inbound[submit.id] = inbound
        if message.source is not None:
            self.told.append(Reserved(submit.id, "", place.blocks, place.cached_tokens))
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
                self.endpoint_soon(lambda: self.endpoint.cancel(inbound.ticket, "it is read instead"))
            inbound.pushed, inbound.complete = False, False
            self._read(inbound, message.source)
        else:
            self._maybe_land(inbound)

    def endpoint_soon(self, call: Callable[[], object]) -> None:
        self.background.loop.call_soon_threadsafe(call)

    def _read(self, inbound: Inbound, source: Source) -> None:
        """Its blocks beyond those copied; whatever was read before of a block that was not full is read again."""
        block = self.engine.runner.block_tokens
        tokens = min(inbound.place.kv_tokens, source.kv_tokens)
        count = min(-(-tokens // block), len(source.blocks), len(inbound.place.blocks))
        first = min(inbound.copied, count)
        wanted, into = source.blocks[first:count], inbound.place.blocks[first:count]

        async def pull() -> TransferResult:
            left_s = max(0.01, inbound.due_s - time.monotonic())
            try:
                async with asyncio.timeout(None) as while_leased:
                    renewing = asyncio.create_task(self._renewing(source, while_leased))
                    try:
                        return await self.endpoint.pull(source.descriptor, source.lease, wanted, into, deadline_s=left_s, release=True)
                    finally:
                        renewing.cancel()
            except TimeoutError:
                return TransferResult("expired", reason=f"lease {source.lease} has ended at its source")

        def done(result: TransferResult | BaseException) -> None:
            inbound.came_s = time.monotonic()
            self.post(lambda: self._was_read(inbound, result, tokens // block, tokens))

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

    def _was_read(self, inbound: Inbound, result: TransferResult | BaseException, full_blocks: int, tokens: int) -> None:
        inbound.work = None
        if inbound.ended:
            self._forget(inbound)
        elif isinstance(result, TransferResult) and result.status == "done":
            inbound.copied = max(inbound.copied, full_blocks)
            self._came(inbound, result)
            missing = inbound.place.kv_tokens - tokens - (0 if self.engine.groups[inbound.id][0].row.made else 1)
            if inbound.last and missing > 0:
                self._call_off(inbound, f"the KV of {missing} tokens is not there", "incomplete")
            elif not inbound.last:
                self.told.append(Staged(inbound.id))
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
        inbound.ticket = self._lease_name()
        blocks = inbound.place.blocks[inbound.copied :]

        async def expect() -> TransferResult:
            try:
                future = self.endpoint.expect(inbound.ticket, blocks, deadline_s=max(0.01, inbound.due_s - time.monotonic()))
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
            self.told.append(Reserved(inbound.id, inbound.ticket, place.blocks, place.cached_tokens))

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
        self.told.append(Landed(inbound.id, inbound.bytes, inbound.seconds, inbound.transport, made, waited_s))

    def _late(self, inbound: Inbound) -> None:
        if not inbound.ended:
            self._call_off(inbound, f"not all KV was here after {inbound.deadline_s:g} s", "deadline")

    def _failed(self, inbound: Inbound, result: TransferResult | BaseException) -> None:
        if isinstance(result, TransferResult):
            self._call_off(inbound, result.reason, "expired" if result.status == "expired" else "failed")
        else:
            self._call_off(inbound, f"{type(result).__name__}: {result}")

    def _call_off(self, inbound: Inbound, reason: str, cause: str = "failed", *, full: bool = False) -> None:
        """It will not come; whoever waits is told at once."""
        self.failed += not full
        if full:
            self.told.append(Full(inbound.id, reason))
        else:
            self.told.append(Missed(inbound.id, cause))
            for index in self.engine.groups[inbound.id]:
                self.outputs.append(Tokens(inbound.id, index, 0, [], "error", error=reason))
        self._drop(inbound)

    def _drop(self, inbound: Inbound) -> None:
        inbound.ended = True
        if inbound.work is None:
            self._forget(inbound)
        elif inbound.pushed:
            self.endpoint_soon(lambda: self.endpoint.cancel(inbound.ticket))
        else:
            inbound.work.cancel()

    def _forget(self, inbound: Inbound) -> None:
        self.inbound.pop(inbound.id, None)
        self.exchange.failed(inbound.id)

    # ------------------------------------------------------------ both

    def cancel(self, message: Cancel) -> bool:
        """True: it was this side's affair."""
        id = message.id
        if (inbound := self.inbound.get(id)) is not None:
            if not inbound.ended:
                for index in self.engine.groups[id]:
                    self.outputs.append(Tokens(id, index, 0, [], "abort"))
                self._drop(inbound)
            return True
        if id in self.pushes:
            self.pushes.stop(id)
            return True
        self._recall(id)
        if not self.engine.holds(id):
            return False
        c = self.exchange.sole(id)
        assert c is not None, "what is held has one candidate"
        if c.seq.decodes_here:  # else it was computed while the word was on its way
            self.outputs.append(Tokens(id, 0, c.row.made, [], "abort"))
        self.exchange.release(id)
        return True

    def _refuse(self, submit: Submit, reason: str) -> None:
        self.outputs += [Tokens(submit.id, index, 0, [], "error", error=reason) for index in range(max(1, submit.sampling.best_of))]

    def _lease_name(self) -> str:
        self._names += 1
        return f"{self.engine_id}/{self._names}"
