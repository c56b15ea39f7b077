"""The control plane, sans-IO: `handle(event, now)` -> actions.

The router keeps a view of the instances that only events change, asks the policy, and turns its answers into actions. It owns where
each request is, its attempts and its deadlines. An attempt is bound to incarnations: whatever an older one still says changes nothing.

    Arrived -> dispatch? -> Dispatch ... PrefillDone -> handoff? -> Handoff ... Transferred ... Finished

Requests that cannot be placed now wait in two queues, in order of arrival: for a prefill instance, and for a decode instance. Their
heads are asked for again after every event that could have made room. An instance that dies is fenced by its incarnation; what it
served is dispatched anew, with the tokens its clients already have as part of the prompt.

A way on which KV did not come is closed for a while (`reach`): requests are then decoded by others, or stay where they were prefilled.

Whoever can never hold a request (its KV blocks, its model's context) is left out of the view before the policy is asked for it. Where
nobody can, now or when those come back that are expected to, the request is refused, with the numbers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from math import ceil, inf

from pdlab.core.blame import Endless, blamed
from pdlab.core.policy import Policy, Reject
from pdlab.core.types import (
    DRAIN,
    MADE,
    MIGRATE,
    RESERVE,
    SWITCH,
    Abort,
    Action,
    AnyEvent,
    Arrived,
    Cancelled,
    Dispatch,
    Drained,
    End,
    Evict,
    Failed,
    Finished,
    Handoff,
    InstanceState,
    Joined,
    Leads,
    Left,
    Lost,
    Migrate,
    Migrated,
    Notice,
    PrefillDone,
    Refused,
    RegistryAway,
    Report,
    Role,
    Scale,
    Stage,
    Stop,
    Suspected,
    Switch,
    Switched,
    Tick,
    TransferFailed,
    Transferred,
    Unreachable,
    UsageError,
)
from pdlab.core.view import Capacity, Cluster, Instance, LiveRequest

COMING = frozenset(set(InstanceState) - {InstanceState.DRAINING, InstanceState.GONE})  # at work, or expected to be
LEAST_TICK_S = 0.001
QUEUED_P, LEASED, TRANSFER, DECODE = Stage.QUEUED_P, Stage.LEASED, Stage.TRANSFER, Stage.DECODE  # enum look-ups cost
READY, PREFILL_ROLE = InstanceState.READY, Role.PREFILL


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on waiting, in seconds, and on what is taken in."""

    request_timeout_s: float = 900.0  # arrival to end
    transfer_timeout_s: float = 30.0  # hand-off to arrival of the KV
    max_attempts: int = 3  # losses (of an instance, of a transfer) that one request survives, and one more
    lease_s: float = 3.0  # an instance unheard for that long, and two probes of 1 s, is suspect
    probe_s: float = 2.0
    suspect_s: float = 15.0  # and is fenced when suspect for that long
    grace_s: float = 0.0  # that requests wait for an instance when the last that could serve them has left
    max_in_flight: int | None = None  # requests that have arrived and not ended; more are refused


