"""Attempts at serving a request: how one is taken back, lost and tried again, and how a request ends."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from pdlab.core.ledger import Ledger
from pdlab.core.membership import Membership
from pdlab.core.reply import RouterReply
from pdlab.core.router_limits import Limits
from pdlab.core.types import Abort, End, InstanceState, Stage
from pdlab.core.view import Cluster, Instance, LiveRequest

COMING = frozenset(set(InstanceState) - {InstanceState.DRAINING, InstanceState.GONE})  # at work, or expected to be
QUEUED_P, LEASED, TRANSFER = Stage.QUEUED_P, Stage.LEASED, Stage.TRANSFER  # enum look-ups cost


class Attempts:
    """`tokens` is, of each live request, its prompt and the most output it may have. `queue` are those that have no prefill instance yet;
    it stays the same deque."""

    def __init__(
        self,
        cluster: Cluster,
        tokens: dict[int, int],
        ledger: Ledger,
        membership: Membership,
        reply: RouterReply,
        limits: Limits,
        first_token: str,
    ) -> None:
        self.cluster, self.tokens = cluster, tokens
        self.ledger, self.membership, self.reply = ledger, membership, reply
        self.limits, self.first_token = limits, first_token
        self.queue: deque[LiveRequest] = deque()

    def hopeless(self, live: LiveRequest) -> bool:
        """End a request that nobody can serve, nor anybody who is expected; False where somebody may."""
        cluster = self.cluster
        coming = [x for x in cluster.instances if x.state in COMING]
        if self.membership.starting or any(cluster.capacity.can_decode(live, x) for x in coming):
            return False
        unfit = bool(coming) and not any(cluster.capacity.can_decode(live, x) for x in cluster.instances)
        if not unfit and cluster.now < self.membership.back_by_s:
            return False
        reason = "no instance is ready" if not coming else cluster.capacity.shortfall(live, coming)
        if coming and not unfit:
            reason = f"no instance that can hold it is ready: {reason}"
        self.abort(live)
        self.end(live, Stage.FAILED if unfit or live.sent_tokens else Stage.REJECTED, reason, unfit=unfit)
        return True

    def enqueue(self, queue: deque[LiveRequest], live: LiveRequest) -> None:
        """Into a queue by priority, then arrival."""
        key = _place(live)
        i = len(queue)
        if i and queue is self.queue and _place(queue[-1]) > key:  # it is in that order; hand-offs come as their prompts are computed
            i = bisect_right(queue, key, key=_place)
        while i and _place(queue[i - 1]) > key:
            i -= 1
        queue.insert(i, live)

    def abort(self, live: LiveRequest) -> None:
        """Take an attempt off every instance that takes part in it, and out of both queues and ledgers."""
        where: list[Instance] = []
        for x in (live.prefill, live.decode, live.migrating):
            if x is not None and x not in where:
                where.append(x)
        self.reply.actions += [Abort(live.request.id, live.attempt, x.name) for x in where if x.state is not InstanceState.GONE]
        self.ledger.unassign_prefill(live)
        self.ledger.unassign_decode(live)
        self.cluster.links.arrive(live)
        live.prefill = live.migrating = None

    def lose(self, live: LiveRequest, reason: str, sent: int | None = None, *, charged: bool = True) -> None:
        """This attempt is lost: try again from the start, tokens already sent being part of the prompt, or give up. Where the world does
        not say how many this attempt has `sent`, it is none, or the first one if that came from the prefill instance. Several candidates
        are made anew. Only what is `charged` counts against `max_attempts`."""
        if sent is None:
            sent = int(self.first_token == "prefill" and live.goes_on and live.stage in (LEASED, TRANSFER))
        live.sent_tokens += sent if live.request.best_of == 1 else 0
        self.abort(live)
        live.losses += charged
        if charged and live.losses >= self.limits.max_attempts:
            self.end(live, Stage.FAILED, f"{reason}; gave up after {live.losses} attempts")
            return
        live.attempt += 1  # what the old attempt still says is stale from here on
        live.stage = QUEUED_P
        self.enqueue(self.queue, live)

    def lose_transfer(self, live: LiveRequest, reason: str) -> None:
        """Lost on the way to a decode instance: this request does not go there again where there is another."""
        live.avoid = live.decode
        self.lose(live, reason)

    def end(self, live: LiveRequest, stage: Stage, reason: str, *, unfit: bool = False, overload: bool = False) -> None:
        live.stage = stage
        del self.cluster.live[live.request.id]
        del self.tokens[live.request.id]
        self.reply.actions.append(End(live.request.id, stage, reason, unfit, overload))


def _place(live: LiveRequest) -> tuple[int, int]:
    """In a queue: by priority, then arrival."""
    return -live.request.priority, live.request.id
