"""Instances in process: the real worker, a cost model in place of the accelerator, the simulator's network in place of a network, all
on a VirtualLoop. They speak the `Remote` protocol, and can be killed, stalled, silenced.

A `Rack` is a cluster of them. The token at place k of a request's text is `word(request_id, k)`, whoever makes it and however often, so
that a client can tell a wrong one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import simpy

from pdlab.core.batch import Batch
from pdlab.core.instance_spec import Placed, instance_spec
from pdlab.core.scheduler import NOTHING
from pdlab.core.sequence import Sequence
from pdlab.core.staging import Staging
from pdlab.core.types import CAPABILITIES, InstanceSpec, Report, Role, Switched
from pdlab.core.worker import LEASE_S, Worker
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.policies import load as load_policy
from pdlab.real.api.legs import seconds
from pdlab.real.engine.messages import Ready, Sampling, Tokens
from pdlab.real.instance.member import measured_of
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import Continue, Extra, FetchedFrom, KvParams, PushTo, StreamEvent
from pdlab.real.registry.records import InstanceRecord, encode, read_instance, read_report
from pdlab.real.router.remote import Hear, InstanceFull, LegAsk, LegNews, LegTokens, Prefilled, TransferTrouble, Unfit
from pdlab.real.router.world import LiveWorld
from pdlab.replay.log import EventLog, head_of
from pdlab.sim.link import Network
from pdlab.sim.path import Transfer
from pdlab.sim.plans import InstancePlan, plans
from pdlab.sim.topology import Endpoint
from tests.support.virtual import VirtualLoop, run

TIMEOUT_S = 3.0  # of a transfer
PULL: dict[str, Any] = {"timeout_s": TIMEOUT_S}
RESERVE = {"mode": "pull", "reserve": "before_prefill", "timeout_s": TIMEOUT_S}
PUSH = {"mode": "push", "granularity": "request", "reserve": "before_prefill", "timeout_s": TIMEOUT_S}
DECODE_FIRST = {"first_token": "decode", "timeout_s": TIMEOUT_S}
TRANSFERS = pytest.mark.parametrize(
    "transfer", [PULL, RESERVE, PUSH, DECODE_FIRST], ids=["pull", "reserved", "push", "decode samples first"]
)


def word(request_id: int, place: int) -> int:
    return (request_id * 7919 + place * 31) % 50021


class Wire:
    """`pdlab.sim.link.Network`, its clock following the loop's."""

    def __init__(self, loop: VirtualLoop, latency_s: float) -> None:
        self.loop, self.env = loop, simpy.Environment()
        self.network = Network(self.env, latency_s=latency_s)
        self._timer: asyncio.TimerHandle | None = None

    def send(self, src: str, dst: str, size: float, done: Callable[[], None], delay_s: float = 0.0) -> Transfer:
        self._catch_up()
        transfer = self.network.transfer(src, dst, size, lambda _: done(), delay_s=delay_s)
        self._await_next()
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        self._catch_up()
        self.network.cancel(transfer)
        self._await_next()

    def _catch_up(self) -> None:
        if self.env.now < self.loop.time():
            self.env.run(until=self.loop.time())

    def _await_next(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        next_s = self.env.peek()
        self._timer = self.loop.call_at(next_s, self._turn) if next_s < math.inf else None

    def _turn(self) -> None:
        while self.env.peek() <= self.loop.time():
            self.env.step()
        self._await_next()


class Unreached(Exception):
    """No KV comes from `source`; that is known after `fails_s`."""

    def __init__(self, source: str, fails_s: float) -> None:
        self.source, self.fails_s = source, fails_s


class Job:
    """One leg at one instance."""

    def __init__(self, ask: LegAsk) -> None:
        self.ask = ask
        self.inbox: asyncio.Queue[LegNews | Prefilled | Exception] = asyncio.Queue()
        self.seq: Sequence | None = None
        self.made = 0  # tokens of this attempt, of the first candidate
        self.others: dict[Sequence, list[int]] = {}  # the other candidates: each one's number, and its tokens so far
        self.submitted_s = self.began_s = math.nan
        self.transfer: Transfer | None = None
        self.source: StandIn | None = None  # that its KV comes from
        self.staging: Staging | None = None  # of a migration
        self.told = self.pushed = False  # to a leg that has reserved: what is made; all of its KV
        self.lent: Sequence | None = None  # what `source` holds of its prefix
        self.fetched: FetchedFrom | None = None
        self.pushed_from = ""  # the lease of the KV that is pushed to it

    def token(self) -> int:
        token = self._word(self.made)
        self.made += 1
        return token

    def news(self, seq: Sequence) -> LegTokens:
        """The next token of a candidate; all of them have as many to make."""
        if seq not in self.others:
            candidate, token, made = 0, self.token(), self.made
        else:
            candidate, made = self.others[seq]
            token = self._word(made)
            made += 1
            self.others[seq][1] = made
        return LegTokens(candidate, [token], "length" if made >= self.ask.sampling.max_tokens else None)

    def _word(self, made: int) -> int:
        return word(self.ask.request_id, len(self.ask.tokens) + made)


class StandIn:
    """One incarnation."""

    def __init__(self, rack: Rack, plan: InstancePlan, spec: InstanceSpec) -> None:
        self.rack, self.loop, self.spec, self.plan = rack, rack.loop, spec, plan
        self.scheduler = plan.scheduler(rack.hash_tokens)
        self.worker = Worker(self.scheduler, name=spec.name, incarnation=spec.incarnation, role=spec.role)
        self.name = spec.name
        self.jobs: dict[str, Job] = {}
        self.leases: dict[str, Sequence] = {}
        self.is_alive, self.stalled, self.silent, self.refuses = True, False, False, False
        self.slow, self.probes = False, 0  # no answer to probes in time
        self.on_settled: Callable[[], None] = lambda: None  # called when nothing is under way
        self._decoding: list[Sequence] = []
        self._timer: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def role(self) -> Role:
        return self.worker.role

    # ------------------------------------------------------------ Remote

    async def prefill(self, ask: LegAsk) -> Prefilled:
        job = self._job(ask)
        try:
            if not self._fetches(job, decodes_here=False):
                self._submit(job, decodes_here=False)
            found = await job.inbox.get()
            if isinstance(found, Exception):
                raise found
            assert isinstance(found, Prefilled)
            return found
        finally:
            self._drop(job)

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        try:
            job = self._job(ask)
        except InstanceFull:
            await self.rack.asking()
            raise
        try:
            await self._begin(job)
            running = ask.sampling.best_of
            while running:
                news = await job.inbox.get()
                if isinstance(news, Exception):
                    raise news
                assert not isinstance(news, Prefilled)
                hear(news)
                if isinstance(news, LegTokens):
                    running -= news.finish is not None
                elif news.event == "moved":
                    return
        finally:
            self._drop(job)

    async def proceed(self, go: Continue) -> None:
        job = self.jobs.get(go.leg)
        if not self.is_alive or job is None or job.seq is None:
            raise Broken("there is no such leg")
        assert not job.made or job.made == len(go.made)
        job.made = job.seq.made = len(go.made)
        job.told = True
        if go.kv_transfer_params is not None:
            self._pull(job, go.kv_transfer_params)
        elif job.pushed:
            self._landed(job)

    async def release(self, lease: str) -> None:
        self._end_lease(lease)
        self.kick()

    async def renew(self, lease: str) -> bool:
        seq = self.leases.get(lease)
        return seq is not None and self.is_alive and self.worker.renew(seq, self.loop.time() + LEASE_S)

    def close(self) -> None:
        self.hung_up = True

    async def alive(self, within_s: float = 1.0) -> bool | None:
        if not self.slow:
            return self.is_alive
        self.probes += 1
        await asyncio.sleep(within_s)
        return None

    async def load(self) -> Report | None:
        return (
            msgspec.structs.replace(self.worker.report(self.loop.time()), stored=(), evicted=())
            if self.is_alive and not self.stalled
            else None
        )

    async def rejoin(self) -> None: ...

    async def switch(self, role: Role) -> None:
        if not self.is_alive:
            raise Broken("no answer")
        self.worker.drain(role)
        self._when_drained(partial(self._switched, role))

    async def drain(self) -> None:
        if not self.is_alive:
            raise Broken("no answer")
        self.worker.drain(None)
        self._when_drained(self._leave)

    # ------------------------------------------------------------ faults

    def kill(self) -> None:
        """Dead at once: connections break, memory is gone."""
        self.is_alive = False
        self.worker.die()
        for timer in (self._timer, self._alarm):
            if timer is not None:
                timer.cancel()
        for job in list(self.jobs.values()):
            self._stop_transfer(job)
            job.inbox.put_nowait(Broken("connection reset"))
        for other in self.rack.instances.values():
            for job in list(other.jobs.values()):
                if job.source is self and other.is_alive:
                    lent, _ = job.lent, other._stop_transfer(job)
                    if lent is not None and job.seq is not None:
                        other._compute(job, job.seq, FetchedFrom())
                        continue
                    job.inbox.put_nowait(TransferTrouble(f"{self.name} is gone"))

    def cut(self) -> None:
        """Every connection breaks; the instance lives on."""
        for job in list(self.jobs.values()):
            job.inbox.put_nowait(Broken("connection reset"))

    # ------------------------------------------------------------ legs

    def _job(self, ask: LegAsk) -> Job:
        if not self.is_alive:
            raise Broken("connection refused")
        if self.refuses:
            raise InstanceFull("no room")
        assert ask.leg not in self.jobs, f"leg {ask.leg} twice"
        self.rack.asked.append(ask)
        job = self.jobs[ask.leg] = Job(ask)
        job.submitted_s = self.loop.time()
        return job

    def _sequence(self, job: Job, *, made: int = 0, decodes_here: bool = True) -> Sequence:
        ask = job.ask
        prompt, output = len(ask.tokens), ask.sampling.max_tokens if decodes_here else max(2, ask.sampling.max_tokens)
        if reason := self.worker.refusal(prompt, output if decodes_here else 1):
            raise Unfit(f"{self.name}: {reason}")
        seq = Sequence(ask.request_id, ask.attempt, prompt, output, ask.hashes, ask.priority, job, made, decodes_here)
        slo = self.rack.experiment.slo
        ttft_s, tpot_s = (own if asked is None else asked for asked, own in ((ask.ttft_slo_s, slo.ttft_s), (ask.tpot_slo_s, slo.tpot_s)))
        seq.aim(self.loop.time() - ask.waited_s, ttft_s, tpot_s)
        seq.offline = ask.offline
        return seq

    def _others(self, job: Job, seq: Sequence) -> list[Sequence]:
        """The candidates of best_of beside the first."""
        shared = seq.request_id, seq.attempt, seq.prompt_tokens, seq.output_tokens, seq.hashes, seq.priority, job
        others = [Sequence(*shared) for _ in range(job.ask.sampling.best_of - 1)]
        for other in others:
            other.like(seq)
        job.others = {other: [number, 0] for number, other in enumerate(others, 1)}
        return others

    def _submit(self, job: Job, *, decodes_here: bool) -> None:
        job.seq = self._sequence(job, decodes_here=decodes_here)
        self.worker.submit(job.seq, self._others(job, job.seq) if decodes_here else NOTHING)
        self.kick()

    async def _begin(self, job: Job) -> None:
        try:
            self._take_in(job)
        except InstanceFull:
            await self.rack.asking()
            raise
        except Unreached as unreached:
            await asyncio.sleep(unreached.fails_s)
            raise TransferTrouble(f"{unreached.source} does not answer", cause="unreachable") from None

    def _take_in(self, job: Job) -> None:
        params = job.ask.params
        if params is None or not params.do_remote_prefill:
            if not self._fetches(job, decodes_here=True):
                self._submit(job, decodes_here=True)
            return
        extra = params.pdlab or Extra()
        seconds(extra.deadline_s, "deadline_s")
        job.made = len(extra.made)
        if extra.migrate is not None:
            self._migrate(job, self.rack.instances[extra.migrate.url.removeprefix("http://")], extra.migrate.leg)
        elif params.remote_engine_id == self.name:
            job.seq = seq = self.leases.pop(params.remote_request_id or "")
            seq.owner, seq.output_tokens = job, job.ask.sampling.max_tokens
            job.inbox.put_nowait(StreamEvent("transferred", made=job.made))
            self.worker.stay(seq, self._others(job, seq))
            self.kick()
        elif job.made and not extra.reserve and params.remote_request_id is None:
            job.seq = self._sequence(job)
            job.seq.prompt_tokens += job.made
            job.seq.output_tokens -= job.made
            self.worker.submit(job.seq)
            self.kick()
        else:
            job.seq = self._sequence(job, made=job.made)
            job.seq.prompt_tokens += max(0, job.made - 1)
            self._reserve(job, job.seq, self._others(job, job.seq), self.loop.time() + extra.deadline_s)
            if extra.reserve:
                cached = job.seq.cached_tokens
                job.inbox.put_nowait(StreamEvent("reserved", job.ask.leg, self.name, cached_tokens=cached))
            else:
                self._pull(job, params)

    def _drop(self, job: Job) -> None:
        """The leg has ended, or its caller hung up."""
        del self.jobs[job.ask.leg]
        self._stop_transfer(job)
        seq, job.seq = job.seq, None
        if seq is not None and self.is_alive:
            self.worker.abort(seq)
            self.kick()

    def _reserve(self, job: Job, seq: Sequence, others: list[Sequence] = NOTHING, due_s: float = math.inf) -> None:
        if not self.worker.reserve(seq, others, due_s):
            job.seq = None
            raise InstanceFull("no room")
        job.seq = seq
        self._set_alarm()

    def _stop_transfer(self, job: Job) -> None:
        if job.transfer is not None:
            self.rack.wire.cancel(job.transfer)
            job.transfer = None
        self._end_loan(job)

    # ------------------------------------------------------------ KV

    def _end_lease(self, lease: str) -> None:
        if lease in self.leases and self.is_alive:
            self.worker.release(self.leases.pop(lease))

    def _set_alarm(self) -> None:
        """For the next deadline."""
        if self._alarm is not None:
            self._alarm.cancel()
        wake_s = self.worker.wake_s()
        self._alarm = None if wake_s is None else self.loop.call_at(wake_s, self._wake)

    def _wake(self) -> None:
        for seq in self.worker.overdue(self.loop.time()):
            self.leases = {lease: held for lease, held in self.leases.items() if held is not seq}
            if seq in self.worker.scheduler.held:
                self.worker.lapse(seq)
            else:
                self.worker.renew(seq, math.inf)  # it ends with its leg
                seq.owner.inbox.put_nowait(TransferTrouble("not all KV was here in time", cause="deadline"))
        self._set_alarm()
        self.kick()

    def _size(self, seq: Sequence) -> float:
        return (seq.prompt_tokens - seq.cached_tokens) * self.plan.token_bytes

    def _pull(self, job: Job, params: KvParams) -> None:
        source, lease = self.rack.instances[params.remote_engine_id or ""], params.remote_request_id or ""
        if not source.is_alive or lease not in source.leases:
            job.inbox.put_nowait(TransferTrouble("the lease has ended"))
            return
        assert job.seq is not None
        job.told = True
        if (fails_s := self.rack.cuts.get((source.name, self.name))) is not None:
            self.loop.call_later(fails_s, job.inbox.put_nowait, TransferTrouble(f"{source.name} does not answer"))
            return
        wire = self.rack.wire
        ask_s = wire.network.path(source.name, self.name).latency_s
        job.source = source
        job.transfer = wire.send(source.name, self.name, self._size(job.seq), partial(self._pulled, job, source, lease), ask_s)

    def _pulled(self, job: Job, source: StandIn, lease: str) -> None:
        source._end_lease(lease)
        source.kick()
        self._landed(job)

    def _push(self, job: Job, seq: Sequence, to: PushTo) -> None:
        seconds(to.deadline_s, "deadline_s")
        target = self.rack.instances[to.descriptor]
        there = target.jobs.get(to.ticket)
        if there is None or there.seq is None or not target.is_alive or (self.name, target.name) in self.rack.cuts:
            self.worker.release(seq)
            return
        self.leases[job.ask.leg] = seq
        there.source, there.pushed_from = self, job.ask.leg
        there.transfer = self.rack.wire.send(
            self.name, target.name, target._size(there.seq), partial(self._pushed, job.ask.leg, target, there)
        )

    def _pushed(self, lease: str, target: StandIn, there: Job) -> None:
        self._end_lease(lease)
        self.kick()
        there.pushed = True
        if there.told:
            target._landed(there)

    def _landed(self, job: Job) -> None:
        assert job.seq is not None
        job.transfer = job.source = None
        self.worker.arrive(job.seq, 0 if job.seq.made else 1)
        self.kick()
        size = round(self._size(job.seq))
        job.inbox.put_nowait(StreamEvent("transferred", bytes=size, made=job.made))

    # ------------------------------------------------------------ a prefix from elsewhere

    def _fetches(self, job: Job, *, decodes_here: bool) -> bool:
        """Instead of submitting it."""
        extra = job.ask.params.pdlab if job.ask.params is not None else None
        if extra is None or extra.fetch is None:
            return False
        fetch, seq = extra.fetch, self._sequence(job, decodes_here=decodes_here)
        holder = self.rack.instances[fetch.url.removeprefix("http://")]
        job.fetched = FetchedFrom()
        if not self.worker.reserve(seq):
            return False
        job.seq, job.submitted_s = seq, self.loop.time()
        fails_s = self.rack.cuts.get((holder.name, self.name))
        lent = Sequence(seq.request_id, seq.attempt, fetch.tokens, 1, seq.hashes, decodes_here=False)
        if fails_s is not None or not holder.is_alive or not holder.worker.lend(lent):
            after_s = self.rack.asking_s if fails_s is None else fails_s
            self.loop.call_later(after_s, self._compute, job, seq, FetchedFrom(unreachable=fails_s is not None))
            return True
        job.source, job.lent = holder, lent
        cached = min(seq.cached_tokens, lent.prompt_tokens)
        size, wire = (lent.prompt_tokens - cached) * self.plan.token_bytes, self.rack.wire
        ask_s = wire.network.path(holder.name, self.name).latency_s
        job.transfer = wire.send(holder.name, self.name, size, partial(self._was_fetched, job, round(size)), ask_s)
        return True

    def _was_fetched(self, job: Job, size: int) -> None:
        seq, lent = job.seq, job.lent
        assert seq is not None and lent is not None
        job.transfer = None
        tokens = max(lent.prompt_tokens, seq.cached_tokens)
        self._end_loan(job)
        job.fetched, seq.cached_tokens = FetchedFrom(tokens, size), tokens
        self.worker.arrive(seq, seq.prompt_tokens - tokens)
        self.kick()

    def _compute(self, job: Job, seq: Sequence, fetched: FetchedFrom) -> None:
        """It does not come."""
        if job.seq is seq and self.is_alive and seq in self.scheduler.reserved:
            job.fetched = fetched
            self.worker.compute(seq)
            self.kick()

    def _end_loan(self, job: Job) -> None:
        if job.source is not None and job.lent is not None and job.source.is_alive:
            job.source.worker.release(job.lent)
            job.source.kick()
        job.source = job.lent = None

    # ------------------------------------------------------------ migration

    def _migrate(self, job: Job, source: StandIn, leg: str) -> None:
        if (fails_s := self.rack.cuts.get((source.name, self.name))) is not None:
            raise Unreached(source.name, fails_s)
        there = source.jobs.get(leg)
        old = None if there is None else there.seq
        if there is None or old is None or (reason := source.worker.export(old)):
            raise TransferTrouble("it is not there" if old is None else reason)
        ask, tokens = job.ask, source.scheduler.kv_tokens(old)
        seq = Sequence(ask.request_id, ask.attempt, tokens, old.output_tokens, ask.hashes, ask.priority, job)
        seq.like(old)
        self._reserve(job, seq)
        job.source, job.staging = source, Staging(source.scheduler.pool.block_tokens, seq.cached_tokens)
        self._copy(job, there, tokens, self._copied)

    def _copy(self, job: Job, there: Job, tokens: int, then: Callable[[Job, Job], None]) -> None:
        assert job.source is not None and job.staging is not None
        size = job.staging.copy(tokens) * self.plan.token_bytes
        job.transfer = self.rack.wire.send(job.source.name, self.name, size, partial(then, job, there))

    def _copied(self, job: Job, there: Job) -> None:
        source, old = job.source, there.seq
        assert source is not None and job.seq is not None and job.staging is not None
        job.transfer = None
        reason = "it is not there" if old is None else source.worker.export(old)
        if old is None or reason:
            job.inbox.put_nowait(TransferTrouble(reason))
        elif job.staging.stops(tokens := source.scheduler.kv_tokens(old)):
            source.worker.between_steps(partial(self._stop, job, there))
            source.kick()
        elif self.worker.extend(job.seq, tokens):
            self._copy(job, there, tokens, self._copied)
        else:
            job.inbox.put_nowait(TransferTrouble(f"{self.name} is full"))

    def _stop(self, job: Job, there: Job) -> None:
        seq, old, source = job.seq, there.seq, job.source
        if seq is None or source is None or not self.is_alive:
            return
        if old is None or source.worker.stop(old, self.loop.time()):
            job.inbox.put_nowait(TransferTrouble("it does not run there any more"))
            return
        source._set_alarm()
        if self.worker.extend(seq, old.prompt_tokens):
            self._copy(job, there, old.prompt_tokens, self._moved)
        else:
            source.worker.resume(old)
            job.inbox.put_nowait(TransferTrouble(f"{self.name} is full"))

    def _moved(self, job: Job, there: Job) -> None:
        seq, old, source = job.seq, there.seq, job.source
        assert seq is not None and old is not None and source is not None
        there.seq = None
        source.worker.release(old)
        source.kick()
        there.inbox.put_nowait(StreamEvent("moved"))
        job.made, seq.made = there.made, old.made
        self._landed(job)

    # ------------------------------------------------------------ the loop

    def kick(self) -> None:
        if self.worker.batch is None and self.is_alive and not self.stalled and self.scheduler.stirred:
            self._start()
        if self.worker.batch is None:
            self.on_settled()

    def _start(self) -> None:
        scheduler, price, now = self.scheduler, self.plan.cost, self.loop.time()
        batch = self.worker.next_batch(now)
        if batch is None:
            return
        n, context = batch.decodes, batch.context_tokens
        if batch.chunks:
            chunks = [(tokens, seq.computed) for seq, tokens in batch.chunks]
            seconds = price.mixed_s(chunks, n, context) if n else price.prefill_s(chunks)
        else:
            seconds = price.decode_s(n, context)
        for seq, _ in batch.chunks:
            if math.isnan(seq.owner.began_s):
                seq.owner.began_s = now
        self._decoding = list(scheduler.running.values()) if n else []
        self._timer = self.loop.call_later(seconds, self._done, batch, seconds)

    def _done(self, batch: Batch, seconds: float) -> None:
        speaking = self._decoding + [seq for seq, tokens in batch.chunks if seq.decodes_here and seq.computed + tokens >= seq.prompt_tokens]
        self.worker.meter.took(batch, len(self.scheduler.joined), self.loop.time() - seconds, seconds, 1, seconds)
        prefilled, finished = self.worker.complete(batch, 1, self.loop.time())
        for root in finished:
            self._ended(root, [seq for seq in speaking if (seq.parent or seq) is root])
        for seq in prefilled:
            if seq.decodes_here:
                self._say(seq)
            else:
                self._answer(seq)
        for seq in speaking:
            if seq not in prefilled and (seq.parent or seq) not in finished:
                self._say(seq)
        self.loop.when_quiet(self._next)

    def _next(self) -> None:
        self.worker.settle()
        self._set_alarm()
        if self.is_alive and not self.stalled:
            self._start()
        if self.worker.batch is None:
            self.on_settled()

    def _say(self, seq: Sequence) -> None:
        job: Job = seq.owner
        if job.seq is (seq.parent or seq):
            if seq.decodes_here and not math.isnan(job.began_s):
                queue_s = job.began_s - job.submitted_s
                job.inbox.put_nowait(StreamEvent("prefilled", cached_tokens=seq.cached_tokens, queue_s=queue_s, fetched=job.fetched))
                job.began_s = math.nan
            job.inbox.put_nowait(job.news(seq))

    def _ended(self, root: Sequence, speaking: list[Sequence]) -> None:
        job: Job = root.owner
        if not root.decodes_here:
            queue_s = job.began_s - job.submitted_s
            job.inbox.put_nowait(Prefilled(job.token(), "length", root.cached_tokens, queue_s, fetched=job.fetched))
        for seq in speaking:
            self._say(seq)
        job.seq = None

    def _answer(self, seq: Sequence) -> None:
        job: Job = seq.owner
        if job.seq is not seq:
            return  # it is being dropped
        job.seq = None
        to = job.ask.params.pdlab.push if job.ask.params is not None and job.ask.params.pdlab is not None else None
        raw = params = None
        if to is not None:
            self._push(job, seq, to)
        else:
            self.leases[job.ask.leg] = seq
            params = KvParams(do_remote_prefill=True, remote_engine_id=self.name, remote_request_id=job.ask.leg)
            raw = msgspec.json.encode(params)
        queue_s = job.began_s - job.submitted_s
        job.inbox.put_nowait(Prefilled(job.token(), "length", seq.cached_tokens, queue_s, raw, params, fetched=job.fetched))

    # ------------------------------------------------------------ lifecycle

    def _when_drained(self, call: Callable[[], None]) -> None:
        if not self.is_alive:
            return
        if not self.jobs and self.worker.drained():
            call()
        else:
            self.loop.call_later(0.05, self._when_drained, call)

    def _switched(self, role: Role) -> None:
        self.worker.switch(role)
        self.rack.world.instances.other(Switched(self.name, self.spec.incarnation, role))

    def _leave(self) -> None:
        self.is_alive = False
        self.rack.world.instances.leave(self.name, self.spec.incarnation)

    def report(self) -> Report:
        """As it comes over the registry."""
        return read_report(self.name, encode(self.worker.report(self.loop.time())))


class Rack:
    """The instances of an experiment. `world` is set by who makes it."""

    world: LiveWorld

    def __init__(self, loop: VirtualLoop, experiment: Experiment, hash_tokens: int) -> None:
        self.loop, self.experiment, self.hash_tokens = loop, experiment, hash_tokens
        network = experiment.cluster.network
        self.wire = Wire(loop, network.latency_us * 1e-6)
        self.plans = {plan.placement.name: plan for plan in plans(experiment, hash_tokens)}
        self.instances: dict[str, StandIn] = {}
        self.asked: list[LegAsk] = []
        self._answers: deque[tuple[float, asyncio.Future[None]]] = deque()
        self.asking_s = 2 * network.latency_us * 1e-6  # until the router has an instance's answer
        self.cuts: dict[tuple[str, str], float] = {}  # no KV goes from one to the other; seconds until a read says so
        for name, plan in self.plans.items():
            self._wire(name, plan)

    def _wire(self, name: str, plan: InstancePlan) -> None:
        nic = (self.experiment.cluster.network.gbytes_per_s or 0.0) * 1e9
        self.wire.network.add(Endpoint(name=name, host=name, nic_bytes_per_s=nic, nics=plan.placement.nics))

    async def start(self, role: Role) -> None:
        """One more, like the first of that role; it joins after the experiment's `start_s`."""
        like = next(plan for plan in self.plans.values() if plan.placement.role is role)
        name = next(name for n in count() if (name := f"{role}-{n}") not in self.plans)
        self.plans[name] = like
        self._wire(name, like)
        await asyncio.sleep(self.experiment.cluster.autoscale.start_s)
        self.bring_up(name)

    def connect(self, spec: InstanceSpec) -> StandIn:
        return self.instances[spec.name]

    def bring_up(self, name: str, capabilities: tuple[str, ...] = CAPABILITIES) -> None:
        """Start an instance of the experiment: its first incarnation, or the next."""
        plan, before = self.plans[name], self.instances.get(name)
        spec = member_spec(plan, name, 0 if before is None else before.spec.incarnation + 1, capabilities)
        self.instances[name] = StandIn(self, plan, spec)
        self.world.instances.join(spec)

    async def reporting(self) -> None:
        due_s = self.loop.time()
        while True:
            due_s += self.experiment.cluster.reports.period_s
            await asyncio.sleep(due_s - self.loop.time())
            for instance in list(self.instances.values()):
                if instance.is_alive and not instance.silent:
                    self.world.instances.report(instance.report())

    async def asking(self) -> None:
        """Until who asks has the answer, in the order in which they asked."""
        due_s, answer = self.loop.time() + self.asking_s, self.loop.create_future()
        self._answers.append((due_s, answer))
        self.loop.call_at(due_s, self._answer)
        await answer

    def _answer(self) -> None:
        while self._answers and self._answers[0][0] <= self.loop.time():
            answer = self._answers.popleft()[1]
            if not answer.done():
                answer.set_result(None)

    def cut(self, a: str, b: str, fails_s: float) -> None:
        """Nothing passes between these two any more, nor what is under way."""
        self.cuts[a, b] = self.cuts[b, a] = fails_s
        for instance in self.instances.values():
            for job in list(instance.jobs.values()):
                if job.source is not None and job.transfer is not None and {job.source.name, instance.name} == {a, b}:
                    source, lent = job.source, job.lent
                    instance._stop_transfer(job)
                    if lent is not None and job.seq is not None:
                        self.loop.call_later(fails_s, instance._compute, job, job.seq, FetchedFrom(unreachable=True))
                    elif job.pushed_from:
                        source._end_lease(job.pushed_from)
                        source.kick()
                    else:
                        self.loop.call_later(fails_s, job.inbox.put_nowait, TransferTrouble(f"{source.name} does not answer"))

    def check(self) -> None:
        """Blocks are conserved."""
        for instance in self.instances.values():
            if instance.is_alive:
                instance.worker.check()

    def at_rest(self) -> None:
        """Nothing is held anywhere."""
        for instance in self.instances.values():
            if instance.is_alive:
                assert not instance.jobs, f"{instance.name} has legs"
                assert instance.scheduler.idle, f"{instance.name} is not idle"
                assert instance.scheduler.pool.used == 0, f"{instance.name} holds {instance.scheduler.pool.used} blocks"


def member_spec(plan: InstancePlan, name: str, incarnation: int, capabilities: tuple[str, ...] = CAPABILITIES) -> InstanceSpec:
    """What an instance says of itself when it joins live: of what its engine says when it is ready, and as the registry has it."""
    engine = plan.placement.engine
    placed = Placed(
        name=name,
        role=plan.placement.role,
        host=plan.placement.host,
        url=f"http://{name}",
        max_seqs=engine.max_seqs,
        max_batch_tokens=engine.max_batch_tokens,
        prefix_cache=engine.prefix_cache,
        watermark=engine.watermark,
    )
    ready = Ready(
        "",
        plan.context_tokens,
        1 << 16,
        engine.block_tokens,
        plan.kv_blocks,
        "virtual",
        "",
        block_bytes=plan.block_bytes,
        descriptor=b"virtual",
        context_tokens=plan.context_tokens,
        prefill_profile=plan.prefill_profile,
        decode_profile=plan.decode_profile,
    )
    spec = msgspec.structs.replace(instance_spec(placed, measured_of(ready)), incarnation=1, capabilities=capabilities)
    heard = read_instance(name, encode(InstanceRecord(lease_s=3.0, spec=spec))).spec
    return msgspec.structs.replace(heard, incarnation=incarnation)  # the registry counts from 1


class Client:
    """What one request's client got, checked as it comes."""

    def __init__(self, prompt_tokens: int, output_tokens: int) -> None:
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.id = -1
        self.tokens: list[int] = []
        self.ended: Tokens | None = None

    @property
    def done(self) -> bool:
        """Did it get all of it?"""
        return self.ended is not None and self.ended.finish == "length" and len(self.tokens) == self.output_tokens

    def take(self, tokens: Tokens) -> None:
        assert self.ended is None, f"{tokens} after the end"
        assert tokens.start == len(self.tokens), f"index {tokens.start} after {len(self.tokens)} tokens"
        for token in tokens.tokens:
            assert token == word(tokens.id, self.prompt_tokens + len(self.tokens)), f"request {tokens.id}: wrong token {len(self.tokens)}"
            self.tokens.append(token)
        if tokens.finish is not None:
            self.ended = tokens


class Run:
    """A World over a Rack, in a VirtualLoop; its log is `log_path`, if that is given."""

    def __init__(self, loop: VirtualLoop, experiment: Experiment, hash_tokens: int = 16, log_path: Path | None = None) -> None:
        self.loop, self.experiment = loop, experiment
        self.rack = Rack(loop, experiment, hash_tokens)
        self.clients: dict[int, Client] = {}
        self.log = None
        if log_path is not None:
            policy = load_policy.build(experiment.policy, experiment.base_dir)
            self.log = EventLog(log_path, head_of(experiment, policy, hash_tokens), warn=logging.getLogger(__name__).warning)
        self.world = self.rack.world = LiveWorld(
            router(experiment, hash_tokens=hash_tokens),
            self.rack.connect,
            transfer=experiment.transfer,
            now=loop.time,
            unix=loop.time,
            log=self.log,
            seed=experiment.seed,
            start=self.rack.start if experiment.cluster.autoscale.enabled else None,
            name="test",
        )

    async def __aenter__(self) -> Run:
        for name in self.rack.plans:
            self.rack.bring_up(name)
        self.world.open()
        self._reporting = asyncio.create_task(self.rack.reporting())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)
        await self.world.close()
        if self.log is not None:
            self.log.close()

    def submit(self, prompt_tokens: int, output_tokens: int, hashes: tuple[int, ...] = (), **sampling: Any) -> Client:
        client = Client(prompt_tokens, output_tokens)
        following = len(self.clients)
        self.clients[following] = client
        tokens = [word(following, place) for place in range(prompt_tokens)]
        how = Sampling(**{"max_tokens": output_tokens, "temperature": 0.0, **sampling})
        client.id = self.world.submit(tokens, how, client.take, hashes=hashes)
        assert client.id == following
        return client

    def submit_at(self, at_s: float, prompt_tokens: int, output_tokens: int, hashes: tuple[int, ...] = ()) -> None:
        self.loop.call_at(at_s, self.submit, prompt_tokens, output_tokens, hashes)

    async def until(self, done: Callable[[], bool], within_s: float = 3600.0) -> None:
        """Step by step until `done`, the invariants checked on the way."""
        end_s = self.loop.time() + within_s
        while not done():
            assert self.loop.time() < end_s, f"not done within {within_s} s"
            await asyncio.sleep(0.01)
            self.world.check()
            self.rack.check()

    async def rest(self) -> None:
        """All clients' requests end; then nothing is held or live anywhere."""
        await self.until(lambda: not self.world.requests.by_id and all(client.ended for client in self.clients.values()))
        await self.until(lambda: all(not x.jobs and x.scheduler.idle for x in self.rack.instances.values() if x.is_alive), 60.0)
        self.rack.at_rest()
        assert not self.world.router.cluster.live


