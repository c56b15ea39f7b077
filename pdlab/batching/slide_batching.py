"""Deadlines and predicted step times: whoever is about to be late goes first, and a step lasts no longer than the nearest deadline allows.
Source: xLLM's ProServe (SlideBatching).

The first token is due TTFT after the request came, and each further one TPOT after that. A request's slack s is what is left until then; e
is what its work adds to a step, and c what any step costs. The step's budget is B = max(least s that is at least e + c, 0.65 x least TPOT).
Urgent is who has s < urgency x sum(e) x B / (B - c).

The urgent come first: decodes, then prompts by weight / e, of which the starved (s < -starvation x TTFT) lead. The others come by
deadline. The step is filled up to B with the largest chunks that fit; none has 50 tokens or fewer, but for the rest of a prompt. A
request weighs 2 to the power of its priority.

An instance of pdlab decodes all its sequences or none, so that decodes are one item, as urgent as the most urgent of them. TPOT counts of
those that decode here: without any, a step is bound by feasible deadlines and by tokens. `as_found`: where nobody can be in time any more,
it has no bound but tokens, as in the original; else it is 0.65 x TPOT.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Annotated, NamedTuple

from pdlab.core.foresight import Foresight
from pdlab.core.policy import Range
from pdlab.core.predict import DecodePredictor, PrefillPredictor, learn
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import StepTime


class Work(NamedTuple):
    """A prompt (`seq`), or all decodes (None). `seconds` is e."""

    seq: Sequence | None
    slack_s: float
    seconds: float
    starved: bool = False
    density: float = inf


@dataclass
class SlideBatching(Foresight):
    urgency: Annotated[float, Range(ge=0.0)] = 1.0
    starvation: Annotated[float, Range(ge=0.0)] = 1.0
    tpot_share: Annotated[float, Range(gt=0.0, le=1.0)] = 0.65
    least_chunk_tokens: Annotated[int, Range(ge=0)] = 50
    as_found: bool = False

    def __post_init__(self) -> None:
        self.profile((), ())

    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None:
        self._prefill, self._decode = PrefillPredictor(prefill), DecodePredictor(decode)

    def learn(self, step: StepTime) -> None:
        learn(self._prefill, self._decode, step)

    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        prompts = [self._prompt(seq, scheduler, now) for seq in (*scheduler.prefilling, *scheduler.waiting)]
        each = [self._step(seq, scheduler, now) for seq in scheduler.running.values()]
        works = list(prompts)
        if each:
            works.append(Work(None, min(one.slack_s for one in each), sum(one.seconds for one in each)))
        budget_s = self.budget_s([*prompts, *each], scheduler)
        urgent, others = self._order(works, budget_s)
        return self._fill(scheduler, urgent, others, budget_s - self.overhead_s)

    @property
    def overhead_s(self) -> float:
        """c: the constant part of a step."""
        prefill, decode = self._prefill, self._decode
        return max(0.0, prefill.a * prefill.correction.factor, decode.a * decode.correction.factor)

    def budget_s(self, works: list[Work], scheduler: Scheduler) -> float:
        """B."""
        feasible_s = min((one.slack_s for one in works if one.slack_s >= one.seconds + self.overhead_s), default=None)
        if feasible_s is None and self.as_found:
            return inf
        sequences = (*scheduler.prefilling, *scheduler.waiting, *scheduler.running.values())
        tpot_s = min((seq.tpot_slo_s for seq in sequences if seq.decodes_here), default=0.0)
        return max(feasible_s or 0.0, self.tpot_share * tpot_s) or inf

    def _prompt(self, seq: Sequence, scheduler: Scheduler, now: float) -> Work:
        done = seq.computed if seq.holding is not None else scheduler.cached(seq)
        seconds = self.chunk_s(seq.prompt_tokens - done, done)
        slack_s = due_s(seq, seq.made) - now
        return Work(seq, slack_s, seconds, slack_s < -self.starvation * seq.ttft_slo_s, weight(seq) / max(seconds, 1e-9))

    def _step(self, seq: Sequence, scheduler: Scheduler, now: float) -> Work:
        return Work(seq, due_s(seq, scheduler.made(seq)) - now, self._decode.share_s(1, scheduler.kv_tokens(seq) + 1))

    def _order(self, works: list[Work], budget_s: float) -> tuple[list[Work], list[Work]]:
        """The urgent, and the others."""
        room_s = max(budget_s - self.overhead_s, 1e-9)
        load_s = sum(one.seconds for one in works) * (budget_s / room_s if budget_s < inf else 1.0)
        urgent = [one for one in works if one.slack_s < self.urgency * load_s]
        others = [one for one in works if not one.slack_s < self.urgency * load_s]
        urgent.sort(key=lambda one: (one.seq is not None, not one.starved, one.slack_s if one.starved else -one.density))
        return urgent, sorted(others, key=lambda one: one.slack_s)

    def _fill(self, scheduler: Scheduler, urgent: list[Work], others: list[Work], left_s: float) -> tuple[list[tuple[Sequence, int]], bool]:
        """The batch. Where not even the least chunk fits, and nothing decodes, time is no bound."""
        chunks: list[tuple[Sequence, int]] = []
        decodes, room = False, 0 if scheduler.victims else scheduler.room
        tokens = scheduler.max_batch_tokens - len(scheduler.running)
        for place, one in enumerate((*urgent, *others)):
            seq = one.seq
            if seq is None:
                if place < len(urgent) or one.seconds <= left_s:
                    decodes, left_s = True, left_s - one.seconds
                continue
            waits = seq.holding is None
            chunk = self._chunk(seq, scheduler, left_s, tokens) if room > 0 or not waits else 0
            if not chunk:
                continue
            if waits and not scheduler.admit_one(seq, chunk):
                room = 0  # no blocks: whoever comes later does not overtake
                continue
            room, tokens, left_s = room - waits, tokens - chunk, left_s - self.chunk_s(chunk, seq.computed)
            chunks.append((seq, chunk))
        if chunks or scheduler.running:
            return chunks, decodes or not chunks
        return self._fill(scheduler, urgent, others, inf) if left_s < inf else ([], True)

    def _chunk(self, seq: Sequence, scheduler: Scheduler, left_s: float, tokens: int) -> int:
        """The largest that fits; 0 where that is too small."""
        done = seq.computed if seq.holding is not None else scheduler.cached(seq)
        rest = seq.prompt_tokens - done
        fits = max(0, min(tokens, rest, self._tokens_in(left_s, done)))
        return fits if fits == rest or fits > self.least_chunk_tokens else 0

    def chunk_s(self, tokens: int, done: int) -> float:
        """What a chunk after `done` tokens adds to a step."""
        p = self._prefill
        return max(0.0, p.correction.factor * (p.b * tokens + p.c * tokens * (tokens + 2 * done)))

    def _tokens_in(self, seconds: float, done: int) -> int:
        """The inverse: the tokens of a chunk that lasts so long."""
        p, most = self._prefill, 1 << 40
        linear, quadratic, seconds = p.b + 2 * p.c * done, p.c, seconds / p.correction.factor
        if seconds <= 0.0:
            return 0
        if seconds == inf or (linear <= 0.0 and quadratic <= 0.0):
            return most
        if quadratic <= 0.0:
            return int(min(most, seconds / linear))
        return int((sqrt(linear * linear + 4 * quadratic * seconds) - linear) / (2 * quadratic))


def due_s(seq: Sequence, made: int) -> float:
    """When its next token is due."""
    return seq.arrived_s + seq.ttft_slo_s + (made * seq.tpot_slo_s if made else 0.0)


def weight(seq: Sequence) -> float:
    return float(2.0 ** min(max(seq.priority, -60), 60))
