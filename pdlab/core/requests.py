"""Requests on their way: each is dispatched, handed off and retried until it ends.

Those that cannot be placed now wait in two queues, in order of arrival: for a prefill instance, and for a decode instance. Their heads
are asked for again after every event that could have made room.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from math import inf

from pdlab.core.attempts import Attempts
from pdlab.core.blame import MISTAKES
from pdlab.core.candidates import Candidates
from pdlab.core.ledger import Ledger
from pdlab.core.membership import Membership
from pdlab.core.policy import Borrow, Policy, Reject
from pdlab.core.reply import RouterReply
from pdlab.core.router_limits import Limits
from pdlab.core.transfers import Transfers
from pdlab.core.types import (
    MADE,
    RESERVE,
    Arrived,
    Cancelled,
    Dispatch,
    Failed,
    Fetch,
    Fetched,
    Finished,
    Handoff,
    InstanceState,
    Lost,
    Migrated,
    PrefillDone,
    Refused,
    Role,
    Stage,
    TransferFailed,
    Transferred,
    Unreachable,
)
from pdlab.core.view import Cluster, Instance, LiveRequest

QUEUED_P, LEASED, DECODE = Stage.QUEUED_P, Stage.LEASED, Stage.DECODE  # enum look-ups cost
READY, PREFILL_ROLE = InstanceState.READY, Role.PREFILL


class Requests:
    """With `pairs` the decode instance is chosen at dispatch."""

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        limits: Limits,
        membership: Membership,
        ledger: Ledger,
        attempts: Attempts,
        transfers: Transfers,
        candidates: Candidates,
        reply: RouterReply,
        *,
        pairs: bool,
    ) -> None:
        self.cluster, self.policy, self.limits, self.pairs = cluster, policy, limits, pairs
        self.membership, self.ledger, self.attempts = membership, ledger, attempts
        self.transfers, self.candidates, self.reply = transfers, candidates, reply
        self.queue, self._tokens = attempts.queue, attempts.tokens
        self.handoffs: deque[LiveRequest] = deque()  # prompt computed, no decode instance yet
        self.changes = cluster.changes
        self.reach = cluster.reach
        self._closed = cluster.reach.closed
        self._most_in_flight = limits.max_in_flight

    def arrived(self, event: Arrived) -> None:
        request, cluster = event.request, self.cluster
        live = LiveRequest(request, cluster.now + self.limits.request_timeout_s)
        cluster.live[request.id] = live
        tokens = self._tokens[request.id] = request.prompt_tokens + event.max_tokens
        most = self._most_in_flight
        if most is not None and len(cluster.live) > most:
            self.attempts.end(live, Stage.REJECTED, f"{len(cluster.live) - 1} requests are in flight, and no more may be", overload=True)
        elif not (cluster.ready or self.membership.accepts):
            self.attempts.end(live, Stage.REJECTED, "no instance is ready")
        elif tokens > cluster.smallest_tokens and self.attempts.hopeless(live):
            return
        elif self.queue:
            self.attempts.enqueue(self.queue, live)
            if self.policy.queues:  # it may be this one's turn
                self._dispatch_chosen()
        elif not self._dispatch(live):
            self.queue.append(live)

    def _dispatch(self, live: LiveRequest) -> bool:
        """Ask for a place; False when there is none now. True, too, when it is refused."""
        cluster, request = self.cluster, live.request
        if self._tokens[request.id] > cluster.smallest_tokens and not self.candidates.narrowed:
            return self.attempts.hopeless(live) or self.candidates.among_able(live, self._dispatch)
        if not cluster.prefill:
            return not self.candidates.narrowed and self.attempts.hopeless(live)
        try:
            choice = self.policy.dispatch(request, cluster)
        except MISTAKES as error:
            raise self.reply.blame("dispatch", request.id, error) from error
        if choice is None:
            return False
        holder: Instance | None = None
        if isinstance(choice, Borrow):
            holder = choice.holder
            choice = choice.instance
        if choice.__class__ is not Instance:
            if isinstance(choice, Reject):
                self.attempts.end(live, Stage.REJECTED, choice.reason, overload=True)
                return True
            raise self.reply.blame("dispatch", request.id, f"returned {choice!r}, not an instance, None, Borrow or Reject")
        if choice.state is not READY and not choice.ready:
            raise self.reply.blame("dispatch", request.id, f"returned {choice.name}, which is {choice.state}")
        if self.candidates.narrowed and choice not in cluster.instances:  # it did not go by what it was shown
            choice = min(cluster.prefill, key=lambda x: (x.prefill_tokens, x.index))
        decode: Instance | None = None
        all_go_on = self.membership.all_go_on
        if not all_go_on:
            live.goes_on = False  # it need not, as long as nothing is made
        if choice.role is not PREFILL_ROLE or cluster.degraded:
            decode = choice
        elif self.pairs:
            decode = self.candidates.choose_decode(live, choice)
            if decode is None:
                return False
        if not live.goes_on:
            live.goes_on = all_go_on or (decode is not None and decode.can(MADE) and choice.can(MADE))
        live.attempt += 1
        live.prefill = choice
        live.stage = QUEUED_P
        tokens = request.prompt_tokens + live.sent_tokens
        if request.hashes:
            cached = cluster.cached_tokens(request)
            own = cached.get(choice, 0)
            anew = decode is choice and (request.best_of > 1 or live.sent_tokens > 0)  # one leg, which begins with the whole prompt
            if holder is not None and not anew and cached.get(holder, 0) > own and cluster.can_fetch(holder, choice):
                own = cached[holder]
                self.reach.sends(holder.name, choice.name, cluster.now)
                self.reply.actions.append(Fetch(request.id, live.attempt, choice.name, holder.name, own))
            tokens -= own
            cluster.index.book(request.hashes, choice)
        live.prefill_tokens = tokens
        choice.prefill_requests += 1
        choice.prefill_tokens += tokens
        choice.since_prefill_tokens += tokens
        choice.unreported.append((cluster.now, tokens, 0))
        if self.changes.wanted:
            self.changes.note(choice)
        if choice.prefill_requests >= choice.most_requests:
            self.ledger.set_busy(choice, True)
        name: str | None = None
        if decode is not None:
            self.ledger.assign_decode(live, decode)
            if decode is choice or decode.can(RESERVE):  # else it hears of it after prefill
                name = decode.name
        self.reply.actions.append(Dispatch(request.id, live.attempt, choice.name, name, live.sent_tokens, live.goes_on))
        return True

    def fetched(self, event: Fetched) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        if event.unreachable:
            self.transfers.failed(event.holder, event.instance, f"{event.holder} does not answer")
        elif event.tokens:
            self.transfers.came(event.holder, event.instance)
            pair = self.membership.by_name[event.holder], self.membership.by_name[event.instance]
            self.cluster.links.reached(*pair, event.size_bytes, event.seconds)

    def prefill_done(self, event: PrefillDone) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.ledger.unassign_prefill(live)
        decode = live.decode
        if decode is None:
            live.stage = LEASED
            if self.handoffs or not self._handoff(live):
                self.handoffs.append(live)
        elif decode is live.prefill:
            self._decoding(live)
        else:
            if not decode.can(RESERVE):  # it was chosen, and hears of it now
                self.reply.actions.append(Handoff(live.request.id, live.attempt, event.instance, decode.name))
            self.transfers.depart(live)
        if self.queue or (self._closed and self.handoffs):
            self.retry()

    def _handoff(self, live: LiveRequest) -> bool:
        """Ask who decodes it; False when there is nobody now. True, too, when it is given up."""
        if self._tokens[live.request.id] > self.cluster.smallest_tokens and not self.candidates.narrowed:
            return self.attempts.hopeless(live) or self.candidates.among_able(live, self._handoff)
        assert live.prefill is not None, f"request {live.request.id} has no KV to hand over"
        decode = self.candidates.choose_decode(live, live.prefill)
        if decode is None:
            return not (self.candidates.narrowed or self.cluster.ready) and self.attempts.hopeless(live)
        self.ledger.assign_decode(live, decode)
        self.reply.actions.append(Handoff(live.request.id, live.attempt, live.prefill.name, decode.name))
        if decode is live.prefill:
            self._decoding(live)
        else:
            self.transfers.depart(live)
        return True

    def _decoding(self, live: LiveRequest) -> None:
        live.stage = DECODE
        live.decode_since_s = self.cluster.now
        live.prefill = None

    def refused(self, event: Refused) -> None:
        """No room to reserve. Before prefill: back into the queue. After: the KV stays leased, and the hand-off waits. A migration is
        called off."""
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        if live.migrating is not None:
            live.migrating = None
            return
        self.ledger.unassign_decode(live)
        instance = self.membership.by_name[event.instance]
        if live.stage is QUEUED_P and live.prefill is instance:  # it takes no more at all
            self.ledger.unassign_prefill(live)
            live.prefill = None
            self.attempts.enqueue(self.queue, live)
            self.ledger.set_busy(instance, True)
            self.retry()
            return
        if live.stage is QUEUED_P:
            self.ledger.unassign_prefill(live)
            live.prefill = None
            self.attempts.enqueue(self.queue, live)
        else:
            live.stage = LEASED
            self.attempts.enqueue(self.handoffs, live)
        self.ledger.set_room(instance, 0.0)
        self.retry()  # others may have room

    def transferred(self, event: Transferred) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            if self._closed and live.prefill is not None:
                self.transfers.came(live.prefill.name, event.instance)
            self.cluster.links.arrive(live, event.size_bytes, event.seconds)
            self._decoding(live)
            if self.queue:
                self.retry()

    def transfer_failed(self, event: TransferFailed) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        if live.migrating is not None:
            live.migrating = None
            if event.lost:
                self.attempts.lose(live, event.reason, event.sent)
        else:
            self.attempts.lose_transfer(live, event.reason)
        self.retry()

    def unreachable(self, event: Unreachable) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        self.transfers.failed(event.src, event.dst, event.reason)
        if live.migrating is not None:
            live.migrating = None
        elif event.held:  # somebody else may read it
            self.ledger.unassign_decode(live)
            live.stage = LEASED
            self.attempts.enqueue(self.handoffs, live)
        else:
            self.attempts.lose_transfer(live, event.reason)
        self.retry()

    def migrated(self, event: Migrated) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        target = self.membership.by_name[event.dst]
        self.transfers.came(event.src, event.dst)
        self.ledger.unassign_decode(live)
        live.migrating = None
        self.cluster.links.arrive(live, event.size_bytes, event.seconds)
        self.ledger.assign_decode(live, target)
        self.retry()

    def lost(self, event: Lost) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            self.attempts.lose(live, event.reason, event.sent, charged=event.charged)
            self.retry()

    def finished(self, event: Finished) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        if live.prefill_tokens >= 0:
            self.ledger.unassign_prefill(live)
        self.ledger.unassign_decode(live)
        if live.stage is not DECODE or live.migrating is not None:  # it ended before it was moved
            self.cluster.links.arrive(live)
        del self.cluster.live[event.request_id]
        del self._tokens[event.request_id]
        if self.queue or self.handoffs:
            self.retry()

    def failed(self, event: Failed) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            self.attempts.abort(live)
            self.attempts.end(live, Stage.FAILED, event.reason)
            self.retry()

    def cancelled(self, event: Cancelled) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None:
            self.attempts.abort(live)
            self.attempts.end(live, Stage.ABORTED, "cancelled by the client")
            self.retry()

    def retry(self) -> None:
        """Something changed: ask again for the heads of both queues, as long as they get a place."""
        handoffs, queue, live = self.handoffs, self.queue, self.cluster.live
        if self._closed:
            self._hand_over_by_source()
        else:
            while handoffs:
                head = handoffs[0]
                if head.stage is LEASED and live.get(head.request.id) is head and not self._handoff(head):
                    break
                handoffs.popleft()
        if self.policy.queues:
            self._dispatch_chosen()
            return
        while queue:
            head = queue[0]
            if head.prefill is None and live.get(head.request.id) is head and not self._dispatch(head):
                break
            queue.popleft()

    def _dispatch_chosen(self) -> None:
        """As long as the one whose turn it is, by the policy, gets a place."""
        queue, live = self.queue, self.cluster.live
        while queue:
            waiting = {one.request.id: one for one in queue if one.prefill is None and live.get(one.request.id) is one}
            if not waiting:
                queue.clear()
                return
            requests = [one.request for one in waiting.values()]
            try:
                answer = self.policy.first(requests, self.cluster)
            except MISTAKES as error:
                raise self.reply.blame("first", None, error) from error
            chosen = waiting.get(getattr(answer, "id", -1))
            if chosen is None:
                raise self.reply.blame("first", None, f"returned {answer!r}, none of the requests that wait")
            if not self._dispatch(chosen):
                return
            queue.remove(chosen)

    def evict(self) -> None:
        """Give up what the policy no longer wants to run."""
        try:
            ids = list(self.policy.evict(self.cluster))
        except MISTAKES as error:
            raise self.reply.blame("evict", None, error) from error
        for request_id in ids:
            live = self.cluster.live.get(request_id)
            if live is not None:
                self.attempts.abort(live)
                self.attempts.end(live, Stage.REJECTED, "given up for requests of higher priority", overload=True)
        if ids:
            self.retry()

    def _hand_over_by_source(self) -> None:
        """Where ways are closed, who waits for one holds up those of its own prefill instance, and no others."""
        stuck: set[Instance] = set()
        waiting: deque[LiveRequest] = deque()
        for head in list(self.handoffs):
            if head.stage is not LEASED or self.cluster.live.get(head.request.id) is not head or head.prefill is None:
                continue
            if head.prefill in stuck or not self._handoff(head):
                stuck.add(head.prefill)
                waiting.append(head)
        self.handoffs = waiting

    def room(self, instance: Instance) -> float:
        """KV tokens that it may be asked for by its report: none where the first who waits does not fit, any where nobody waits, or where
        that one can never be held there."""
        head = self.queue[0] if self.queue else self.handoffs[0] if self.handoffs else None
        if head is None or not self.cluster.capacity.can_decode(head, instance):
            return inf
        free = instance.free_tokens
        fits = free >= head.request.prompt_tokens + head.sent_tokens and instance.report.running < (instance.spec.max_seqs or inf)
        return float(free) if fits else 0.0

    @property
    def waiting(self) -> bool:
        """For a place, anybody."""
        return bool(self.queue or self.handoffs)

    def lose_all(self, instance: Instance, sent: dict[int, int], reason: str, *, charged: bool) -> None:
        """An instance has gone, and with it what it served."""
        for live in list(self.cluster.live.values()):
            if live.migrating is instance:
                live.migrating = None
                self.cluster.links.arrive(live)
            if live.prefill is instance or live.decode is instance:
                self.attempts.lose(live, reason, sent.get(live.request.id), charged=charged)

    def expire(self) -> None:
        """End what has lasted too long, and try anew what has waited too long for its KV."""
        now, limits = self.cluster.now, self.limits
        for live in list(takewhile(lambda live: live.expires_s <= now, self.cluster.live.values())):  # they are in order of arrival
            stage = live.stage
            self.attempts.abort(live)
            self.attempts.end(live, Stage.EXPIRED, f"not done within {limits.request_timeout_s:g} s (was in {stage.name})")
        for late in self.transfers.overdue():
            if late.prefill is not None and late.decode is not None:
                self.transfers.failed(late.prefill.name, late.decode.name, f"nothing came within {limits.transfer_timeout_s:g} s")
            self.attempts.lose_transfer(late, f"KV transfer not done within {limits.transfer_timeout_s:g} s")
