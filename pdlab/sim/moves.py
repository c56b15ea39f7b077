"""KV on its way: hand-offs, and live migrations.

*pull*: when the prompt is computed the decode instance asks for it (one more latency) and reads; a measured engine, which looks at what
came in between two steps only, at its next step boundary. *push* by request: the prefill instance writes it then; by chunk: each prompt
chunk when it is computed; by layer: while it is computed, the bytes appearing at the pace of the step, the first layer's after 1/layers of
it. Pushes by chunk and layer need a decode instance that has reserved before prefill starts; without one they fall back to one push at
the end.

Instances that are cut apart do not reach each other. A reader knows after a while, and what was reserved is given back; a push is lost, and
its reader waits in vain.

A migration copies in stages while the request goes on decoding (`Staging`); for the last it stands still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from pdlab.core.sequence import Sequence
from pdlab.core.staging import Staging
from pdlab.core.types import Migrate, Migrated, Stage, TransferFailed, Transferred, Unreachable
from pdlab.sim.calls import call_later
from pdlab.sim.due_call import DueCall
from pdlab.sim.fetches import PrefixReads
from pdlab.sim.job import Job
from pdlab.sim.link import Network
from pdlab.sim.path import Transfer
from pdlab.sim.scene import Scene
from pdlab.sim.worker import SimInstance

TRANSFER = Stage.TRANSFER  # enum look-ups cost


@dataclass(frozen=True, slots=True)
class TransferMode:
    """`first_token` says who sends it: "prefill", or "decode", which samples it anew after the transfer."""

    mode: str = "pull"
    granularity: str = "request"
    first_token: str = "prefill"
    via_prefill: bool = False  # answers of a decode instance go through the one that prefilled
    layers: int = 32
    state_bytes: float = 0.0  # of a sequence's recurrent layers, whatever its length
    setup_s: float = 0.0  # of each transfer, besides the path's
    ask_s: float = 0.0  # until the decode instance has heard that it shall pull
    between_steps: bool = False  # it begins to, when no step is under way


class Moves:
    def __init__(self, scene: Scene, network: Network, mode: TransferMode) -> None:
        self.scene, self.network, self.mode = scene, network, mode
        self.pulls = mode.mode == "pull"
        self.by_layer = mode.mode == "push" and mode.granularity == "layer"
        self.by_chunk = mode.mode == "push" and mode.granularity == "chunk"
        self.cuts: dict[frozenset[str], float] = {}  # between whom nothing passes, and the seconds until a reader knows
        self.prefixes = PrefixReads(scene, network, self.cuts)

    def relay(self, job: Job, seq: Sequence) -> SimInstance | None:
        """Who passes on what that sequence makes: nobody once the request was migrated."""
        relayed = self.mode.via_prefill and seq is job.dseq and job.p is not job.d and not job.migrations
        return job.p if relayed else None

    def relayed_s(self, job: Job, seq: Sequence) -> float:
        """By how much its tokens come later than they would straight from the decode instance."""
        relay = self.relay(job, seq)
        return 0.0 if relay is None or job.d is None else self.network.path(job.d.name, relay.name).latency_s

    # ------------------------------------------------------------ hand-off

    def send_all(self, job: Job) -> None:
        """The prompt is computed: move what the decode instance does not hold already."""
        p, d, pseq, dseq = job.p, job.d, job.pseq, job.dseq
        assert p is not None and d is not None and pseq is not None and dseq is not None
        job.handed_off(self.scene.env._now, d.name)
        size = d.kv_size.size_bytes(dseq.cached_tokens, pseq.prompt_tokens, pseq.prompt_tokens, p.kv_size)
        if not self.pulls:
            self._start(job, size)
        elif not self.mode.between_steps:
            self._start(job, size, asks=True)
        else:
            call_later(self.scene.env, self.mode.ask_s, self._asked, (job, dseq))

    def _asked(self, event: DueCall) -> None:
        job, dseq = event.value
        if self._waits(job, dseq):
            job.d.when_between_steps(partial(self._pull, job, dseq))

    def _pull(self, job: Job, dseq: Sequence) -> None:
        if self._waits(job, dseq):
            assert job.p is not None
            assert job.d is not None
            tokens = job.request.prompt_tokens + job.sent
            size = job.d.kv_size.size_bytes(dseq.cached_tokens, tokens, tokens, job.p.kv_size)
            self._start(job, size, asks=True)

    def _waits(self, job: Job, dseq: Sequence) -> bool:
        """Is this hand-off still to be made?"""
        if job.p is None or job.d is None:
            return False
        wanted = job.dseq is dseq and job.attempt == dseq.attempt and job.stage is TRANSFER and job.transfer is None
        return wanted and job.p.alive and job.d.alive

    # ------------------------------------------------------------ no way

    def cut(self, a: str, b: str, knows_s: float | None) -> None:
        """Nothing passes between these two from now on; what is under way breaks off. A reader knows after `knows_s`, by default when it
        has asked."""
        way = frozenset((a, b))
        self.cuts[way] = self.scene.asking_s if knows_s is None else knows_s
        self.prefixes.cut(a, b)
        for job in list(self.scene.jobs.values()):
            src, dst = (job.p, job.d) if job.target is None else (job.d, job.target)
            if job.transfer is None or src is None or dst is None or way != {src.name, dst.name}:
                continue
            self.cancel(job)
            if job.tseq is None:
                self._block(job)
            else:
                self._uncopied(job, job.tseq)

    def mend(self, a: str, b: str) -> None:
        self.cuts.pop(frozenset((a, b)), None)

    def _is_cut(self, src: SimInstance, dst: SimInstance) -> bool:
        return frozenset((src.name, dst.name)) in self.cuts

    def _block(self, job: Job) -> None:
        """A hand-off's KV does not come."""
        assert job.p is not None and job.d is not None
        if self.pulls:
            call_later(self.scene.env, self.cuts[frozenset((job.p.name, job.d.name))], self._unreached, (job, job.dseq))
            return
        job.blocked = True
        if job.pseq is not None:
            job.p.release(job.pseq)

    def _unreached(self, event: DueCall) -> None:
        job, dseq = event.value
        if not self._waits(job, dseq):
            return
        p, d = job.p, job.d
        job.d = job.dseq = None
        job.refused()
        self.scene.drop(job, d, dseq)
        self.scene.tell(Unreachable(job.request.id, job.attempt, p.name, d.name, f"{p.name} does not answer", held=True))

    def _uncopied(self, job: Job, tseq: Sequence | None) -> None:
        """A migration's KV does not come."""
        assert job.d is not None and job.target is not None
        call_later(self.scene.env, self.cuts[frozenset((job.d.name, job.target.name))], self._uncopied_is_known, (job, tseq))

    def _uncopied_is_known(self, event: DueCall) -> None:
        job, tseq = event.value
        if job.tseq is tseq and not job.done:
            self.call_off(job, f"{job.d.name} does not answer", reached=False)

    # ------------------------------------------------------------ push

    def step_started(self, job: Job, seq: Sequence, tokens: int, seconds: float) -> None:
        """By layer: a chunk is being computed, for `seconds`."""
        size = self._unsent(job, seq.computed + tokens, seq)
        if size:
            self._push(job, size, size / seconds, seconds / self.mode.layers)

    def step_ended(self, job: Job, seq: Sequence) -> None:
        """A chunk is computed: by chunk, send it; by layer, nothing holds its last layers back any more."""
        if self.by_chunk:
            size = self._unsent(job, seq.computed, seq)
            if size:
                self._push(job, size, math.inf, 0.0)
        elif job.transfer is not None:
            self.network.set_limit(job.transfer, math.inf)

    def close(self, job: Job) -> None:
        """The prompt is computed and all of it is in the push."""
        assert job.transfer is not None and job.d is not None
        job.handed_off(self.scene.env.now, job.d.name)
        job.streaming = False
        self.network.close(job.transfer)

    def cancel(self, job: Job) -> None:
        if self.prefixes.under_way:
            self.prefixes.cancel(job)
        if job.transfer is not None:
            self.network.cancel(job.transfer)
            job.transfer = None
        job.streaming = False

    def _unsent(self, job: Job, computed: int, seq: Sequence) -> float:
        """Bytes that the decode instance lacks when `computed` tokens are there, and that are to be sent now. What this instance found in
        its own prefix cache goes along with the first push."""
        assert job.p is not None and job.d is not None and job.dseq is not None
        first = max(job.dseq.cached_tokens, job.pushed_tokens)
        if computed <= first:
            return 0.0
        job.pushed_tokens = computed
        return job.d.kv_size.size_bytes(first, computed, seq.prompt_tokens, job.p.kv_size)

    def _push(self, job: Job, size: float, limit: float, delay_s: float) -> None:
        if job.transfer is None:
            self._start(job, size, limit=limit, delay_s=delay_s, streaming=True)
        else:
            self.network.extend(job.transfer, size)
            self.network.set_limit(job.transfer, limit)

    def _start(
        self, job: Job, size: float, *, limit: float = math.inf, delay_s: float = 0.0, streaming: bool = False, asks: bool = False
    ) -> None:
        """`asks`: the decode instance has to, once more over the same way."""
        assert job.p is not None and job.d is not None
        if not job.d.alive:
            return  # nobody knows yet; the router hears of it as Left
        if job.blocked or (self.cuts and self._is_cut(job.p, job.d)):
            self._block(job)
            return
        size += self.mode.state_bytes
        job.transfer_start_s = self.scene.env._now
        if streaming or job.paced:
            job.streaming = job.paced = streaming
        path = self.network.path(job.p.name, job.d.name)
        if asks:
            delay_s = path.latency_s
        delay_s += self.mode.setup_s
        job.transfer = self.network.send(path, size, self._landed, limit, delay_s, streaming, job)
        job.flows_s = job.transfer_start_s + delay_s + path.latency_s

    def _landed(self, transfer: Transfer) -> None:
        """The KV is complete on the decode instance."""
        job: Job = transfer.owner
        job.transfer = None
        p, d, pseq, dseq = job.p, job.d, job.pseq, job.dseq
        assert p is not None and d is not None and pseq is not None and dseq is not None
        now = self.scene.env._now
        job.transferred(now, transfer.size_bytes)
        p.jobs.pop(job, None)
        if p.alive:
            p.release(pseq)
        d.worker.arrive(dseq, 0 if dseq.made else 1)
        d.kick()
        seconds = 0.0 if job.paced or now < job.flows_s else now - job.flows_s
        self.scene.teller.tell(Transferred(job.index, job.attempt, d.name, round(transfer.size_bytes), seconds), now)

    # ------------------------------------------------------------ migration

    def migrate(self, action: Migrate) -> None:
        job = self.scene.jobs.get(action.request_id)
        if job is None or job.attempt != action.attempt:
            return
        src, seq, dst = job.d, job.active, self.scene.instances[action.dst]
        if not dst.alive:
            self.scene.asked(dst)
        reason = "it does not run there" if src is None or seq is None or not (src.alive and dst.alive) else src.worker.export(seq)
        if src is None or seq is None or reason:
            self._failed(job, action.src, action.dst, reason)
            return
        src.sync()
        tokens = src.scheduler.kv_tokens(seq)
        tseq = Sequence(job.request.id, job.attempt, tokens, seq.output_tokens, job.context_hashes, priority=seq.priority, owner=job)
        tseq.like(seq)
        if not dst.reserve(tseq):
            self.scene.refuse(job, dst)
            return
        dst.jobs[job] = None
        job.target, job.tseq = dst, tseq
        job.staging = Staging(src.scheduler.pool.block_tokens, tseq.cached_tokens)
        job.copied_bytes = job.copied_s = 0.0
        self._copy(job, tokens, last=False)

    def _copy(self, job: Job, tokens: int, *, last: bool) -> None:
        """Copy what has come since the last stage, up to `tokens` in all."""
        assert job.d is not None and job.target is not None and job.tseq is not None and job.staging is not None
        if self._is_cut(job.d, job.target):
            self._uncopied(job, job.tseq)
            return
        new = job.staging.copy(tokens)
        size = job.target.kv_size.size_bytes(tokens - new, tokens, tokens, job.d.kv_size) + (self.mode.state_bytes if last else 0.0)
        landed = partial(self._copied, job, job.tseq, last)
        job.transfer = self.network.transfer(job.d.name, job.target.name, size, landed, owner=job)
        job.flows_s = self.scene.env.now + job.transfer.path.latency_s

    def _copied(self, job: Job, tseq: Sequence, last: bool, transfer: Transfer) -> None:
        job.transfer = None
        job.copied(transfer.size_bytes)
        job.copied_bytes += transfer.size_bytes
        job.copied_s += max(0.0, self.scene.env.now - job.flows_s)
        src, dst, seq = job.d, job.target, job.active
        assert src is not None and dst is not None and seq is not None and job.tseq is tseq and job.staging is not None
        if last:
            self._commit(job, src, dst, seq, tseq)
            return
        if reason := src.worker.export(seq):
            self.call_off(job, reason)
            return
        src.sync()
        tokens = src.scheduler.kv_tokens(seq)
        if job.staging.stops(tokens):
            src.when_between_steps(partial(self._stop, job, tseq))
        elif dst.extend(tseq, tokens):
            self._copy(job, tokens, last=False)
        else:
            self.call_off(job, f"{dst.name} is full")

    def _stop(self, job: Job, tseq: Sequence) -> None:
        """At a step boundary of the source: stand still, and copy the rest."""
        src, dst, seq = job.d, job.target, job.active
        if job.tseq is not tseq or job.done or src is None or dst is None or seq is None:
            return
        runs = src.runs(seq)
        if reason := src.worker.stop(seq, self.scene.env.now):
            self.call_off(job, reason)
            return
        if runs:
            job.last_token_s = src.emitted_s
        job.migrating()
        if dst.extend(tseq, seq.prompt_tokens):
            self._copy(job, seq.prompt_tokens, last=True)
        else:
            self.call_off(job, f"{dst.name} is full")

    def _commit(self, job: Job, src: SimInstance, dst: SimInstance, seq: Sequence, tseq: Sequence) -> None:
        tseq.made = seq.made
        tseq.preempted += seq.preempted
        job.migrated(dst.name)
        job.d, job.dseq, job.target, job.tseq = dst, tseq, None, None
        src.jobs.pop(job, None)
        src.release(seq)
        dst.requests += 1
        dst.worker.arrive(tseq)
        dst.kick()
        self.scene.tell(Migrated(job.request.id, job.attempt, src.name, dst.name, round(job.copied_bytes), job.copied_s))

    def call_off(self, job: Job, reason: str, *, reached: bool = True) -> None:
        """Give a migration up: the source goes on, the target frees what it reserved."""
        src, dst, seq, tseq = job.d, job.target, job.active, job.tseq
        if dst is None or tseq is None or src is None:
            return
        self.cancel(job)
        job.target = job.tseq = None
        self.scene.drop(job, dst, tseq)
        if src.alive and seq is not None:
            src.worker.resume(seq)
            src.kick()
        if reached:
            self._failed(job, src.name, dst.name, reason)
        else:
            self.scene.tell(Unreachable(job.request.id, job.attempt, src.name, dst.name, reason, held=True))

    def _failed(self, job: Job, src: str, dst: str, reason: str) -> None:
        self.scene.tell(TransferFailed(job.request.id, job.attempt, src, dst, reason))
