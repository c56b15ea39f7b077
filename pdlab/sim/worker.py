"""A simulated instance: its worker decides, the cost model says how long it takes, SimPy sleeps.

Many identical decode steps are slept through at once (a *run*). With n sequences, c context tokens and a step cost base + slope * c, k
steps take k * (base + slope * c) + slope * n * k (k - 1) / 2 seconds, since every step adds n tokens of context. When something stirs
the scheduler in the middle, the run is cut at the next step boundary, found by solving that sum for k; a wake-up that a cut has made
stale is recognised by its generation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from math import ceil, inf, sqrt
from typing import Protocol

import simpy

from pdlab.core.batch import Batch
from pdlab.core.scheduler import NOTHING, Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import InstanceSpec, Report, Role
from pdlab.core.worker import Worker
from pdlab.cost.base import Cost
from pdlab.results.metrics import Gaps
from pdlab.results.timeline import Timeline
from pdlab.sim.calls import call_at, call_later
from pdlab.sim.due_call import DueCall
from pdlab.sim.host import Host
from pdlab.sim.kv_size import ANY_SIZE, KvSize


class Owner(Protocol):
    """What an instance tells its world."""

    follows_chunks: bool  # it wants to hear of `batch_ended`

    def batch_started(self, instance: SimInstance, batch: Batch, now: float, seconds: float) -> None:
        """Prompt chunks are under way."""

    def batch_ended(self, instance: SimInstance, batch: Batch) -> None:
        """Prompt chunks are computed."""

    def preempted(self, instance: SimInstance, victims: list[Sequence]) -> None:
        """These gave their blocks up."""

    def first_steps(self, joined: list[Sequence], now: float, at_s: float) -> None:
        """These sequences have just joined the running; their next token comes at `at_s`."""

    def prefilled(self, instance: SimInstance, seq: Sequence, now: float) -> None: ...

    def finished(self, instance: SimInstance, seq: Sequence, now: float) -> None: ...

    def overdue(self, instance: SimInstance, seq: Sequence) -> None:
        """Its lease ends now, unless it is renewed."""

    def drained(self, instance: SimInstance) -> None: ...

    def wake(self, event: DueCall) -> None:
        """Its `value` is an instance that is to `wake` now."""


class SimInstance:
    """`spec` says who it is; `index` is its place in every record."""

    __slots__ = (
        "_step_over",
        "alive",
        "began_s",
        "compute_bound_from",
        "compute_bound_s",
        "cost",
        "cut",
        "decode_busy_s",
        "decode_longer",
        "decode_tokens",
        "env",
        "gaps",
        "generation",
        "horizon",
        "host",
        "index",
        "jobs",
        "joined_s",
        "k",
        "kv_size",
        "lines",
        "lived_s",
        "longer",
        "name",
        "new_size_s",
        "owner",
        "peak_blocks",
        "prefill_busy_s",
        "prefill_tokens",
        "reports_at_rest",
        "requests",
        "scheduler",
        "sizes",
        "slope_s",
        "spans",
        "spec",
        "step_s",
        "switches",
        "up_s",
        "wakes",
        "worker",
    )

    def __init__(
        self,
        env: simpy.Environment,
        owner: Owner,
        spec: InstanceSpec,
        scheduler: Scheduler,
        cost: Cost,
        gaps: Gaps,
        *,
        horizon: int = 1 << 30,
        host: Host | None = None,
        new_size_s: float = 0.0,
        kv_size: KvSize = ANY_SIZE,
    ) -> None:
        self.index = -1
        self.kv_size = kv_size
        self.new_size_s = new_size_s  # that the first step with prompts of each size takes longer
        self.sizes: set[int] = set()  # tokens of such steps so far
        self.host = host  # whose other instances slow this one; the horizon is 1 then
        self.longer = self.decode_longer = 1.0  # by what its steps are multiplied: those with prompts, and those that only decode
        self.horizon = horizon  # steps slept through at once, at most; 1 is one event a step
        self.env, self.owner, self.scheduler, self.cost, self.gaps = env, owner, scheduler, cost, gaps
        self.worker = Worker(scheduler, name=spec.name, incarnation=spec.incarnation, role=spec.role)
        self.spec = spec
        self.name = spec.name
        self.jobs: dict[Timeline, None] = {}  # that involve it now
        self.alive = True
        self.wakes = False  # at the next deadline
        self.spans: list[tuple[int, float, float, str, int, int]] | None = None
        self.cut = False  # the run under way ends at the next boundary already
        self.generation = 0
        self.k = 0  # steps of the run under way; 1 when it cannot be cut, which includes that it is just being wound up
        self.began_s = 0.0  # when the first of them began
        self.step_s = 0.0  # its duration
        self.slope_s = 0.0  # by which each next step takes longer
        self.lines: dict[int, tuple[float, float, float]] = {}
        sizes = range(1, scheduler.max_seqs + 1)
        self.compute_bound_from = 1 + bisect_left(sizes, True, key=cost.decode_is_compute_bound)  # decode batches bound by arithmetic
        self._step_over: Callable[[DueCall], None] = self._done  # a method is made anew whenever it is asked for
        self.joined_s = self.up_s = env.now
        self.lived_s = 0.0
        self.prefill_busy_s = self.decode_busy_s = self.compute_bound_s = 0.0
        self.peak_blocks = self.requests = self.prefill_tokens = self.decode_tokens = self.switches = 0
        self.reports_at_rest = 0  # that were not made, as there was no load

    @property
    def batch(self) -> Batch | None:
        return self.worker.batch

    @property
    def emitted_s(self) -> float:
        """When the running sequences got their last token."""
        return self.worker.meter.ended_s

    @property
    def role(self) -> Role:
        return self.worker.role

    # ------------------------------------------------------------ the loop

    def kick(self) -> None:
        """Something was given to it: start if idle, cut the run under way if it would go on otherwise."""
        worker = self.worker
        if worker.batch is None:
            if self.alive and (self.scheduler.stirred or worker.draining):
                self._start(self.env._now)
        elif self.k > 1 and not self.cut and self.scheduler.stirred:
            self._cut()

    def _start(self, now: float) -> None:
        scheduler = self.scheduler
        batch = self.worker.next_batch(now)
        if scheduler.victims:
            self.owner.preempted(self, scheduler.victims)
        if batch is None:
            if self.worker.draining and self.worker.drained():
                self.owner.drained(self)
            return
        self.began_s = now
        n, context = batch.decodes, batch.context_tokens
        if batch.chunks:
            cost = self.cost
            chunks = [(tokens, seq.computed) for seq, tokens in batch.chunks]
            step_s = cost.mixed_s(chunks, n, context) if n else cost.prefill_s(chunks)
            saving_s = cost.unfinished_chunk_saving_s
            if saving_s and not n and all(seq.computed + tokens < seq.prompt_tokens for seq, tokens in batch.chunks):
                step_s = max(0.0, step_s - saving_s)
            if self.new_size_s or self.host is not None:
                size = n + sum([tokens for tokens, _ in chunks])
                if size not in self.sizes:
                    self.sizes.add(size)
                    step_s += self.new_size_s
                if self.host is not None:
                    step_s += self.host.extra_s(self, size)
            if cost.joins and scheduler.joined:
                step_s += self._join_s()
            step_s *= self.longer
            seconds = step_s
            self.k, self.step_s, self.slope_s = 1, step_s, 0.0
            self.owner.batch_started(self, batch, now, step_s)
        else:
            base_s, per_token_s, until = self.lines.get(n) or self._line(n, context)
            k = batch.repeat
            if k > self.horizon:
                k = self.horizon
            if until != inf:
                k = min(k, max(1, ceil((until - context) / n)))
            step_s = base_s + per_token_s * context
            slope_s = per_token_s * n
            if self.cost.joins and scheduler.joined:
                k = 1
                step_s += self._join_s()
            if self.host is not None:
                step_s += self.host.extra_s(self, 0)
            longer = self.decode_longer
            self.step_s = step_s = step_s * longer
            self.slope_s = slope_s = slope_s * longer
            self.k, self.cut = k, False
            seconds = k * step_s + slope_s * (k * (k - 1) / 2)
        if scheduler.joined:
            self.owner.first_steps(scheduler.joined, now, now + step_s)
        self.generation = generation = self.generation + 1
        call_at(self.env, now + seconds, self._step_over, generation)

    def stretch(self, seconds: float) -> None:
        """The single step under way takes longer."""
        self.step_s += seconds
        self.generation = generation = self.generation + 1
        call_later(self.env, self.began_s + self.step_s - self.env.now, self._step_over, generation)

    def slow_down(self, longer: float, decode_longer: float) -> None:
        """Steps with prompts take `longer` times as long as the cost model says from now on, others `decode_longer` times, and so does what
        is left of the step under way."""
        before = (self.longer, self.decode_longer)
        self.longer, self.decode_longer = longer, decode_longer
        batch = self.worker.batch
        if batch is None:
            return
        ratio = longer / before[0] if batch.chunks else decode_longer / before[1]
        self.sync()
        if self.k > 1 and not self.cut:
            self._cut()
        if self.k == 1:
            self.stretch((ratio - 1.0) * (self.began_s + self.step_s - self.env.now))

    def _join_s(self) -> float:
        """What their first decode step takes more."""
        return self.cost.join_s([(seq.prompt_tokens - seq.cached_tokens, seq.cached_tokens) for seq in self.scheduler.joined])

    def _line(self, n: int, context: int) -> tuple[float, float, float]:
        """`Cost.decode_line`, remembered where it never bends, neither after `context` nor before."""
        line = self.cost.decode_line(n, context)
        if line[2] == inf and line == self.cost.decode_line(n, 0):
            self.lines[n] = line
        return line

    def reserve(self, seq: Sequence, others: list[Sequence] = NOTHING) -> bool:
        """`Worker.reserve`, as single steps would see it. Where blocks are ample for the whole run under way, that needs no look at
        how far it has come."""
        worker, batch = self.worker, self.worker.batch
        if batch is None or self.k == 1:
            return worker.reserve(seq, others)
        pool = self.scheduler.pool
        growth = batch.decodes * (self.k // pool.block_tokens + 1) * pool.shares
        blocks = -(-seq.prompt_tokens // pool.block_tokens) if not pool.windows else pool.held(seq.prompt_tokens)
        used = pool.used + len(pool.idle) * pool.idle_unit
        if growth + blocks + self.scheduler.spare_blocks <= pool.total - used:
            return worker.reserve(seq, others)
        self.sync()
        if not worker.reserve(seq, others):
            return False
        self._tighten()
        return True

    def lend(self, seq: Sequence) -> bool:
        """`Worker.lend`, likewise, until it is released."""
        self.sync()
        if not self.worker.lend(seq):
            return False
        self._tighten()
        return True

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """`Worker.extend`, likewise."""
        self.sync()
        if not self.worker.extend(seq, tokens):
            return False
        self._tighten()
        return True

    def release(self, seq: Sequence) -> None:
        """`Worker.release`, likewise: blocks that come free now were not there for the steps that are done."""
        if self.k > 1:
            self.sync()
        self.worker.release(seq)
        self.kick()

    def _tighten(self) -> None:
        """Blocks were taken in the middle of a run: cut it if they might be missed before its end."""
        batch, pool = self.worker.batch, self.scheduler.pool
        if batch is None or self.k <= 1 or self.cut:
            return
        if batch.decodes * (self.k // pool.block_tokens + 1) * pool.shares > pool.available:
            self._cut()

    def _steps_by(self, elapsed_s: float) -> int:
        """Whole steps of the run done after `elapsed_s`."""
        a = self.slope_s / 2
        b = self.step_s - a
        if a > 1e-18:
            steps = int((sqrt(b * b + 4 * a * elapsed_s) - b) / (2 * a) + 1e-9)
        else:
            steps = int(elapsed_s / b + 1e-9)
        return steps if steps < self.k else self.k - 1

    def _cut(self) -> None:
        now, began_s = self.env._now, self.began_s
        steps = self._steps_by(now - began_s) + 1
        self.cut = True
        if steps < self.k:
            self.k = steps
            left_s = began_s + steps * self.step_s + self.slope_s * (steps * (steps - 1) / 2) - now
            self.generation = generation = self.generation + 1
            call_at(self.env, now + left_s if left_s > 0.0 else now, self._step_over, generation)

    def sync(self) -> None:
        """Book the steps of the run that are done by now, so that whoever looks sees what single steps would show."""
        batch = self.worker.batch
        if batch is None or self.k <= 1:
            return
        steps = self._steps_by(self.env._now - self.began_s)
        if steps > 0:
            seconds = self._book(batch, steps)
            self.worker.advance(batch, steps)
            self.k -= steps
            self.began_s += seconds
            self.step_s += self.slope_s * steps

    def _book(self, batch: Batch, steps: int) -> float:
        """Account for `steps` done from `began_s` on: token gaps, busy time. Returns their seconds."""
        n, step_s, slope_s = batch.decodes, self.step_s, self.slope_s
        if not n:
            self.worker.meter.computed(batch, step_s)
            self.prefill_busy_s += step_s
            if self.spans is not None:
                self._span(batch, 1, step_s)
            return step_s
        seconds = steps * step_s + slope_s * (steps * (steps - 1) / 2)
        began_s, joined = self.began_s, len(self.scheduler.joined)
        meter = self.worker.meter
        pause_s = began_s - meter.ended_s
        meter.took(batch, joined, began_s, seconds, steps, step_s + slope_s * (steps - 1))
        if not joined and pause_s < 1e-9:
            self.gaps.add_run(n, step_s, slope_s, steps)
        else:  # those that joined have their first gap counted already, the others have waited `pause_s` more
            if n > joined:
                self.gaps.add_run(n - joined, pause_s + step_s, 0.0, 1)
            if steps > 1:
                self.gaps.add_run(n, step_s + slope_s, slope_s, steps - 1)
            self.scheduler.joined = NOTHING
        self.decode_tokens += n * steps
        if batch.chunks:
            self.prefill_busy_s += seconds
        else:
            self.decode_busy_s += seconds
            if n >= self.compute_bound_from:
                self.compute_bound_s += seconds
        if self.spans is not None:
            self._span(batch, steps, seconds)
        return seconds

    def _done(self, event: DueCall) -> None:
        if event.value != self.generation:
            return  # cut, or dead, since
        worker, scheduler, owner = self.worker, self.scheduler, self.owner
        batch, k, now = worker.batch, self.k, self.env._now
        assert batch is not None
        self._book(batch, k)
        used = scheduler.pool.used
        if used > self.peak_blocks:
            self.peak_blocks = used
        prefilled, finished = worker.complete(batch, k, now)
        self.k = 1  # what comes in from here on waits for the end of this
        if self.host is not None:
            self.host.step_ended(self, batch.decodes + len(prefilled))
        if batch.chunks:
            self.prefill_tokens += batch.prompt_tokens
            if owner.follows_chunks:
                owner.batch_ended(self, batch)
        if prefilled and finished:
            self._tell_in_order(batch, prefilled, finished, now)
        else:
            for seq in finished:
                owner.finished(self, seq, now)
            for seq in prefilled:
                owner.prefilled(self, seq, now)
        if worker.waits:
            worker.settle()
        if scheduler.running or scheduler.waiting or scheduler.landed or scheduler.prefilling or worker.draining:
            if self.alive:
                self._start(now)
        else:
            worker.settle()
        if worker.due and not self.wakes:
            self._await_wake()

    def _tell_in_order(self, batch: Batch, prefilled: list[Sequence], finished: list[Sequence], now: float) -> None:
        """What decoded comes first, then the prompts in the batch's order, as a live instance answers: also those whose first token was
        their last."""
        prompts = {seq.order: at for at, (seq, _) in enumerate(batch.chunks)}
        first = {id(seq) for seq in finished if seq.order in prompts and not seq.decodes_here}
        for seq in finished:
            if id(seq) not in first:
                self.owner.finished(self, seq, now)
        ended = [seq for seq in finished if id(seq) in first]
        for seq in sorted([*ended, *prefilled], key=lambda seq: prompts.get(seq.order, len(prompts))):
            if id(seq) in first:
                self.owner.finished(self, seq, now)
            else:
                self.owner.prefilled(self, seq, now)

    def _await_wake(self) -> None:
        """Be woken at the next deadline."""
        due_s = self.worker.wake_s()
        self.wakes = due_s is not None
        if due_s is not None:
            call_later(self.env, max(0.0, due_s - self.env.now), self.owner.wake, self)

    def wake(self) -> None:
        """A deadline has come, unless it was moved."""
        for seq in self.worker.overdue(self.env.now):
            self.owner.overdue(self, seq)
        self._await_wake()

    def when_between_steps(self, call: Callable[[], None]) -> None:
        """Run `call` at the next step boundary; at once when nothing is under way."""
        self.worker.between_steps(call)
        self.kick()
        if self.worker.due and not self.wakes:
            self._await_wake()

    def abort(self, seq: Sequence) -> None:
        """Take a sequence off, at the next step boundary if it may be in the step under way."""
        self.worker.abort(seq)
        self.kick()

    def made_by_now(self, seq: Sequence) -> int:
        """Tokens a sequence has made, as single steps would show."""
        made = self.scheduler.made(seq)
        if self.batch is not None and self.k > 1 and self.runs(seq):
            made += self._steps_by(self.env.now - self.began_s)
        return made

    def runs(self, seq: Sequence | None) -> bool:
        """Is it decoding here now?"""
        return self.alive and seq is not None and self.scheduler.running.get(seq.order) is seq

    @property
    def rests(self) -> bool:
        """Does it neither do nor hold anything?"""
        worker = self.worker
        return worker.batch is None and not worker.draining and not self.scheduler.pool.used and not self.scheduler.waiting

    def die(self) -> None:
        self.alive = False
        self.generation += 1
        self.worker.die()

    # ------------------------------------------------------------ what it says of itself

    def report(self) -> Report:
        if self.k > 1:
            self.sync()
        return self.worker.report(self.env._now)

    def _span(self, batch: Batch, steps: int, seconds: float) -> None:
        assert self.spans is not None
        kind = "mixed" if batch.chunks and batch.decodes else "prefill" if batch.chunks else "decode"
        tokens = sum(t for _, t in batch.chunks) + batch.decodes * steps
        self.spans.append((self.index, self.began_s, self.began_s + seconds, kind, len(batch.chunks) + batch.decodes, tokens))
