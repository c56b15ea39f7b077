"""What an instance tells of its load, from its scheduler's state: the one place where a `Report` is made, whoever runs the instance."""

from __future__ import annotations

from math import inf

from pdlab.core.batch import Batch
from pdlab.core.scheduler import Scheduler
from pdlab.core.types import Report, StepTime

ALONE, DECODE, BESIDE = range(3)


class Meter:
    """What is remembered of an instance's steps for its reports: sums since the start, and of the steps since the last report the longest
    prompt computed alone, the last decode alone, and the longest prompt beside decodes."""

    __slots__ = ("_alone", "_alone_s", "_beside", "_beside_s", "_decode", "decode_s", "decode_steps", "ended_s")

    def __init__(self) -> None:
        self.decode_steps = 0
        self.decode_s = 0.0
        self.ended_s = inf  # when a decode step last ended
        self._decode: tuple[int, int, float] | None = None  # batch, context, seconds
        self._alone: Batch | None = None
        self._beside: Batch | None = None
        self._alone_s = self._beside_s = 0.0

    def took(self, batch: Batch, joined: int, began_s: float, seconds: float, steps: int, last_s: float, each: float = 1.0) -> None:
        """`steps` of a batch took `seconds` from `began_s` on, the last of them `last_s`. `joined`: how many of its decodes had their first
        here. `batch.context_tokens` is still that of the first. `each`: tokens that a sequence made in a step, in the mean, drafts
        included; what is told of decode steps is the time of one."""
        n = batch.decodes
        if not n:
            self.computed(batch, last_s)
            return
        if self.ended_s < began_s and n > joined:
            self.decode_s += (began_s - self.ended_s) / each  # they have waited, too
        self.ended_s = began_s + seconds
        self.decode_s += seconds / each
        self.decode_steps += steps
        if not batch.chunks:
            self._decode = (n, batch.context_tokens + n * (steps - 1), last_s / each)
        elif self._beside is None or batch.prompt_tokens >= self._beside.prompt_tokens:
            self._beside, self._beside_s = batch, last_s

    def computed(self, batch: Batch, seconds: float) -> None:
        """`took`, of a batch that only has prompts."""
        if self._alone is None or batch.prompt_tokens >= self._alone.prompt_tokens:
            self._alone, self._alone_s = batch, seconds

    def drain(self) -> tuple[StepTime, ...]:
        """The steps to tell of; they are told once."""
        steps = []
        if self._alone is not None:
            steps.append(_step(self._alone, self._alone_s))
        if self._decode is not None:
            steps.append(StepTime(self._decode[0], self._decode[1], 0, 0, self._decode[2]))
        if self._beside is not None:
            steps.append(_step(self._beside, self._beside_s))
        self._alone = self._decode = self._beside = None
        return tuple(steps)


def _step(batch: Batch, seconds: float) -> StepTime:
    return StepTime(batch.decodes, batch.context_tokens, batch.prompt_tokens, batch.squared_tokens, seconds)


def keep_recent(recent: dict[int, StepTime], step: StepTime) -> None:
    """Of steps that a `Meter` has told, and that wait to be told on: those that it would tell of them all."""
    kind = DECODE if not step.prompt_tokens else BESIDE if step.batch else ALONE
    known = recent.get(kind)
    if known is None or step.prompt_tokens >= known.prompt_tokens:
        recent[kind] = step


def report_of(scheduler: Scheduler, meter: Meter, name: str, incarnation: int, now: float) -> Report:
    """An instance's load now, as far as its scheduler's books go. What changed in its prefix cache, and its steps, are told once."""
    pool, waiting = scheduler.pool, scheduler.waiting
    stored, evicted = pool.drain_events()
    head_blocks = waiting_blocks = 0
    if waiting:
        size = pool.held if pool.windows else pool.blocks
        head_blocks = pool.whole(size(waiting[0].prompt_tokens))
        for seq in waiting:
            waiting_blocks += size(seq.prompt_tokens)
        waiting_blocks = pool.whole(waiting_blocks)
    running = len(scheduler.running) + len(scheduler.landed)
    if scheduler.prefilling or scheduler.computing:
        running += prefilling(scheduler)
    return Report(
        name,
        incarnation,
        now,
        len(waiting),
        scheduler.waiting_tokens,
        running,
        scheduler.context_tokens,
        -(-pool.used // pool.shares),
        (pool.total - pool.used) // pool.shares,
        head_blocks,
        waiting_blocks,
        scheduler.preemptions,
        meter.decode_steps,
        meter.decode_s,
        stored,
        evicted,
        meter.drain(),
    )


def prefilling(scheduler: Scheduler) -> int:
    """Sequences whose prompt is partly computed, or all of it in the step under way."""
    partly = scheduler.prefilling
    count = len(partly)
    for seq, _ in scheduler.computing:
        if seq.holding is not None and seq not in partly:
            count += 1
    return count
