"""The simulated world: turns what happens in SimPy into events for the router, and performs the actions it answers with.

It translates and keeps the records; it decides nothing. `RequestSource` makes requests arrive, `Job` is one on its way, `SimInstance` runs
batches, `Moves` carries KV, `Lifecycle` starts and stops instances, `Periodic` has them report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import simpy

from pdlab.core.batch import Batch
from pdlab.core.router import Router
from pdlab.core.scheduler import NOTHING
from pdlab.core.sequence import Sequence
from pdlab.core.teller import Teller
from pdlab.core.types import (
    Abort,
    Dispatch,
    End,
    Evict,
    Fetch,
    Finished,
    Handoff,
    InstanceSpec,
    Joined,
    Migrate,
    Notice,
    PrefillDone,
    Request,
    Role,
    Scale,
    Stage,
    Stop,
    Switch,
)
from pdlab.replay.log import EventLog
from pdlab.results.timeline import Book
from pdlab.sim.calls import run_until
from pdlab.sim.due_call import DueCall
from pdlab.sim.host import Host
from pdlab.sim.job import Job
from pdlab.sim.lifecycle import Lifecycle
from pdlab.sim.link import Network
from pdlab.sim.moves import Moves, TransferMode
from pdlab.sim.periodic import Periodic
from pdlab.sim.scene import Scene
from pdlab.sim.source import RequestSource
from pdlab.sim.worker import SimInstance
from pdlab.workload.base import Workload

QUEUED_P, PREFILL, DONE = Stage.QUEUED_P, Stage.PREFILL, Stage.DONE  # enum look-ups cost

Maker = Callable[[InstanceSpec], SimInstance]


class World(Scene):
    """One run. Call `add` for each instance, then `run`."""

    def __init__(
        self,
        env: simpy.Environment,
        router: Router,
        workload: Workload,
        network: Network,
        transfer: TransferMode,
        *,
        report_period_s: float = 0.5,
        report_delay_s: float = 0.0,
        switch_s: float = 1.0,
        detect_s: float = 0.5,
        request_s: float = 0.0,
        hosts: Iterable[Host] = (),
        log: EventLog | None = None,
        spans: bool = False,
        start_instance: Callable[[Role], tuple[Callable[[], None], float]] | None = None,
    ) -> None:
        asking_s = 2.0 * network.topology.latency_s + transfer.ask_s
        super().__init__(env, asking_s, detect_s)
        self.router, self.workload = router, workload
        samples_anew = transfer.first_token != "prefill"
        self.source = RequestSource(self, workload, request_s=request_s, hosts=hosts, samples_anew=samples_anew)
        self.moves = Moves(self, network, transfer)
        self.lifecycle = Lifecycle(self, self.moves, self.bring_up, start_instance, switch_s=switch_s, lease_s=router.limits.lease_s)
        self.network = network
        self.notices: dict[str, None] = {}
        self.relays = transfer.via_prefill
        self.follows_chunks = self.moves.by_chunk or self.moves.by_layer
        self.book = Book()
        self.records, self.samples, self.gaps = self.book.records, self.book.samples, self.book.gaps
        self.spans: list[tuple[int, float, float, str, int, int]] | None = [] if spans else None
        self.leaked_blocks = 0
        self._makers: dict[str, Maker] = {}
        self.periodic = Periodic(
            self,
            router,
            self.source,
            self.book,
            self.lifecycle.retired,
            self.wake,
            report_period_s=report_period_s,
            report_delay_s=report_delay_s,
        )
        perform: dict[type, Callable[[Any], None]] = {
            Dispatch: self._dispatch,
            Fetch: self._fetch,
            Handoff: self._handoff,
            Migrate: self.moves.migrate,
            Abort: self._abort,
            End: self._end,
            Switch: self.lifecycle.switch,
            Stop: self.lifecycle.stop,
            Evict: self.lifecycle.evict,
            Scale: self.lifecycle.scale,
            Notice: lambda action: self.notices.setdefault(action.text),
        }
        self.teller = Teller(router, perform, log)

    # ------------------------------------------------------------ running

    def add(self, spec: InstanceSpec, make: Maker) -> None:
        """Bring up an instance; `make` builds it, now and after each restart."""
        self._makers[spec.name] = make
        self.bring_up(spec)

    def bring_up(self, spec: InstanceSpec) -> None:
        """Start an instance that was added: its first or a later incarnation."""
        instance = self._makers[spec.name](spec)
        instance.index = self.book.place(spec.name)
        instance.spans = self.spans
        instance.longer, instance.decode_longer = self.longer.get(spec.name, (1.0, 1.0))
        if spec.name in self.instances:
            self.lifecycle.retired.append(self.instances[spec.name])
        self.instances[spec.name] = instance
        self.tell(Joined(instance.spec))
        self.periodic.deliver(instance, instance.report())

    def run(self) -> None:
        """Until every request has ended. KeyboardInterrupt passes through; `interrupt` then makes the records whole."""
        if not self.source.requests:
            return
        self.source.start()
        self.periodic.start()
        if self.source.ended < self.source.requests:
            run_until(self.env, self.source.finish)
        self._settle()

    def _settle(self) -> None:
        """All requests have ended: let the steps under way end, and what they held go, then count what is still held."""
        while any(instance.batch is not None for instance in self.instances.values()):
            self.env.step()
        for instance in self.instances.values():
            if instance.alive:
                self.leaked_blocks += instance.scheduler.pool.used
                instance.lived_s += self.env.now - instance.up_s
                instance.up_s = self.env.now

    def interrupt(self) -> None:
        """Stopped from outside: write down the requests under way as they are."""
        for job in list(self.jobs.values()):
            job.received_tokens = job.sent + self.client_tokens(job)
            self.book.write(job)
        for instance in self.instances.values():
            instance.sync()
            instance.lived_s += self.env.now - instance.up_s

    # ------------------------------------------------------------ actions

    def _fetch(self, action: Fetch) -> None:
        self.jobs[action.request_id].fetch = action

    def _dispatch(self, action: Dispatch) -> None:
        job = self.jobs[action.request_id]
        attempt, sent = action.attempt, action.sent_tokens
        job.attempt = attempt
        p = self.instances[action.instance]
        request = job.request
        job.p = p
        if attempt > 1:  # forget the lost one
            job.restarted()
            job.sent = sent
            job.d = job.pseq = job.dseq = None
            job.pushed_tokens = 0
            job.blocked = False
        if not p.alive:
            job.dispatched(self.env.now, p.name)
            self.asked(p)
            return
        prompt, output = request.prompt_tokens + sent, job.output_tokens - sent
        decodes_here = action.decode == action.instance
        p.jobs[job] = None
        seq = Sequence(request.id, attempt, prompt, output, job.context_hashes, request.priority, job, 0, decodes_here)
        if request.offline:
            seq.offline = True
        if p.scheduler.foresight is not None:
            self.aim(seq, request)
        if decodes_here:
            job.d = p
            job.assigned(p.name)
        elif action.decode is not None:
            d = self.instances[action.decode]
            if not d.alive:
                self.asked(d)
            elif not self._reserve(job, d, prompt, output):
                return
            else:
                job.assigned(d.name)
        if not decodes_here and request.best_of > 1:
            seq.output_tokens = max(2, output)  # its token is dropped, so it does not end with it
        job.pseq = seq
        job.dispatched(self.env._now, p.name)
        p.requests += 1
        if job.fetch is not None and self.moves.prefixes.begin(job, p, seq):
            return
        p.worker.submit(seq, _others(request, seq) if decodes_here and request.best_of > 1 else NOTHING)
        p.kick()

    def aim(self, seq: Sequence, request: Request) -> None:
        """Say by when its tokens are due."""
        cluster = self.router.cluster
        ttft_s = cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        seq.aim(request.arrival_s, ttft_s, cluster.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s)

    def _reserve(self, job: Job, d: SimInstance, prompt: int, output: int) -> bool:
        """Take the prompt's blocks on the decode instance; where there is no room, the router hears of it."""
        made = 0 if job.samples_anew else 1
        request = job.request
        seq = Sequence(request.id, job.attempt, prompt, output, job.context_hashes, request.priority, job, made)
        if request.offline:
            seq.offline = True
        if d.scheduler.foresight is not None:
            self.aim(seq, request)
        if not d.reserve(seq, _others(request, seq) if request.best_of > 1 else NOTHING):
            if job.pseq is None and job.p is not None:
                job.p.jobs.pop(job, None)
            self.refuse(job, d)
            return False
        job.d, job.dseq = d, seq
        d.jobs[job] = None
        d.requests += 1
        return True

    def _handoff(self, action: Handoff) -> None:
        job = self.jobs[action.request_id]
        p, seq = job.p, job.pseq
        if p is None or seq is None or not p.alive or job.attempt != action.attempt:
            return
        if action.dst == action.src:
            job.d = p
            job.handed_off(self.env.now, p.name)
            seq.output_tokens = job.output_tokens - job.sent
            if job.samples_anew and job.request.best_of == 1:
                self._token_at(job, self.env.now)  # it is in the KV already
            p.worker.stay(seq, _others(job.request, seq) if job.request.best_of > 1 else NOTHING)
            p.kick()
            return
        d = self.instances[action.dst]
        if not d.alive:
            self.asked(d)
        elif self._reserve(job, d, seq.prompt_tokens, seq.output_tokens):
            self.moves.send_all(job)

    def _abort(self, action: Abort) -> None:
        job = self.jobs.get(action.request_id)
        instance = self.instances.get(action.instance)
        if job is None or instance is None:
            return
        self.moves.cancel(job)
        if job.attempt == action.attempt:
            job.received_tokens = job.sent + self.client_tokens(job)
            job.attempt = 0  # what its sequences still do, until the step under way has ended, is of no account
        for seq in (job.pseq, job.dseq, job.tseq):
            if seq is not None and seq.attempt == action.attempt:
                self.drop(job, instance, seq)

    def _end(self, action: End) -> None:
        job = self.jobs[action.request_id]
        job.ended(action.stage, self.env.now, action.reason)
        self._ended(job)

    # ------------------------------------------------------------ instances speak

    def batch_started(self, instance: SimInstance, batch: Batch, now: float, seconds: float) -> None:
        for seq, tokens in batch.chunks:
            job: Job = seq.owner
            if seq is not job.pseq and seq is not job.dseq:
                continue  # a candidate
            if job.attempt == seq.attempt and job.stage is QUEUED_P:
                job.prefill_started(now, seq.cached_tokens)
            elif job.attempt == seq.attempt and job.stage is not PREFILL:
                job.decode_began(now)  # its first token is sampled anew; or it was preempted
            if self.moves.by_layer and job.dseq is not None and seq is job.pseq:
                self.moves.step_started(job, seq, tokens, seconds)

    def batch_ended(self, instance: SimInstance, batch: Batch) -> None:
        for seq, _ in batch.chunks:
            job: Job = seq.owner
            if seq is job.pseq and job.dseq is not None and not job.done and job.attempt == seq.attempt:
                self.moves.step_ended(job, seq)

    def preempted(self, instance: SimInstance, victims: list[Sequence]) -> None:
        for seq in victims:
            job: Job = seq.owner
            if seq is job.pseq or seq is job.dseq:
                job.preemptions += 1
            if seq.made and seq.parent is None:
                job.last_token_s = instance.emitted_s + (self.moves.relayed_s(job, seq) if self.relays else 0.0)

    def first_steps(self, joined: list[Sequence], now: float, at_s: float) -> None:
        for seq in joined:
            if seq.parent is not None:
                continue
            job: Job = seq.owner
            job.decode_began(now)
            last_s = job.last_token_s
            if last_s == last_s:
                later_s = self.moves.relayed_s(job, seq) if self.relays else 0.0
                self.gaps.add_run(1, at_s + later_s - last_s, 0.0, 1)

    def prefilled(self, instance: SimInstance, seq: Sequence, now: float) -> None:
        job: Job = seq.owner
        if job.done or job.attempt != seq.attempt:
            return  # its removal is on the way
        if job.stage is not PREFILL:
            later_s = self.moves.relayed_s(job, seq) if self.relays else 0.0
            self._token_at(job, now + later_s)  # it is sampled anew, or was preempted, and goes on decoding
            return
        if seq.decodes_here or not job.samples_anew:
            self._token_at(job, now)
        if not seq.decodes_here:
            job.prefilled()
        if job.fetched is not None:
            fetched, job.fetched = job.fetched, None
            self.teller.tell(fetched, now)
        self.teller.tell(PrefillDone(job.index, seq.attempt, instance.name, seq.cached_tokens), now)
        if job.done or job.attempt != seq.attempt:
            return
        if job.streaming:
            self.moves.close(job)
        elif job.dseq is not None and job.handoff_s != job.handoff_s:
            self.moves.send_all(job)

    def _token_at(self, job: Job, at_s: float) -> None:
        """The client gets the first token of this attempt."""
        if job.first_token_s != job.first_token_s:
            job.first_token_s = at_s
        elif job.last_token_s == job.last_token_s:
            self.gaps.add(at_s - job.last_token_s)
        job.last_token_s = at_s

    def finished(self, instance: SimInstance, seq: Sequence, now: float) -> None:
        job: Job = seq.owner
        if job.done or job.attempt != seq.attempt:
            return
        if job.first_token_s != job.first_token_s or (seq is job.pseq and seq.output_tokens == 1):
            self._token_at(job, now)
        instance.jobs.pop(job, None)
        if job.dseq is not None and job.dseq is not seq and job.d is not None:  # over before it was handed off
            self.drop(job, job.d, job.dseq)
        if job.tseq is not None and job.target is not None:
            self.drop(job, job.target, job.tseq)
        if job.transfer is not None:
            self.moves.cancel(job)
        job.done = True
        self.teller.tell(Finished(job.index, seq.attempt, instance.name, job.output_tokens), now)
        job.received_tokens = job.output_tokens * job.request.best_of
        job.ended(DONE, now + (self.moves.relayed_s(job, seq) if self.relays else 0.0))
        self._ended(job)

    def overdue(self, instance: SimInstance, seq: Sequence) -> None:
        """Leases are renewed while the request waits, as the live router does."""
        job: Job = seq.owner
        if not job.done and job.attempt == seq.attempt:
            instance.worker.renew(seq, self.env.now + instance.worker.lease_s)
        else:
            instance.worker.lapse(seq)
            instance.kick()

    def wake(self, event: DueCall) -> None:
        event.value.wake()

    def drained(self, instance: SimInstance) -> None:
        self.lifecycle.drained(instance)

    # ------------------------------------------------------------ records

    def _ended(self, job: Job) -> None:
        self.book.write(job)
        job.done = True
        job.pseq = job.dseq = job.tseq = None  # they know the job, too: leave the garbage collector no cycle
        del self.jobs[job.index]
        self.source.end(job.index)


def _others(request: Request, seq: Sequence) -> list[Sequence]:
    """The candidates of best_of beside the first."""
    shared = seq.request_id, seq.attempt, seq.prompt_tokens, seq.output_tokens, seq.hashes, seq.priority, seq.owner
    others = [Sequence(*shared) for _ in range(request.best_of - 1)]
    for other in others:
        other.like(seq)
    return others