def small(policy: str | dict[str, Any] = "least_loaded", *, prefill: int = 1, decode: int = 1, mixed: int = 0, **rest: Any) -> Experiment:
    """An experiment of a small model on a few instances."""
    counts = {"prefill": prefill, "decode": decode, "mixed": mixed}
    rows = [{"role": role, "count": count, "hardware": "h100-sxm", "nics": 1} for role, count in counts.items() if count]
    mapping: dict[str, Any] = {
        "name": "small",
        "seed": 3,
        "model": "llama-3.1-8b",
        "workload": {"source": "azure-conv-2023", "requests": 100, "rate": 40.0},
        "cluster": {"instances": rows, "network": {"gbytes_per_s": 25, "latency_us": 10}},
        "engine": {"kv_blocks": 6000},
        "policy": policy,
    }
    for key, value in rest.items():
        mapping[key] = {**mapping[key], **value} if isinstance(mapping.get(key), dict) and isinstance(value, dict) else value
    return Experiment.parse(mapping)


def cluster(
    transfer: dict[str, Any], prefill: int = 1, decode: int = 1, policy: str | dict[str, Any] = "least_loaded", **rest: Any
) -> Experiment:
    """A small one whose requests end within a minute."""
    return small(policy, prefill=prefill, decode=decode, transfer=transfer, limits={"request_timeout_s": 60.0}, **rest)


def played(
    experiment: Experiment, play: Callable[[Run], Coroutine[Any, Any, None]], log_path: Path | None = None, hash_tokens: int = 16
) -> Run:
    """`play(run)`, then rest."""

    async def main(loop: VirtualLoop) -> Run:
        async with Run(loop, experiment, hash_tokens, log_path) as made:
            await play(made)
            await made.rest()
        return made

    return run(main)
