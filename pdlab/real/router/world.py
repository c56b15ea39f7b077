"""The live world: asyncio is the clock. It turns what instances and clients say into events for the router, and performs the actions it
answers with.

It translates; it decides nothing. Its parts know each other one way only: `LiveRequests` are the requests and how they end, `Instances` who
takes part, `Legs` asks these on behalf of those. `Live` is a request, `Timelines` what happened to each.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from pdlab.core.router import Router
from pdlab.core.teller import Teller
from pdlab.core.types import (
    Abort,
    Action,
    AnyEvent,
    Arrived,
    Dispatch,
    Drained,
    End,
    Evict,
    Fetch,
    Handoff,
    InstanceSpec,
    Joined,
    Left,
    Lost,
    Migrate,
    Notice,
    RegistryAway,
    Report,
    Request,
    Scale,
    Stage,
    Stop,
    Suspected,
    Switch,
    Switched,
    Tick,
    UsageError,
)
from pdlab.experiment.deployment import TransferSpec
from pdlab.real.engine.messages import Sampling
from pdlab.real.net.wire import Carrier
from pdlab.real.router.instances import Instances, Start
from pdlab.real.router.legs import Legs
from pdlab.real.router.live import Deliver, Live
from pdlab.real.router.live_requests import LiveRequests
from pdlab.real.router.metrics import Tally
from pdlab.real.router.onlooker import Onlooker
from pdlab.real.router.remote import Remote
from pdlab.real.router.tasks import Tasks
from pdlab.real.router.timelines import Timelines
from pdlab.replay.log import EventLog

if TYPE_CHECKING:
    from pdlab.real.api.traces import Traces

logger = logging.getLogger(__name__)
RENEW_S = 5.0  # of 30: a router may stand still for 20 s
MEMBER_EVENTS: frozenset[type] = frozenset({Joined, Left, Report, Switched, Drained, Suspected, RegistryAway, Tick})


class LiveWorld:
    """`connect` makes the Remote of an instance that has joined. `now` is seconds since the router's start, `unix` what instances stamp
    reports with. `start` brings up one more instance of a role, where the experiment autoscales. `name` begins the names of all legs, so
    it must be this router's own. With `traceback` a policy's mistake is logged with its own. Use it inside a running loop, between `open`
    and `close`. `traces`: where spans of the legs go."""

    def __init__(
        self,
        router: Router,
        connect: Callable[[InstanceSpec], Remote],
        *,
        transfer: TransferSpec,
        now: Callable[[], float],
        unix: Callable[[], float] = time.time,
        log: EventLog | None = None,
        seed: int = 0,
        start: Start | None = None,
        name: str = "",
        traceback: bool = False,
        traces: Traces | None = None,
    ) -> None:
        if router.autoscale is not None and start is None:
            raise UsageError("cluster.autoscale is on, but nobody here can start instances: write autoscale: {enabled: false}")
        self.router, self.traceback = router, traceback
        self.lines, self.tally, self.onlooker = Timelines(), Tally(), Onlooker(self.now)
        self._tasks = Tasks()
        self.requests = LiveRequests(self.tell, self.now, self.lines, self.tally, self._tasks)
        self.instances = Instances(
            self.tell,
            self.now,
            self._tasks,
            self.lines.book,
            connect=connect,
            heard_s=self._heard_s,
            lost=self.requests.without,
            lease_s=router.limits.lease_s,
            unix=unix,
            start=start,
        )
        self.on_members: Callable[[], None] | None = None  # called when they may have changed
        self._now = now
        self._latest_s = 0.0
        self._rng = random.Random(seed)
        self._legs = Legs(
            self.tell,
            self.now,
            self.requests,
            self.instances,
            self._tasks,
            self.tally,
            transfer,
            transfer_timeout_s=router.limits.transfer_timeout_s,
            request_timeout_s=router.limits.request_timeout_s,
            name=name or uuid.uuid4().hex[:8],
            traces=traces,
        )
        self._submitted = 0
        self._told_blind = False  # that the policy asks for predictions which nobody can make
        perform: dict[type, Callable[[Any], None]] = {
            Dispatch: self._dispatch,
            Fetch: self._fetch,
            Handoff: self._handoff,
            Migrate: self._migrate,
            Abort: self._abort,
            End: self._end,
            Switch: self.instances.switch,
            Stop: self.instances.stop,
            Evict: self.instances.evict,
            Scale: self.instances.scale,
            Notice: lambda action: logger.warning("%s", action.text),
        }
        self.teller = Teller(router, perform, log)
        self.teller.on_event = self._event

    def open(self) -> None:
        """Begin to tick."""
        self._tasks.spawn(self._ticking())
        self._tasks.spawn(self._renewing())

    async def close(self) -> None:
        """End every task, hang up; who still waits for tokens gets no more."""
        await self._tasks.close()
        self.instances.close()

    def now(self) -> float:
        """Seconds, never going back."""
        self._latest_s = max(self._latest_s, self._now())
        return self._latest_s

    @property
    def down(self) -> str | None:
        """Why nothing is served any more: a policy's mistake, or ours."""
        return self.teller.down

    def tell(self, event: AnyEvent) -> None:
        """Give an event to the router, and perform what it answers, in order; within another event's actions, after these."""
        try:
            self.teller.tell(event, self.now())
        except UsageError as error:
            logger.error("%s", error, exc_info=error if self.traceback else None)
            self._fail()
        except Exception:
            self._fail()
            raise

    def _event(self, event: AnyEvent, actions: list[Action]) -> None:
        self.tally.heard(event, actions)
        self.onlooker.heard(event, actions)
        if self.router.cluster.blind and not self._told_blind:
            self._told_blind = True
            logger.warning("%s", self.router.blindness)
        if self.on_members is not None and event.__class__ in MEMBER_EVENTS:
            self.on_members()

    def _fail(self) -> None:
        """Nothing is told any more: every request ends, nothing new is taken."""
        assert self.down is not None
        for live in list(self.requests.by_id.values()):
            self.requests.end(live, Stage.FAILED, self.down)
        if self.on_members is not None:
            self.on_members()

    def check(self) -> None:
        """The router's invariants; and that nothing is left of any request when none is live."""
        self.router.check()
        live_by_id = self.requests.by_id
        assert live_by_id.keys() == self.router.cluster.live.keys() or self.down is not None, "the router and its world know other requests"
        for live in live_by_id.values():
            assert all(not leg.over for leg in live.legs.values()), f"request {live.request.id} keeps a leg that is over"
            for place, leg in live.legs.items():
                assert self.instances.members.get(leg.member.name) is leg.member, (
                    f"request {live.request.id}: {place} on {leg.member.name}, which is gone"
                )

    def _heard_s(self, spec: InstanceSpec) -> float:
        """When the router last heard of that incarnation."""
        known = self.router.by_name.get(spec.name)
        return known.heard_s if known is not None and known.spec.incarnation == spec.incarnation else -math.inf

    # ------------------------------------------------------------ clients

    def submit(
        self,
        tokens: list[int],
        sampling: Sampling,
        deliver: Deliver,
        *,
        hashes: tuple[int, ...] = (),
        priority: int = 0,
        ttft_slo_s: float | None = None,
        tpot_slo_s: float | None = None,
        session: str = "",
        tenant: str = "",
        offline: bool = False,
        trace: Carrier | None = None,
    ) -> int:
        """A client's request; returns its id. `deliver` gets each candidate's tokens in order, each index once, the last with `finish`;
        where the request does not succeed, an `Ended`. It may be called before this returns."""
        request_id, now = self._submitted, self.now()
        self._submitted += 1
        if sampling.temperature > 0 and sampling.seed is None:  # every leg and attempt draws alike
            sampling = msgspec.structs.replace(sampling, seed=self._rng.getrandbits(31))
        best_of = sampling.best_of
        request = Request(
            request_id, now, len(tokens), hashes, priority, ttft_slo_s, tpot_slo_s, best_of, best_of, session, tenant, offline
        )
        live = self.requests.begin(request, tokens, sampling, deliver)
        live.trace = trace
        if self.down is not None:
            self.requests.end(live, Stage.FAILED, self.down)
        else:
            self.tell(Arrived(request, sampling.max_tokens))
        return request_id

    def cancel(self, request_id: int, candidate: int = -1) -> None:
        """As `LiveRequests.cancel`."""
        self.requests.cancel(request_id, candidate)

    def timeline(self, request_id: int) -> dict[str, object]:
        """When what happened to a request, under the names of `records.FIELDS`; empty where it ended long ago."""
        return self.lines.of(request_id)

    # ------------------------------------------------------------ actions

    def _fetch(self, action: Fetch) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is not None:
            live.fetch = action

    def _dispatch(self, action: Dispatch) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is None:
            return  # its end is about to be told
        live.begin(action.attempt, goes_on=action.goes_on)
        decode = None if action.decode is None else self.instances.members[action.decode]
        self._legs.dispatch(live, self.instances.members[action.instance], decode)

    def _handoff(self, action: Handoff) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is not None:
            self._legs.hand_off(live, self.instances.members[action.src], self.instances.members[action.dst])

    def _migrate(self, action: Migrate) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is not None and live.attempt == action.attempt:
            self._legs.migrate(live, self.instances.members[action.src], self.instances.members[action.dst])

    def _abort(self, action: Abort) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is not None and live.attempt == action.attempt:
            self._legs.abort(live, action.instance)

    def _end(self, action: End) -> None:
        live = self.requests.by_id.get(action.request_id)
        if live is not None:
            live.unfit, live.overload = live.unfit or action.unfit, action.overload
            self.requests.end(live, action.stage, action.reason)

    # ------------------------------------------------------------ time

    async def _ticking(self) -> None:
        due_s = self.now()
        while True:
            due_s += self.router.tick_s
            await asyncio.sleep(max(0.0, due_s - self.now()))
            late_s = self.now() - due_s
            if late_s > self.router.tick_s:  # this process stood still, or was too busy to look
                due_s += late_s
                self.tell(Tick(late_s))
            else:
                self.tell(Tick())

    async def _renewing(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await asyncio.gather(*(self._renew(live) for live in list(self.requests.by_id.values()) if live.held is not None))

    async def _renew(self, live: Live) -> None:
        """A lease that has ended unread takes the attempt with it."""
        held, attempt = live.held, live.attempt
        if held is None or await held.member.remote.renew(held.lease) or live.held is not held or "decode" in live.legs:
            return
        if not await self.instances.lives(held.member):
            self.instances.unreachable(held.member)
        elif live.held is held and "decode" not in live.legs:
            live.held = None
            self.tell(Lost(live.request.id, attempt, held.member.name, f"{held.member.name}: the lease of its KV has ended", live.kept))
