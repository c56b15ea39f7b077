"""KV that was computed here, for those who read it or are written to: leases, exports, pushes.

All books are the engine thread's (`kv_service`).
"""

from __future__ import annotations

import time

import msgspec

from pdlab.core.sequence import Sequence
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.handover import Handover, Lease
from pdlab.real.engine.messages import Cancel, Export, Exported, Held, Landed, Lend, Release, Resume, Submit, Tokens
from pdlab.real.host.background import Background
from pdlab.real.instance.kv_news import KvNews
from pdlab.real.instance.pushes import Post, Pushes
from pdlab.real.transfer.endpoint import KvEndpoint


class KvLending:
    """`lent` are leases of ours, by name, of requests whose KV is held, or that run while it is copied; `leases` the same the other way.
    `expired` were not read in time."""

    def __init__(
        self, engine: Engine, exchange: Handover, endpoint: KvEndpoint, background: Background, post: Post, news: KvNews, *, lease_s: float
    ) -> None:
        self.engine, self.exchange, self.endpoint, self.news, self.lease_s = engine, exchange, endpoint, news, lease_s
        self.lent: dict[str, int] = {}
        self.leases: dict[int, str] = {}
        self.prefixes: dict[str, Sequence] = {}  # leases of cached prefixes, which are nobody's request
        self.expired = 0
        self.pushes = Pushes(engine, endpoint, background, post, exchange.release)  # then nobody needs it here any more
        engine.pusher = self.pushes

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
            self.news.told.append(Held(id, lease, kv.blocks, kv.kv_tokens))

    def _lend(self, kv: Lease) -> str:
        """Let others read it, in place of what they might before."""
        self._recall(kv.id)
        lease = self.news.name()
        self.lent[lease], self.leases[kv.id] = kv.id, lease
        self.endpoint.offer(lease, kv.blocks)
        return lease

    def _recall(self, id: int) -> None:
        lease = self.leases.pop(id, None)
        if lease is not None:
            del self.lent[lease]
            self.endpoint.release(lease)

    def lend(self, message: Lend) -> Exported:
        """Cached blocks, for who computes a prompt that begins with them."""
        lease = self.news.name()
        lent = self.exchange.lend(message.hashes, lease, time.monotonic() + message.lease_s)
        if lent is None:
            return Exported(message.call)
        seq, blocks = lent
        self.prefixes[lease] = seq
        self.endpoint.offer(lease, blocks)
        return Exported(message.call, "", lease, blocks, seq.prompt_tokens)

    def renewed(self, leases: list[str], lease_s: float) -> None:
        for lease in leases:
            if lease in self.prefixes:
                self.engine.worker.renew(self.prefixes[lease], time.monotonic() + lease_s)
            elif lease in self.lent:
                self.exchange.renew(self.lent[lease], time.monotonic() + lease_s)

    def overdue(self, seq: Sequence) -> None:
        """Nobody has renewed its lease."""
        if isinstance(seq.owner, str):
            if self.endpoint.release(seq.owner, "expired"):
                self.ended(seq.owner, read=False)
            return
        lease = self.leases.get(seq.request_id)
        if lease is not None and self.endpoint.release(lease, "expired"):
            self.expired += not seq.decodes_here
            self.ended(lease, read=False)

    def ended(self, lease: str, *, read: bool) -> None:
        if (seq := self.prefixes.pop(lease, None)) is not None:
            self.engine.worker.release(seq)
            return
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
            self.news.outputs.append(Tokens(id, 0, c.row.made, [], "moved"))
        self.exchange.release(id)

    def release(self, message: Release) -> None:
        if self.endpoint.release(message.lease):
            self.ended(message.lease, read=False)

    def export(self, message: Export) -> Exported:
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
            self.news.refuse(submit, reason)
            return
        c = self.exchange.sole(id)
        if c is None or c.held is None or not self.endpoint.release(message.lease):
            self.news.refuse(submit, f"lease {message.lease} has ended")
            return
        del self.lent[message.lease], self.leases[id]
        first, alone = c.held, submit.sampling.best_of == 1
        if alone and submit.sampling.max_tokens == 1:
            self.exchange.release(id)
            if not message.made:
                self.news.outputs.append(msgspec.structs.replace(first, id=submit.id, finish="length"))
            return
        self.exchange.resume_as(id, submit, now)
        self.news.told.append(Landed(submit.id, 0, 0.0, "", len(message.made)))
        if alone and not message.made:
            self.news.outputs.append(msgspec.structs.replace(first, id=submit.id, finish=None))

    def cancel(self, message: Cancel) -> bool:
        """True: it was this side's affair."""
        id = message.id
        if id in self.pushes:
            self.pushes.stop(id)
            return True
        self._recall(id)
        if not self.engine.holds(id):
            return False
        c = self.exchange.sole(id)
        assert c is not None, "what is held has one candidate"
        if c.seq.decodes_here:  # else it was computed while the word was on its way
            self.news.outputs.append(Tokens(id, 0, c.row.made, [], "abort"))
        self.exchange.release(id)
        return True
