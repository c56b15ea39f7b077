"""The legs of a request: asks instances for them, one task each, and says what came of them.

alone      one leg at one instance
prefill    the prompt; its KV waits under a lease, or goes where it was reserved
decode     from KV that waits at a prefill instance (the same one: no transfer)
reserve    the same, begun before prefill: takes blocks, lets the prefill leg go, waits
target     a migration's destination, while the decode leg goes on

A leg that has ended leaves `Live.legs` before its end is told, so that what the router then says meets nothing stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from pdlab.core.types import (
    LAYERS,
    MADE,
    PUSH,
    Failed,
    Fetched,
    Lost,
    Migrated,
    PrefillDone,
    Refused,
    Stage,
    TransferFailed,
    Transferred,
    Unreachable,
)
from pdlab.experiment.deployment import TransferSpec
from pdlab.real.api.legs import MOST_SECONDS
from pdlab.real.engine.messages import Sampling
from pdlab.real.net.http import Broken, Unheard
from pdlab.real.net.wire import Continue, Extra, FetchedFrom, FetchFrom, KvParams, MigrateFrom, PushTo, StreamEvent
from pdlab.real.router.instances import Incarnation, Instances
from pdlab.real.router.live import HeldKv, Leg, Live
from pdlab.real.router.live_requests import LiveRequests, Now, Tell
from pdlab.real.router.metrics import HANDOFF, MIGRATION, PREFIX, Tally
from pdlab.real.router.remote import Busy, Fenced, InstanceFull, LegAsk, LegNews, LegTokens, TransferTrouble, Unfit
from pdlab.real.router.tasks import Tasks

if TYPE_CHECKING:
    from pdlab.real.api.traces import Traces

Way = Callable[[], Coroutine[Any, Any, None]]


class Legs:
    """`name` begins the names of all. A transfer that takes longer than `transfer_timeout_s`, from hand-off on, is given up by the router:
    instances are told `request_timeout_s`, so that they do not before, and what is reserved may wait for its prompt."""

    def __init__(
        self,
        tell: Tell,
        now: Now,
        requests: LiveRequests,
        instances: Instances,
        tasks: Tasks,
        tally: Tally,
        transfer: TransferSpec,
        *,
        transfer_timeout_s: float,
        request_timeout_s: float,
        name: str,
        traces: Traces | None = None,
    ) -> None:
        self.transfer, self.name, self._traces = transfer, name, traces
        self._tell, self._now, self._requests, self._instances, self._tasks, self._tally = tell, now, requests, instances, tasks, tally
        self._transfer_timeout_s, self._request_timeout_s = transfer_timeout_s, request_timeout_s

    # ------------------------------------------------------------ what the router asks for

    def dispatch(self, live: Live, prefill: Incarnation, decode: Incarnation | None) -> None:
        if decode is prefill:
            self._dispatched(live, prefill)
            self._alone(live, prefill)
        elif decode is None:
            self._prefill(live, prefill)
        else:
            leg = self._leg(live, "reserve", decode)
            leg.through = relay_of(self.transfer, prefill, decode)
            extra = Extra(made=live.given, reserve=True, events=True, deadline_s=told_s(self._request_timeout_s))
            params = KvParams(do_remote_prefill=True, pdlab=extra)
            self._run(live, leg, partial(self._read, live, leg, params=params, prefill=prefill))

    def hand_off(self, live: Live, src: Incarnation, dst: Incarnation) -> None:
        """Decode at `dst` from the KV that waits at `src`."""
        answer, line = live.prefilled, live.line
        assert answer is not None
        line.handed_off(self._now(), dst.name)
        if dst is src and (live.given or not dst.can(MADE)):
            self._alone(live, dst)
            self._requests.release(live)
            return
        if dst is src and live.single and not live.made:
            live.first(self._now(), None)  # that token is in the KV already
        leg = self._leg(live, "decode", dst)
        leg.through = relay_of(self.transfer, src, dst)
        if not dst.can(MADE) or answer.params is None:
            self._run(live, leg, partial(self._read, live, leg, raw=answer.raw_params))
            return
        leg.next[0] = len(live.made)
        theirs, made = answer.params.pdlab or Extra(), live.given + live.made
        extra = msgspec.structs.replace(theirs, made=made, events=True, deadline_s=told_s(self._request_timeout_s))
        self._run(live, leg, partial(self._read, live, leg, params=msgspec.structs.replace(answer.params, pdlab=extra)))

    def migrate(self, live: Live, src: Incarnation, dst: Incarnation) -> None:
        source = live.legs.get("decode")
        if source is None or source.member is not src:
            self._tell(TransferFailed(live.request.id, live.attempt, src.name, dst.name, "the request does not run there any more"))
            return
        leg = self._leg(live, "target", dst)
        extra = Extra(migrate=MigrateFrom(src.spec.url, source.name), events=True)
        self._run(live, leg, partial(self._read, live, leg, params=KvParams(do_remote_prefill=True, pdlab=extra)))

    def abort(self, live: Live, instance: str) -> None:
        """Nothing of the attempt at that instance is wanted any more."""
        live.prefilled = None
        for leg in list(live.legs.values()):
            if leg.member.name == instance:
                self._count_late(live, leg)
                live.drop(leg)
                leg.cancel()
        if live.held is not None and live.held.member.name == instance:
            self._requests.release(live)

    # ------------------------------------------------------------ KV that does not come

    def _count_late(self, live: Live, leg: Leg) -> None:
        """The leg is given up. Because its KV did not come in time?"""
        late = self._now() - live.line.handoff_s >= self._transfer_timeout_s
        waits = leg.kind in ("decode", "reserve") and not leg.landed and live.line.stage is Stage.TRANSFER
        if waits and late and leg.member.name != live.line.prefill_instance:
            self._tally.transfer_failed(HANDOFF, "deadline")

    async def _unreached(self, live: Live, leg: Leg, trouble: TransferTrouble) -> bool:
        """KV did not come to a leg that waits for it. Is that for want of a way? A lease that has ended says nothing of it."""
        src, held = self._instances.members.get(live.line.prefill_instance or ""), live.held
        if src is None or src is leg.member or src.gone or live.line.stage is not Stage.TRANSFER:
            return False
        if held is not None and not await src.remote.renew(held.lease):
            return leg.over
        if not leg.over:
            live.drop(leg)
            live.line.refused()
            here = live.held is not None
            self._tell(Unreachable(live.request.id, live.attempt, src.name, leg.member.name, str(trouble), here))
        return True

    # ------------------------------------------------------------ legs

    def _alone(self, live: Live, member: Incarnation) -> None:
        leg = self._leg(live, "alone", member)
        params = None
        if member.can(MADE):
            leg.fetch = self._fetch(live, leg)
            params = KvParams(pdlab=Extra(events=True, fetch=leg.fetch))
        if live.given:
            params = KvParams(do_remote_prefill=True, pdlab=Extra(made=live.given))
        self._run(live, leg, partial(self._read, live, leg, params=params))

    def _leg(self, live: Live, kind: str, member: Incarnation) -> Leg:
        place = {"prefill": "prefill", "target": "target"}.get(kind, "decode")
        live.named += 1
        name = f"{self.name}-{live.request.id}-{live.attempt}-{live.named}"
        leg = live.legs[place] = Leg(kind, name, member, [0] * live.sampling.best_of)
        if place == "decode":
            live.line.assigned(member.name)
        return leg

    def _run(self, live: Live, leg: Leg, way: Way) -> None:
        if self._traces is not None and live.trace is not None:
            spec = leg.member.spec
            span = leg.span = self._traces.leg(live.trace, leg.kind, leg.name, live.attempt, spec.name, str(spec.role))
            leg.task = self._tasks.spawn(self._guarded(live, leg, way))
            leg.task.add_done_callback(lambda _: span.end())
            return
        leg.task = self._tasks.spawn(self._guarded(live, leg, way))

    async def _guarded(self, live: Live, leg: Leg, way: Way) -> None:
        try:
            await way()
        except (InstanceFull, Unfit, Broken, TransferTrouble) as trouble:
            if leg.span is not None:
                leg.span.fail(str(trouble))
            if not leg.over:
                await self._trouble(live, leg, trouble)
        except Exception as error:
            if not leg.over:
                live.drop(leg)
                reason = f"{type(error).__name__}: {error}"
                self._tell(Failed(live.request.id, live.attempt, leg.member.name, reason))
            raise

    def _ask(
        self, live: Live, leg: Leg, sampling: Sampling | None = None, params: KvParams | None = None, raw: bytes | None = None
    ) -> LegAsk:
        request = live.request
        tokens, own = live.ask()
        sampling = sampling or own
        if leg.kind == "prefill" and live.given:
            tokens = tokens + live.given[:-1]  # the last one's KV is computed by who decodes
        if sampling.prompt_logprobs is not None and (leg.kind not in ("alone", "prefill") or live.delivered):
            sampling = msgspec.structs.replace(
                sampling, prompt_logprobs=None
            )  # they come from who computes the prompt, with its first token
        aims = request.ttft_slo_s, request.tpot_slo_s, max(0.0, self._now() - request.arrival_s)
        through = leg.through.spec.url if leg.through is not None else ""
        trace = leg.span.carrier if leg.span is not None else None
        priority, hashes, offline = request.priority, request.hashes, request.offline
        return LegAsk(leg.name, request.id, live.attempt, tokens, sampling, priority, hashes, params, raw, *aims, through, trace, offline)

    def _dispatched(self, live: Live, prefill: Incarnation) -> None:
        live.line.dispatched(self._now(), prefill.name)

    # ------------------------------------------------------------ prefill

    def _prefill(self, live: Live, member: Incarnation, *, reserved: Leg | None = None, push: PushTo | None = None) -> None:
        """Compute the prompt. `reserved` waits for it, the KV being pushed, or pulled by it."""
        self._dispatched(live, member)
        leg = self._leg(live, "prefill", member)
        self._run(live, leg, partial(self._prefilling, live, leg, reserved, push))

    async def _prefilling(self, live: Live, leg: Leg, reserved: Leg | None, push: PushTo | None) -> None:
        leg.fetch = self._fetch(live, leg)
        extra = Extra(push=push, fetch=leg.fetch) if push is not None or leg.fetch is not None else None
        params = KvParams(do_remote_decode=True, pdlab=extra)
        sampling = live.ask()[1]
        dropped = not live.single or bool(live.given)
        if dropped:  # its token must not end the request
            sampling = msgspec.structs.replace(sampling, best_of=1, ignore_eos=True, stop_token_ids=(), structured=None)
        answer = await leg.member.remote.prefill(self._ask(live, leg, sampling, params))
        if leg.over:
            return
        live.prefilled = answer
        if answer.scores is not None:
            live.scores = answer.scores
        self._prefilled(live, answer.queue_s, answer.cached_tokens)
        if push is None and answer.params is not None and answer.params.remote_request_id:
            live.held = HeldKv(leg.member, answer.params.remote_request_id)
        stopped = answer.finish == "stop"
        if not dropped and (stopped or sampling.max_tokens == 1):
            live.first(self._now(), "stop" if stopped else "length")
            self._requests.finish(live, leg)
            return
        if push is None and answer.raw_params is None:
            raise Broken("it answered without kv_transfer_params")
        if self.transfer.first_token == "prefill" and live.goes_on and live.single and not live.given:
            live.first(self._now(), None)
        live.drop(leg)
        live.line.prefilled()
        leg.fetched = answer.fetched or leg.fetched
        self._computed(live, leg, answer.cached_tokens)
        if live.prefilled is not answer:
            return  # it was told of something else meanwhile
        if reserved is not None:
            await self._proceed(live, reserved, answer.params if push is None else None)

    def _fetch(self, live: Live, leg: Leg) -> FetchFrom | None:
        """Where the leg is to read a prefix first."""
        action, live.fetch = live.fetch, None
        if action is None or action.attempt != live.attempt or action.instance != leg.member.name:
            return None
        holder = self._instances.members.get(action.holder)
        if holder is None or not holder.spec.url:
            return None
        return FetchFrom(holder.spec.url, action.tokens, told_s(self._transfer_timeout_s), holder.name)

    def _computed(self, live: Live, leg: Leg, cached_tokens: int) -> None:
        """Its prompt is, and before that a prefix was read, where one was to be."""
        if leg.fetch is not None:
            told = leg.fetched or FetchedFrom()
            if told.bytes:
                self._tally.transferred(PREFIX, told.bytes, told.seconds)
            names = leg.member.name, leg.fetch.holder
            self._tell(Fetched(live.request.id, live.attempt, *names, told.tokens, told.bytes, told.seconds, told.unreachable))
        self._tell(PrefillDone(live.request.id, live.attempt, leg.member.name, cached_tokens))

    def _prefilled(self, live: Live, queue_s: float, cached_tokens: int) -> None:
        live.line.prefill_started(live.line.dispatched_s + queue_s, cached_tokens)
        self._tally.prefilled(live.request.prompt_tokens, cached_tokens)

    async def _proceed(self, live: Live, leg: Leg, pull: KvParams | None) -> None:
        live.line.handed_off(self._now(), leg.member.name)
        leg.next[0] = len(live.made)
        try:
            await leg.member.remote.proceed(Continue(leg.name, live.given + live.made, pull))
        except Broken as broken:
            if not leg.over:
                await self._trouble(live, leg, broken)
                leg.cancel()  # its stream may not know

    # ------------------------------------------------------------ streams

    async def _read(
        self, live: Live, leg: Leg, *, params: KvParams | None = None, raw: bytes | None = None, prefill: Incarnation | None = None
    ) -> None:
        """A decode leg to its end. `prefill`: whom to ask for the prompt when blocks are reserved."""
        await leg.member.remote.decode(self._ask(live, leg, None, params, raw), partial(self._hear, live, leg, prefill))
        if not leg.over and not leg.moved and leg.ended < len(live.candidates):
            raise Broken("its stream ended early")

    def _hear(self, live: Live, leg: Leg, prefill: Incarnation | None, news: LegNews) -> None:
        if leg.over:
            return  # it may end in order
        if isinstance(news, LegTokens):
            self._tokens(live, leg, news)
        elif news.event == "reserved" and prefill is not None and not leg.reserved:
            leg.reserved = True
            self._prefill(live, prefill, reserved=leg, push=push_to(self.transfer, prefill, news))
        elif news.event == "transferred" and not leg.landed:
            self._landed(live, leg, news)
        elif news.event == "prefilled" and leg.kind == "alone" and live.prefilled is None:
            self._prefilled(live, news.queue_s, news.cached_tokens)
            leg.fetched = news.fetched or leg.fetched
        elif news.event == "moved":
            self._moved(live, leg)

    def _tokens(self, live: Live, leg: Leg, news: LegTokens) -> None:
        began = not leg.landed
        if began and leg.kind == "alone":
            leg.landed = True
            if math.isnan(live.line.prefill_start_s):
                self._prefilled(live, 0.0, 0)  # nobody says
        elif began:
            self._landed(live, leg, StreamEvent("transferred"))  # an instance without events
            if leg.over:
                return
        leg.ended += news.finish is not None
        live.take(leg, news, self._now())
        target = live.legs.get("target")
        if target is not None and target.landed and leg is not target and live.sent >= target.goes_on_from:
            self._commit(live, leg, target)
        elif live.finished:
            self._requests.finish(live, leg)
        elif began and leg.kind == "alone":
            live.line.decode_began(self._now())
            if live.prefilled is None:
                self._computed(live, leg, live.line.cached_tokens)

    def _landed(self, live: Live, leg: Leg, news: StreamEvent) -> None:
        """The KV is where the leg decodes."""
        leg.landed = True
        now, request = self._now(), live.request
        if leg.kind == "target":
            live.line.copied(news.bytes)
            self._tally.transferred(MIGRATION, news.bytes, news.seconds)
            leg.bytes, leg.seconds = news.bytes, news.seconds
            self._trace_transfer(live, 0.0, news.seconds, news.bytes, live.line.decode_instance or "", leg)
            leg.next[0] = leg.goes_on_from = news.made - len(live.given)
            source = live.legs["decode"]
            if live.sent >= leg.goes_on_from:
                self._commit(live, source, leg)
            elif source.moved:
                raise Broken("its source kept tokens back")
            return
        held, live.held = live.held, None  # it was read
        if held is not None and held.member is leg.member:
            live.line.decode_began(now)  # the router knows
            return
        line = live.line
        end_s = max(now - news.waited_s, line.dispatched_s)
        line.transfer_began(max(end_s - news.seconds, line.dispatched_s) if news.seconds > 0.0 else line.handoff_s)
        line.transferred(end_s, news.bytes)
        line.decode_began(now)
        self._tally.transferred(HANDOFF, news.bytes, end_s - line.transfer_start_s)
        self._trace_transfer(live, now - end_s, end_s - line.transfer_start_s, news.bytes, line.prefill_instance or "", leg)
        paced = leg.reserved and self.transfer.mode == "push" and self.transfer.granularity != "request"
        seconds = 0.0 if paced else news.seconds
        self._tell(Transferred(request.id, live.attempt, leg.member.name, news.bytes, seconds))

    def _trace_transfer(self, live: Live, ago_s: float, seconds: float, size: int, src: str, leg: Leg) -> None:
        if self._traces is not None and live.trace is not None:
            self._traces.transfer(live.trace, ago_s, seconds, size, src, leg.member.name)

    # ------------------------------------------------------------ migration

    def _moved(self, live: Live, leg: Leg) -> None:
        """The source has given the request away, and said all its tokens."""
        leg.moved = True
        target = live.legs.get("target")
        if target is None or target.landed:
            raise Broken("it was moved away")

    def _commit(self, live: Live, source: Leg, target: Leg) -> None:
        live.drop(source)
        if not source.moved and source.task is not None:
            source.task.cancel()
        live.legs["decode"] = live.legs.pop("target")
        target.kind = "decode"
        live.line.migrated(target.member.name)
        self._tally.migrations += 1
        names = source.member.name, target.member.name
        self._tell(Migrated(live.request.id, live.attempt, *names, target.bytes, target.seconds))
        if live.finished and not target.over:
            self._requests.finish(live, target)

    # ------------------------------------------------------------ trouble

    async def _trouble(self, live: Live, leg: Leg, trouble: InstanceFull | Unfit | Broken | TransferTrouble) -> None:
        request_id, attempt, name = live.request.id, live.attempt, leg.member.name
        reason = str(trouble) or type(trouble).__name__
        waits = leg.kind in ("decode", "reserve", "target") and not leg.landed
        if isinstance(trouble, Fenced):
            self._instances.gone(leg.member, died=False)
            return
        if isinstance(trouble, Broken) and not await self._instances.lives(leg.member):
            if not leg.over:
                self._instances.unreachable(leg.member)
            return
        if leg.over:
            return
        if waits and isinstance(trouble, TransferTrouble):
            self._tally.transfer_failed(MIGRATION if leg.kind == "target" else HANDOFF, trouble.cause)
        if leg.kind == "target":
            self._target_trouble(live, leg, trouble, reason)
        elif isinstance(trouble, Unfit):
            live.drop(leg)
            live.unfit = True
            self._tell(Failed(request_id, attempt, name, reason))
        elif isinstance(trouble, InstanceFull) and not leg.reserved and (waits or leg.kind in ("prefill", "alone")) and not leg.landed:
            live.drop(leg)
            live.line.refused()
            self._tell(Refused(request_id, attempt, name))
        elif isinstance(trouble, (InstanceFull, TransferTrouble)) and waits:
            if isinstance(trouble, InstanceFull):
                self._tally.transfer_failed(HANDOFF, "full")
            if isinstance(trouble, TransferTrouble) and await self._unreached(live, leg, trouble):
                return
            live.drop(leg)
            self._tell(TransferFailed(request_id, attempt, live.line.prefill_instance or "", name, reason))
        else:
            live.complete()
            if live.finished:
                self._requests.finish(live, leg)
                return
            live.drop(leg)
            charged = not isinstance(trouble, (Unheard, Busy))
            if leg.through is not None and isinstance(trouble, Broken) and not await self._instances.lives(leg.through):
                self._instances.unreachable(leg.through)  # it broke off there
                charged = False
            self._tell(Lost(request_id, attempt, name, f"{name}: {reason}", live.kept, charged))

    def _target_trouble(self, live: Live, leg: Leg, trouble: Exception, reason: str) -> None:
        source = live.legs["decode"]
        lost = leg.landed or source.moved
        live.drop(leg)
        if isinstance(trouble, InstanceFull) and not lost:
            self._tell(Refused(live.request.id, live.attempt, leg.member.name))
        else:
            src, dst = source.member.name, leg.member.name
            if isinstance(trouble, TransferTrouble) and trouble.cause == "unreachable" and not lost:
                self._tell(Unreachable(live.request.id, live.attempt, src, dst, reason, held=True))
            else:
                self._tell(TransferFailed(live.request.id, live.attempt, src, dst, reason, lost, live.kept))


def push_to(transfer: TransferSpec, prefill: Incarnation, to: StreamEvent) -> PushTo | None:
    """Where `prefill` is to write; None: the KV is pulled."""
    if transfer.mode != "push" or not prefill.can(PUSH):
        return None
    granularity = "chunk" if transfer.granularity == "layer" and not prefill.can(LAYERS) else transfer.granularity
    return PushTo(to.descriptor, to.ticket, to.block_ids, to.cached_tokens, granularity, told_s(transfer.timeout_s))


def relay_of(transfer: TransferSpec, prefill: Incarnation, decode: Incarnation) -> Incarnation | None:
    """Who passes on what `decode` answers: `prefill`, if it is wanted and can; None: it comes straight."""
    wanted = transfer.response_path == "via_prefill" and decode is not prefill
    return prefill if wanted and prefill.spec.engine == decode.spec.engine == "pdlab" and prefill.spec.url else None


def told_s(deadline_s: float) -> float:
    """As instances take it."""
    return min(deadline_s, MOST_SECONDS)
