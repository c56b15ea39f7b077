"""The engine's side of KV exchange: it lends what was computed here, and receives what is computed elsewhere.

All books are the engine thread's. The endpoint works in a loop beside it, and what it has to say comes back through `post`, to be called
between two steps.
"""

from __future__ import annotations

import time
from math import inf

from pdlab.real.engine.engine import Engine
from pdlab.real.engine.handover import Handover
from pdlab.real.engine.messages import AskLease, Cancel, Export, Holds, Lend, Proceed, Receive, Release, RenewLease, Resume, Submit, Tokens
from pdlab.real.host.background import Background
from pdlab.real.instance.kv_lending import KvLending
from pdlab.real.instance.kv_news import KvNews
from pdlab.real.instance.kv_receiving import KvReceiving
from pdlab.real.instance.pushes import Post
from pdlab.real.transfer.endpoint import KvEndpoint


class KvService:
    """`post` calls a function on the engine's thread, between two steps. `news` are for the other process."""

    def __init__(self, engine: Engine, endpoint: KvEndpoint, background: Background, post: Post, *, engine_id: str, lease_s: float) -> None:
        self.engine, self.endpoint, self.background, self.post, self.engine_id = engine, endpoint, background, post, engine_id
        self.exchange, self.news = Handover(engine), KvNews(engine_id)
        self.lending = KvLending(engine, self.exchange, endpoint, background, post, self.news, lease_s=lease_s)
        self.receiving = KvReceiving(engine, self.exchange, endpoint, background, post, self.news, lease_s=lease_s)

    def take(self, message: Receive | Resume | Proceed | Release | RenewLease | AskLease | Export | Lend, now: float) -> None:
        match message:
            case Receive():
                self.receiving.receive(message, now)
                if message.prefix:
                    self.lending.submitted(message.submit)
            case Resume():
                self.lending.resume(message, now)
            case Proceed():
                self.receiving.proceed(message)
            case Release():
                self.lending.release(message)
            case RenewLease():
                self.lending.renewed([message.lease], message.lease_s)
            case AskLease(call, lease):
                self.news.told.append(Holds(call, self.endpoint.holds(lease)))
            case Export():
                self.news.told.append(self.lending.export(message))
            case Lend():
                self.news.told.append(self.lending.lend(message))

    def submitted(self, submit: Submit) -> None:
        self.lending.submitted(submit)

    def looked_at(self, outputs: list[Tokens]) -> None:
        self.lending.looked_at(outputs)

    def cancel(self, message: Cancel) -> bool:
        """True: it was an affair of KV."""
        return self.receiving.cancel(message) or self.lending.cancel(message)

    def deadlines(self) -> None:
        """Those that have come: of leases that nobody has renewed, and of KV that is not here yet."""
        worker = self.engine.worker
        for seq in worker.overdue(time.monotonic()):
            worker.renew(seq, inf)  # it ends now, or when whoever writes or reads there has ended
            if (inbound := self.receiving.inbound.get(seq.request_id)) is not None:
                self.receiving.overdue(inbound)
            else:
                self.lending.overdue(seq)

    def lease_read(self, lease: str, blocks: list[int]) -> None:
        """The endpoint says so, in its own thread."""
        self.post(lambda: self.lending.ended(lease, read=True))

    def leases_renewed(self, leases: list[str], lease_s: float) -> None:
        """Likewise."""
        self.post(lambda: self.lending.renewed(leases, lease_s))