class Router:
    """`seed` feeds the one generator policies may draw from. `hash_tokens` is the prompt tokens behind one prefix hash. With
    `reserve_first` decode instances are chosen at dispatch and reserve blocks before prefill starts. `first_token` says which of the
    two instances sends it ("prefill" or "decode"). `autoscale` is the least and the most instances that a policy may scale to; None: it
    may not."""

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int = 0,
        limits: Limits | None = None,
        hash_tokens: int = 16,
        ttft_slo_s: float = 1.0,
        tpot_slo_s: float = 0.05,
        reserve_first: bool = False,
        first_token: str = "prefill",
        autoscale: tuple[int, int] | None = None,
    ) -> None:
        if policy.tick_s is not None and not policy.tick_s >= LEAST_TICK_S:
            raise UsageError(f"policy {type(policy).__name__}: tick_s must be at least {LEAST_TICK_S:g} s, not {policy.tick_s:g}")
        self.policy = policy
        self.limits = limits or Limits()
        self.pairs = policy.pairs or reserve_first
        self.autoscale = autoscale
        self.starting = 0  # asked for by Scale, and not yet joined
        self.left_s = -inf  # when an instance last left
        self.back_by_s = -inf  # until then one that has left may be back
        self.first_token = first_token
        self.tick_s = min(1.0, policy.tick_s) if policy.tick_s else 1.0
        self._tokens: dict[int, int] = {}  # of each live request: prompt, and the most output it may have
        self._narrowed = False  # the policy's view, to who can hold the request in question
        self.cluster = Cluster(
            random.Random(seed),
            hash_tokens=hash_tokens,
            ttft_slo_s=ttft_slo_s,
            tpot_slo_s=tpot_slo_s,
            capacity=Capacity(self._tokens),
        )
        self.reach = self.cluster.reach
        self._closed = self.reach.closed
        self._most_in_flight = self.limits.max_in_flight
        self.by_name: dict[str, Instance] = {}
        self.all_go_on = True  # each instance can go on from tokens that another has made
        self._noticed: set[str] = set()
        self.queue: deque[LiveRequest] = deque()  # no prefill instance yet
        self.handoffs: deque[LiveRequest] = deque()  # prompt computed, no decode instance yet
        self.transfers: deque[tuple[float, int]] = deque()
        self.registry_away = False
        self.policy_due_s = 0.0
        self.leads = True  # of several routers, this one resizes
        self._minds_rest = self._acts_without_requests(policy)
        self._observes = type(policy).observe is not Policy.observe or getattr(policy, "observers", False)
        self._actions: list[Action] = []
        self._handlers: dict[type, Callable[..., None]] = {
            Arrived: self._arrived,
            Cancelled: self._cancelled,
            Joined: self._joined,
            Left: self._left,
            Report: self._report,
            Refused: self._refused,
            PrefillDone: self._prefill_done,
            Transferred: self._transferred,
            TransferFailed: self._transfer_failed,
            Unreachable: self._unreachable,
            Migrated: self._migrated,
            Lost: self._lost,
            Finished: self._finished,
            Failed: self._failed,
            Switched: self._switched,
            Drained: self._drained,
            Leads: self._led,
            RegistryAway: self._registry_away,
            Suspected: self._suspected,
            Tick: self._tick,
        }

    @staticmethod
    def _acts_without_requests(policy: Policy) -> bool:
        """May the policy act or learn on a cluster at rest? Without requests there is nothing to place or to move."""
        observes = type(policy).observe is not Policy.observe or bool(getattr(policy, "observers", False))
        resizes = policy.tick_s is not None and getattr(policy.resize, "__func__", None) is not Policy.resize
        return observes or resizes

    @property
    def accepts(self) -> bool:
        """May requests come? Somebody is ready, has left within `Limits.grace_s`, or is not ready only because nothing was heard of it."""
        if self.cluster.ready or self.cluster.now < self.left_s + self.limits.grace_s:
            return True
        states = [x.state for x in self.cluster.instances]
        expected = any(state is not InstanceState.GONE for state in states) or self.cluster.now < self.back_by_s
        return InstanceState.SUSPECT in states or (self.registry_away and expected)

    @property
    def overloaded(self) -> bool:
        """Are as many requests in flight as may be?"""
        most = self.limits.max_in_flight
        return most is not None and len(self.cluster.live) >= most

    @property
    def rests(self) -> bool:
        """Would ticks, and reports of no load, change nothing until something else happens? A world need not tell them then."""
        policy_rests = self.policy.rests or not self._minds_rest
        return policy_rests and not self.cluster.live and all(x.state in (READY, InstanceState.GONE) for x in self.cluster.instances)

    @property
    def blindness(self) -> str:
        """In words, that the policy has asked for predictions of instances of which nothing is known; ""."""
        blind = self.cluster.blind
        if not blind:
            return ""
        return (
            f"policy {type(self.policy).__name__} asks how long steps take on {', '.join(sorted(blind))}, and was told 0 s: neither a "
            "profile nor, by then, a step of them was known. Give them hardware: profile.json (pdlab calibrate), or let them measure "
            "themselves (without --no-self-profile)"
        )

    @property
    def policy_ticks(self) -> int:
        """Every so many ticks the policy is asked for migrations and sizes; 1 where it never is."""
        return ceil((self.policy.tick_s or self.tick_s) / self.tick_s - 1e-9)

    def rested(self, *, reports_s: float = 0.0, ticks_s: float = 0.0) -> None:
        """So many seconds of reports, or of ticks, are left out, as nothing was to be said."""
        for instance in self.cluster.instances:
            instance.heard_s += reports_s
        self.policy_due_s += ticks_s

    def handle(self, event: AnyEvent, now: float) -> list[Action]:
        """Take in what happened at `now`; returns what to do about it, in order. `now` never goes back."""
        self.cluster.now = now
        actions: list[Action] = []
        self._actions = actions
        self._handlers[event.__class__](event)
        if self._observes:
            try:
                self.policy.observe(Arrived(event.request) if isinstance(event, Arrived) else event, self.cluster)
            except (Exception, Endless) as error:
                raise self._blame("observe", None, error) from error
        return actions

    # ------------------------------------------------------------ requests

    def _arrived(self, event: Arrived) -> None:
        request, cluster = event.request, self.cluster
        live = LiveRequest(request, cluster.now + self.limits.request_timeout_s)
        cluster.live[request.id] = live
        tokens = self._tokens[request.id] = request.prompt_tokens + event.max_tokens
        most = self._most_in_flight
        if most is not None and len(cluster.live) > most:
            self._end(live, Stage.REJECTED, f"{len(cluster.live) - 1} requests are in flight, and no more may be", overload=True)
        elif not (cluster.ready or self.accepts):
            self._end(live, Stage.REJECTED, "no instance is ready")
        elif tokens > cluster.smallest_tokens and self._hopeless(live):
            return
        elif self.queue:
            self._enqueue(self.queue, live)
        elif not self._dispatch(live):
            self.queue.append(live)

    def _enqueue(self, queue: deque[LiveRequest], live: LiveRequest) -> None:
        """Into a queue by priority, then arrival."""
        key = (-live.request.priority, live.request.id)
        i = len(queue)
        while i and (-queue[i - 1].request.priority, queue[i - 1].request.id) > key:
            i -= 1
        queue.insert(i, live)

    def _dispatch(self, live: LiveRequest) -> bool:
        """Ask for a place; False when there is none now. True, too, when it is refused."""
        cluster, request = self.cluster, live.request
        if self._tokens[request.id] > cluster.smallest_tokens and not self._narrowed:
            return self._among_able(live, self._dispatch)
        if not cluster.prefill:
            return not self._narrowed and self._hopeless(live)
        try:
            choice = self.policy.dispatch(request, cluster)
        except (Exception, Endless) as error:
            raise self._blame("dispatch", request.id, error) from error
        if choice is None:
            return False
        if choice.__class__ is not Instance:
            if isinstance(choice, Reject):
                self._end(live, Stage.REJECTED, choice.reason, overload=True)
                return True
            raise self._blame("dispatch", request.id, f"returned {choice!r}, not an instance, None or Reject")
        if choice.state is not READY and not choice.ready:
            raise self._blame("dispatch", request.id, f"returned {choice.name}, which is {choice.state}")
        if self._narrowed and choice not in cluster.instances:  # it did not go by what it was shown
            choice = min(cluster.prefill, key=lambda x: (x.prefill_tokens, x.index))
        decode: Instance | None = None
        all_go_on = self.all_go_on
        if not all_go_on:
            live.goes_on = False  # it need not, as long as nothing is made
        if choice.role is not PREFILL_ROLE or cluster.degraded:
            decode = choice
        elif self.pairs:
            decode = self._choose_decode(live, choice)
            if decode is None:
                return False
        if not live.goes_on:
            live.goes_on = all_go_on or (decode is not None and decode.can(MADE) and choice.can(MADE))
        live.attempt += 1
        live.prefill = choice
        live.stage = QUEUED_P
        tokens = request.prompt_tokens + live.sent_tokens
        if request.hashes:
            tokens -= cluster.cached_tokens(request).get(choice, 0)
            cluster.index.book(request.hashes, choice)
        live.prefill_tokens = tokens
        choice.prefill_requests += 1
        choice.prefill_tokens += tokens
        choice.since_prefill_tokens += tokens
        choice.unreported.append((cluster.now, tokens, 0))
        if choice.prefill_requests >= choice.most_requests:
            self._set_busy(choice, True)
        name: str | None = None
        if decode is not None:
            self._assign_decode(live, decode)
            if decode is choice or decode.can(RESERVE):  # else it hears of it after prefill
                name = decode.name
        self._actions.append(Dispatch(request.id, live.attempt, choice.name, name, live.sent_tokens, live.goes_on))
        return True

    def _among_able(self, live: LiveRequest, ask: Callable[[LiveRequest], bool]) -> bool:
        """`ask` in a view that leaves out those who can never hold this request."""
        if self._hopeless(live):
            return True
        cluster = self.cluster
        whole = cluster.instances, cluster.prefill, cluster.decode, cluster.degraded
        cluster.instances, cluster.prefill, cluster.decode, cluster.degraded = cluster.able(live)
        self._narrowed = True
        try:
            return ask(live)
        finally:
            self._narrowed = False
            cluster.instances, cluster.prefill, cluster.decode, cluster.degraded = whole

    def _hopeless(self, live: LiveRequest) -> bool:
        """End a request that nobody can serve, nor anybody who is expected; False where somebody may."""
        cluster = self.cluster
        coming = [x for x in cluster.instances if x.state in COMING]
        if self.starting or any(cluster.capacity.can_decode(live, x) for x in coming):
            return False
        unfit = bool(coming) and not any(cluster.capacity.can_decode(live, x) for x in cluster.instances)
        if not unfit and cluster.now < self.back_by_s:
            return False
        reason = "no instance is ready" if not coming else cluster.capacity.shortfall(live, coming)
        if coming and not unfit:
            reason = f"no instance that can hold it is ready: {reason}"
        self._abort(live)
        self._end(live, Stage.FAILED if unfit or live.sent_tokens else Stage.REJECTED, reason, unfit=unfit)
        return True

    def _choose_decode(self, live: LiveRequest, src: Instance) -> Instance | None:
        """Ask who decodes what `src` prefills, among those that can and that it reaches; None when there is nobody now."""
        cluster, request = self.cluster, live.request
        candidates = wanted = cluster.decode
        picky = bool(self._closed) or not self.all_go_on
        if picky:
            wanted = [x for x in candidates if self._comes(live, src, x)]
            if not wanted and not self._may_come(live, src):
                return src if cluster.capacity.can_decode(live, src) else None
        if not wanted:
            return None
        if live.avoid is not None:
            wanted = [x for x in wanted if x is not live.avoid] or wanted
        if wanted is not candidates:
            cluster.decode = wanted
        try:
            choice = self.policy.handoff(request, cluster)
        except (Exception, Endless) as error:
            raise self._blame("handoff", request.id, error) from error
        finally:
            cluster.decode = candidates
        if choice is None:
            return None
        if choice.__class__ is not Instance:
            raise self._blame("handoff", request.id, f"returned {choice!r}, not an instance or None")
        if choice.state is not READY and not choice.ready and choice is not src:
            raise self._blame("handoff", request.id, f"returned {choice.name}, which is {choice.state}")
        if not (picky or self._narrowed):
            return choice
        unable = self._narrowed and not cluster.capacity.can_decode(live, choice)
        if unable or (picky and not self._comes(live, src, choice)):  # it did not go by what it was shown
            choice = min(wanted, key=lambda x: (x.decode_tokens, x.index))
        if self._closed:
            self.reach.sends(src.name, choice.name, cluster.now)
        return choice

    def _comes(self, live: LiveRequest, src: Instance, x: Instance) -> bool:
        """Can what `src` prefills be decoded by `x` now, as far as the way and what is made are concerned?"""
        return x is src or (self.reach.open(src.name, x.name, self.cluster.now) and (x.can(MADE) or not live.goes_on))

    def _may_come(self, live: LiveRequest, src: Instance) -> bool:
        """Is there somebody else who can decode it, busy or full though he may be?"""
        return any(
            x.ready
            and x.role.decodes
            and not self.reach.doubtful(src.name, x.name)
            and (x.can(MADE) or not live.goes_on)
            and self.cluster.capacity.can_decode(live, x)
            for x in self.cluster.instances
        )

    def _assign_decode(self, live: LiveRequest, decode: Instance) -> None:
        request = live.request
        tokens = live.decode_tokens = request.prompt_tokens + live.sent_tokens
        live.decode = decode
        decode.decode_requests += 1
        decode.decode_tokens += tokens
        decode.decoding[request.id] = live
        decode.since_decode_tokens += tokens
        decode.unreported.append((self.cluster.now, 0, tokens))
        if decode.room < inf:
            self._set_room(decode, decode.room - tokens)
        if decode.decode_requests >= decode.most_requests:
            self._set_busy(decode, True)
        if request.hashes and decode is not live.prefill:
            self.cluster.index.book(request.hashes, decode)

    def _unassign_prefill(self, live: LiveRequest) -> None:
        """The prompt is computed, or never will be: out of the prefill instance's ledger. It may still hold the KV."""
        if live.prefill_tokens >= 0 and live.prefill is not None:
            live.prefill.prefill_requests -= 1
            live.prefill.prefill_tokens -= live.prefill_tokens
            live.prefill_tokens = -1
            if live.prefill.busy:
                self._set_busy(live.prefill, not live.prefill.has_place)

    def _unassign_decode(self, live: LiveRequest) -> None:
        decode = live.decode
        if decode is not None:
            freed = self.cluster.context_tokens(live) if decode.room < inf else 0
            decode.decode_requests -= 1
            decode.decode_tokens -= live.decode_tokens
            del decode.decoding[live.request.id]
            live.decode = None
            if decode.room < inf:
                self._set_room(decode, max(0.0, decode.room) + freed)
            if decode.busy:
                self._set_busy(decode, not decode.has_place)

    def _set_room(self, instance: Instance, room: float) -> None:
        """An instance that has refused somebody is asked again for as many tokens as come free there. It is no candidate without: all who
        wait would be refused one by one whenever one ends."""
        was_full = instance.full
        instance.room = room
        if instance.full is not was_full:
            self.cluster.refresh()

    def _set_busy(self, instance: Instance, busy: bool) -> None:
        """A busy instance is no candidate until something there has ended, or it reports."""
        if instance.busy is not busy:
            instance.busy = busy
            self.cluster.refresh()

    def _prefill_done(self, event: PrefillDone) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self._unassign_prefill(live)
        decode = live.decode
        if decode is None:
            live.stage = LEASED
            if self.handoffs or not self._handoff(live):
                self.handoffs.append(live)
        elif decode is live.prefill:
            self._decoding(live)
        else:
            if not decode.can(RESERVE):  # it was chosen, and hears of it now
                self._actions.append(Handoff(live.request.id, live.attempt, event.instance, decode.name))
            self._transfer(live)
        if self.queue or (self._closed and self.handoffs):
            self._retry()

    def _handoff(self, live: LiveRequest) -> bool:
        """Ask who decodes it; False when there is nobody now. True, too, when it is given up."""
        if self._tokens[live.request.id] > self.cluster.smallest_tokens and not self._narrowed:
            return self._among_able(live, self._handoff)
        assert live.prefill is not None, f"request {live.request.id} has no KV to hand over"
        decode = self._choose_decode(live, live.prefill)
        if decode is None:
            return not (self._narrowed or self.cluster.ready) and self._hopeless(live)
        self._assign_decode(live, decode)
        self._actions.append(Handoff(live.request.id, live.attempt, live.prefill.name, decode.name))
        if decode is live.prefill:
            self._decoding(live)
        else:
            self._transfer(live)
        return True

    def _transfer(self, live: LiveRequest) -> None:
        assert live.prefill is not None and live.decode is not None
        self.cluster.links.moving[live] = live.prefill, live.decode, live.decode_tokens
        live.stage = TRANSFER
        live.due_s = self.cluster.now + self.limits.transfer_timeout_s
        self.transfers.append((live.due_s, live.request.id))

    def _decoding(self, live: LiveRequest) -> None:
        live.stage = DECODE
        live.decode_since_s = self.cluster.now
        live.prefill = None

    def _refused(self, event: Refused) -> None:
        """No room to reserve. Before prefill: back into the queue. After: the KV stays leased, and the hand-off waits. A migration is
        called off."""
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        if live.migrating is not None:
            live.migrating = None
            return
        self._unassign_decode(live)
        instance = self.by_name[event.instance]
        if live.stage is QUEUED_P and live.prefill is instance:  # it takes no more at all
            self._unassign_prefill(live)
            live.prefill = None
            self._enqueue(self.queue, live)
            self._set_busy(instance, True)
            self._retry()
            return
        if live.stage is QUEUED_P:
            self._unassign_prefill(live)
            live.prefill = None
            self._enqueue(self.queue, live)
        else:
            live.stage = LEASED
            self._enqueue(self.handoffs, live)
        self._set_room(instance, 0.0)
        self._retry()  # others may have room

    def _transferred(self, event: Transferred) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            if self._closed and live.prefill is not None:
                self._came(live.prefill.name, event.instance)
            self.cluster.links.arrive(live, event.size_bytes, event.seconds)
            self._decoding(live)
            if self.queue:
                self._retry()

    def _transfer_failed(self, event: TransferFailed) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        if live.migrating is not None:
            live.migrating = None
            if event.lost:
                self._lose(live, event.reason, event.sent)
        else:
            self._lose_transfer(live, event.reason)
        self._retry()

    def _unreachable(self, event: Unreachable) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        self.cluster.links.arrive(live)
        self._close(event.src, event.dst, event.reason)
        if live.migrating is not None:
            live.migrating = None
        elif event.held:  # somebody else may read it
            self._unassign_decode(live)
            live.stage = LEASED
            self._enqueue(self.handoffs, live)
        else:
            self._lose_transfer(live, event.reason)
        self._retry()

    def _close(self, src: str, dst: str, reason: str) -> None:
        pause_s = self.reach.failed(src, dst, self.cluster.now)
        if pause_s:
            self._actions.append(Notice(f"no KV from {src} to {dst} for the next {pause_s:g} s: {reason}"))

    def _came(self, src: str, dst: str) -> None:
        if self.reach.came(src, dst):
            self._actions.append(Notice(f"KV from {src} reaches {dst} again"))

    def _lost(self, event: Lost) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            self._lose(live, event.reason, event.sent, charged=event.charged)
            self._retry()

    def _finished(self, event: Finished) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        if live.prefill_tokens >= 0:
            self._unassign_prefill(live)
        self._unassign_decode(live)
        if live.stage is not DECODE or live.migrating is not None:  # it ended before it was moved
            self.cluster.links.arrive(live)
        del self.cluster.live[event.request_id]
        del self._tokens[event.request_id]
        if self.queue or self.handoffs:
            self._retry()

    def _failed(self, event: Failed) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None and live.attempt == event.attempt:
            self._abort(live)
            self._end(live, Stage.FAILED, event.reason)
            self._retry()

    def _cancelled(self, event: Cancelled) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is not None:
            self._abort(live)
            self._end(live, Stage.ABORTED, "cancelled by the client")
            self._retry()

    def _retry(self) -> None:
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
        while queue:
            head = queue[0]
            if head.prefill is None and live.get(head.request.id) is head and not self._dispatch(head):
                break
            queue.popleft()

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

    # ------------------------------------------------------------ loss

    def _abort(self, live: LiveRequest) -> None:
        """Take an attempt off every instance that takes part in it, and out of both queues and ledgers."""
        where: list[Instance] = []
        for x in (live.prefill, live.decode, live.migrating):
            if x is not None and x not in where:
                where.append(x)
        self._actions += [Abort(live.request.id, live.attempt, x.name) for x in where if x.state is not InstanceState.GONE]
        self._unassign_prefill(live)
        self._unassign_decode(live)
        self.cluster.links.arrive(live)
        live.prefill = live.migrating = None

    def _lose(self, live: LiveRequest, reason: str, sent: int | None = None, *, charged: bool = True) -> None:
        """This attempt is lost: try again from the start, tokens already sent being part of the prompt, or give up. Where the world does
        not say how many this attempt has `sent`, it is none, or the first one if that came from the prefill instance. Several candidates
        are made anew. Only what is `charged` counts against `max_attempts`."""
        if sent is None:
            sent = int(self.first_token == "prefill" and live.goes_on and live.stage in (LEASED, TRANSFER))
        live.sent_tokens += sent if live.request.best_of == 1 else 0
        self._abort(live)
        live.losses += charged
        if charged and live.losses >= self.limits.max_attempts:
            self._end(live, Stage.FAILED, f"{reason}; gave up after {live.losses} attempts")
            return
        live.attempt += 1  # what the old attempt still says is stale from here on
        live.stage = QUEUED_P
        self._enqueue(self.queue, live)

    def _lose_transfer(self, live: LiveRequest, reason: str) -> None:
        """Lost on the way to a decode instance: this request does not go there again where there is another."""
        live.avoid = live.decode
        self._lose(live, reason)

    def _end(self, live: LiveRequest, stage: Stage, reason: str, *, unfit: bool = False, overload: bool = False) -> None:
        live.stage = stage
        del self.cluster.live[live.request.id]
        del self._tokens[live.request.id]
        self._actions.append(End(live.request.id, stage, reason, unfit, overload))

    # ------------------------------------------------------------ instances

    def _joined(self, event: Joined) -> None:
        spec = event.spec
        known = self.by_name.get(spec.name)
        if known is not None:
            if spec.incarnation <= known.spec.incarnation:
                return
            if known.state is not InstanceState.GONE:
                self._drop(known, {}, f"{spec.name} restarted")
        instance = self.by_name[spec.name] = self.cluster.admit(spec)
        instance.heard_s = self.cluster.now
        if known is None and self.starting:
            self.starting -= 1
        self.all_go_on = self.all_go_on and instance.can(MADE)
        self.cluster.refresh()
        self._retry()

    def _left(self, event: Left) -> None:
        instance = self.by_name.get(event.instance)
        if instance is not None and instance.spec.incarnation == event.incarnation and instance.state is not InstanceState.GONE:
            self._drop(instance, event.sent, f"{instance.name} {'died' if event.died else 'has lost its place'}", charged=event.died)
            self._retry()

    def _drop(self, instance: Instance, sent: dict[int, int], reason: str, *, charged: bool = True) -> None:
        instance.state = InstanceState.GONE
        self.left_s = self.cluster.now
        back_s = self.limits.grace_s if charged else max(self.limits.grace_s, self.limits.suspect_s)
        self.back_by_s = max(self.back_by_s, self.cluster.now + back_s)
        self.all_go_on = all(x.can(MADE) for x in self.cluster.instances if x.state is not InstanceState.GONE)
        self.cluster.refresh()
        self.reach.forget(instance.name)
        self.cluster.index.drop(instance.bit)
        self.cluster.links.forget(instance.name)
        for live in list(self.cluster.live.values()):
            if live.migrating is instance:
                live.migrating = None
                self.cluster.links.arrive(live)
            if live.prefill is instance or live.decode is instance:
                self._lose(live, reason, sent.get(live.request.id), charged=charged)

    def _report(self, event: Report) -> None:
        instance = self.by_name.get(event.instance)
        if instance is None or instance.spec.incarnation != event.incarnation or instance.state is InstanceState.GONE:
            return
        instance.heard_s = max(instance.heard_s, self.cluster.now)  # it may have been left out for a while: see `rested`
        unreported, taken_s = instance.unreported, event.taken_s
        while unreported and unreported[0][0] <= taken_s:
            _, prefill, decode = unreported.popleft()
            instance.since_prefill_tokens -= prefill
            instance.since_decode_tokens -= decode
        instance.hear(self.cluster.completed(event, instance))
        if event.stored:
            self.cluster.index.add(event.stored, instance.bit)
        if event.evicted:
            self.cluster.index.discard(event.evicted, instance.bit)
        if instance.state is InstanceState.SUSPECT:
            instance.state = READY
            self.cluster.refresh()
        if instance.room < inf:
            self._set_room(instance, self._room(instance))
        if instance.busy:
            self._set_busy(instance, not instance.has_place)
        if self.queue or self.handoffs:
            self._retry()

    def _room(self, instance: Instance) -> float:
        """KV tokens that it may be asked for by its report: none where the first who waits does not fit, any where nobody waits, or where
        that one can never be held there."""
        head = self.queue[0] if self.queue else self.handoffs[0] if self.handoffs else None
        if head is None or not self.cluster.capacity.can_decode(head, instance):
            return inf
        free = instance.free_tokens
        fits = free >= head.request.prompt_tokens + head.sent_tokens and instance.report.running < (instance.spec.max_seqs or inf)
        return float(free) if fits else 0.0

    def _registry_away(self, event: RegistryAway) -> None:
        self.registry_away = event.away

    def _suspected(self, event: Suspected) -> None:
        instance = self.by_name.get(event.instance)
        if instance is None or instance.spec.incarnation != event.incarnation:
            return
        if event.lost and instance.state is InstanceState.READY:
            instance.state = InstanceState.LEASE_LOST
        elif not event.lost and instance.state in (InstanceState.LEASE_LOST, InstanceState.SUSPECT):
            instance.state = InstanceState.READY
            self.cluster.refresh()
            self._retry()

    def _switched(self, event: Switched) -> None:
        instance = self.by_name.get(event.instance)
        if instance is not None and instance.spec.incarnation == event.incarnation and instance.state is not InstanceState.GONE:
            instance.role = event.role
            instance.state = InstanceState.READY
            instance.flipped_s = self.cluster.now
            self.cluster.refresh()
            self._retry()

    def _drained(self, event: Drained) -> None:
        instance = self.by_name.get(event.instance)
        if instance is None or instance.spec.incarnation != event.incarnation:
            return
        if event.draining and instance.ready:
            instance.state = InstanceState.DRAINING
            self.cluster.refresh()
        elif not event.draining and instance.state is InstanceState.DRAINING:
            instance.state = READY
            self.cluster.refresh()
            self._retry()

    def _led(self, event: Leads) -> None:
        self.leads = event.leading

    def _migrated(self, event: Migrated) -> None:
        live = self.cluster.live.get(event.request_id)
        if live is None or live.attempt != event.attempt:
            return
        target = self.by_name[event.dst]
        self._came(event.src, event.dst)
        self._unassign_decode(live)
        live.migrating = None
        self.cluster.links.arrive(live, event.size_bytes, event.seconds)
        self._assign_decode(live, target)
        self._retry()

    # ------------------------------------------------------------ time

    def _tick(self, event: Tick) -> None:
        now, cluster, limits = self.cluster.now, self.cluster, self.limits
        if event.late_s > 0.0:
            self._stood_still(event.late_s)
        for live in list(takewhile(lambda live: live.expires_s <= now, cluster.live.values())):  # they are in order of arrival
            stage = live.stage
            self._abort(live)
            self._end(live, Stage.EXPIRED, f"not done within {limits.request_timeout_s:g} s (was in {stage.name})")
        while self.transfers and self.transfers[0][0] <= now:
            due_s, request_id = self.transfers.popleft()
            late = cluster.live.get(request_id)
            if late is not None and late.stage is TRANSFER and late.due_s == due_s:
                if late.prefill is not None and late.decode is not None:
                    self._close(late.prefill.name, late.decode.name, f"nothing came within {limits.transfer_timeout_s:g} s")
                self._lose_transfer(late, f"KV transfer not done within {limits.transfer_timeout_s:g} s")
        for instance in cluster.instances:
            silent_s = now - instance.heard_s
            if instance.state in (InstanceState.READY, InstanceState.LEASE_LOST) and silent_s > limits.lease_s + limits.probe_s:
                instance.state = InstanceState.SUSPECT
                cluster.refresh()
            elif instance.state is InstanceState.SUSPECT and silent_s > limits.lease_s + limits.probe_s + limits.suspect_s:
                instance.heard_s = now
                self._actions.append(Evict(instance.name, instance.spec.incarnation))
        if self.policy.tick_s and now >= self.policy_due_s - 1e-9:
            self.policy_due_s = now + self.policy.tick_s
            self._migrations()
            if self.leads:
                self._resizes()
        self._retry()

    def _stood_still(self, late_s: float) -> None:
        """Nobody could be heard in that time, and no transfer be known to have come."""
        now = self.cluster.now
        for instance in self.cluster.instances:
            instance.heard_s = min(now, instance.heard_s + late_s)
        for due_s, request_id in self.transfers:
            live = self.cluster.live.get(request_id)
            if live is not None and live.due_s == due_s:
                live.due_s = due_s + late_s
        self.transfers = deque((due_s + late_s, request_id) for due_s, request_id in self.transfers)

    def _migrations(self) -> None:
        try:
            wanted = list(self.policy.migrate(self.cluster))
        except (Exception, Endless) as error:
            raise self._blame("migrate", None, error) from error
        for wish in wanted:
            if not _pair_of(wish, int, Instance):
                raise self._blame("migrate", None, f"returned {wish!r}, not a request's id and an instance")
            request_id, target = wish
            live = self.cluster.live.get(request_id)
            if live is None or live.stage is not DECODE or live.migrating is not None or live.decode is None:
                continue
            if not target.ready:
                raise self._blame("migrate", request_id, f"returned {target.name}, which is {target.state}")
            if self.cluster.can_migrate(live, target):
                self.reach.sends(live.decode.name, target.name, self.cluster.now)
                live.migrating = target
                self.cluster.links.moving[live] = live.decode, target, self.cluster.context_tokens(live)
                self._actions.append(Migrate(request_id, live.attempt, live.decode.name, target.name))
            elif live.request.best_of > 1:
                self._notice("migrate: requests with best_of above 1 cannot be moved")
            elif target is not live.decode:
                self._can(MIGRATE, "migrate", live.decode, target)

    def _can(self, what: str, hook: str, *instances: Instance) -> bool:
        """Can each of them do what the policy's hook asks for? Who cannot is named, once."""
        unable = next((x for x in instances if not x.can(what)), None)
        if unable is not None:
            self._notice(f"{hook}: {unable.name} (engine {unable.spec.engine}) cannot {what}")
        return unable is None

    def _notice(self, why: str) -> None:
        text = f"policy {type(self.policy).__name__}.{why}, so nothing is done"
        if text not in self._noticed:
            self._noticed.add(text)
            self._actions.append(Notice(text))

    def _resizes(self) -> None:
        try:
            wanted = list(self.policy.resize(self.cluster))
        except (Exception, Endless) as error:
            raise self._blame("resize", None, error) from error
        for want in wanted:
            if isinstance(want, Scale):
                self._scale(want)
                continue
            if not _pair_of(want, Instance, Role):
                raise self._blame("resize", None, f"returned {want!r}, not an instance and a role, or a Scale")
            instance, role = want
            if not instance.ready:
                raise self._blame("resize", None, f"wants to switch {instance.name}, which is {instance.state}")
            if role is not instance.role and self._can(SWITCH, "resize", instance) and self._role_survives(instance, role):
                instance.state = InstanceState.SWITCHING
                self.cluster.refresh()
                self._actions.append(Switch(instance.name, role))

    def _scale(self, want: Scale) -> None:
        if self.autoscale is None:
            raise self._blame("resize", None, f"asks for {want.count:+d} {want.role} where cluster.autoscale is off")
        least, most = self.autoscale
        size = sum(x.state is not InstanceState.GONE for x in self.cluster.instances) + self.starting
        if want.count > 0:
            count = min(want.count, most - size)
            if count > 0:
                self.starting += count
                self._actions.append(Scale(count, want.role))
            return
        staying = sum(x.state not in (InstanceState.GONE, InstanceState.DRAINING) for x in self.cluster.instances)
        leaving = [x for x in self.cluster.instances if x.ready and x.role is want.role][want.count :]
        for instance in leaving[::-1][: max(0, staying - least)]:
            if self._can(DRAIN, "resize", instance) and self._role_survives(instance, None):
                instance.state = InstanceState.DRAINING
                self.cluster.refresh()
                self._actions.append(Stop(instance.name))

    def _role_survives(self, instance: Instance, role: Role | None) -> bool:
        """Would both phases have a ready instance once this one has changed its role (or gone, with None)? Until then another must be
        ready, and serves both where nobody else does."""
        others = [x.role for x in self.cluster.instances if x.ready and x is not instance]
        after = others if role is None else [*others, role]
        prefills, decodes = any(r.prefills for r in after), any(r.decodes for r in after)
        return bool(others) and (prefills or not instance.role.prefills) and (decodes or not instance.role.decodes)

    def _blame(self, hook: str, request_id: int | None, error: BaseException | str) -> UsageError:
        who, what = blamed(self.policy, hook, error)
        request = "" if request_id is None else f" for request {request_id}"
        return UsageError(f"{who}{request} at t={self.cluster.now:.6f} s {what}")

    def check(self) -> None:
        """Invariant 3: each instance's ledger is the sum over the live requests assigned to it."""
        live = self.cluster.live.values()
        for x in self.cluster.instances:
            prefill = [r for r in live if r.prefill is x and r.prefill_tokens >= 0]
            decode = [r for r in live if r.decode is x]
            assert (x.prefill_requests, x.prefill_tokens) == (len(prefill), sum(r.prefill_tokens for r in prefill)), (
                f"{x.name}: prefill ledger"
            )
            assert (x.decode_requests, x.decode_tokens) == (len(decode), sum(r.decode_tokens for r in decode)), f"{x.name}: decode ledger"
            assert len(x.decoding) == x.decode_requests, f"{x.name}: decoding"
        moving = {r for r in live if r.stage is TRANSFER or r.migrating is not None}
        assert moving == set(self.cluster.links.moving), "KV on its way"


def _pair_of(answer: object, first: type, second: type) -> bool:
    """A hook may return anything."""
    return isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[0], first) and isinstance(answer[1], second)
