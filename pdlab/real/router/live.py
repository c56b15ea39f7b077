"""A live request: its attempt's legs, and the tokens its client has, each index once whatever brings it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from pdlab.core.types import Fetch, Request, Stage
from pdlab.real.api.backend import Ended
from pdlab.real.engine.messages import Sampling, Scored, Tokens
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import Carrier, FetchedFrom, FetchFrom
from pdlab.real.router.instances import Incarnation
from pdlab.real.router.remote import LegTokens, Prefilled
from pdlab.results.timeline import Timeline

if TYPE_CHECKING:
    from pdlab.real.api.traces import TraceSpan

Gap = Callable[[float, int], None]
Deliver = Callable[[Tokens], None]


@dataclass(slots=True, eq=False)
class Leg:
    """One leg of an attempt. `name` is its X-Request-Id. `next` are the indices, within the attempt, of each candidate's next token."""

    kind: str  # alone, prefill, decode (from KV), reserve (before prefill), target (of a migration)
    name: str
    member: Incarnation
    next: list[int]
    task: asyncio.Task[None] | None = None
    over: bool = False  # ended, or dropped: what it still says is of no account
    reserved: bool = False
    landed: bool = False  # its KV is there, or computed
    ended: int = 0  # candidates that it has brought to their end
    moved: bool = False  # its request has been migrated away
    through: Incarnation | None = None  # who passes its answer on
    goes_on_from: int = 0  # a migration's destination: how many tokens its source has made
    bytes: int = 0  # of its KV, that came in `seconds`
    seconds: float = 0.0
    span: TraceSpan | None = None
    fetch: FetchFrom | None = None  # what it reads before it computes, and what came of that
    fetched: FetchedFrom | None = None

    def cancel(self) -> None:
        self.over = True
        if self.task is not None:
            self.task.cancel()


@dataclass(frozen=True, slots=True)
class HeldKv:
    """KV that waits at a prefill instance under a lease."""

    member: Incarnation
    lease: str


@dataclass(slots=True)
class LiveCandidate:
    """One of best_of: what its client has, and what came ahead of it."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    ahead: list[tuple[int, LegTokens]] = field(default_factory=list)
    last_s: float = math.nan


class Live:
    """With one candidate an attempt goes on where the lost one ended, at index `base`. Several are made anew, alike since they are drawn
    from the same seed, and what their client has is left out. So is one whose output follows a grammar, where not every instance can be
    `given` what was made.

    What the client has is part of the prompt from then on. Where the next draw or a penalty depends on what was made, it is `given` to the
    legs that decode as the output it is, so that they go on exactly."""

    def __init__(self, request: Request, tokens: list[int], sampling: Sampling, deliver: Deliver, line: Timeline, gap: Gap) -> None:
        self.request, self.prompt, self.sampling, self.deliver, self.line, self.gap = request, tokens, sampling, deliver, line, gap
        self.candidates = [LiveCandidate() for _ in range(sampling.best_of)]
        self.attempt = 0
        self.base = 0
        self.keeps = self.single  # what the client has is not made again
        self.given: list[int] = []
        self.legs: dict[str, Leg] = {}  # "prefill", "decode" (whoever makes its tokens, or shall), "target"
        self.named = 0  # legs so far
        self.held: HeldKv | None = None
        self.prefilled: Prefilled | None = None  # this attempt's, by a leg that does not decode
        self.made: list[int] = []  # of this attempt's tokens, those its decode leg goes on from
        self.unfit = self.overload = False
        self.goes_on = True  # whoever decodes this attempt can go on from given tokens
        self.scores: list[Scored] | None = None  # of the prompt, on the way to the client
        self.fetch: Fetch | None = None  # what the next leg that computes the prompt reads first
        self.trace: Carrier | None = None  # where spans of its legs belong

    @property
    def single(self) -> bool:
        return len(self.candidates) == 1

    @property
    def finished(self) -> bool:
        return all(c.finish is not None for c in self.candidates)

    @property
    def delivered(self) -> int:
        """Output tokens of all candidates that the client has."""
        return sum(len(c.tokens) for c in self.candidates)

    @property
    def sent(self) -> int:
        """Tokens of this attempt that the client of one candidate has."""
        return len(self.candidates[0].tokens) - self.base if self.single else 0

    @property
    def kept(self) -> int:
        """Of these, the ones that count as prompt in the next attempt."""
        return self.sent if self.keeps else 0

    @property
    def looks_back(self) -> bool:
        """Does the next token depend on which ones are output?"""
        s = self.sampling
        spelled = (word for spellings in s.bad_words.values() for word in spellings)
        follows = s.structured is not None or any(len(word) > 1 for word in spelled)
        return bool(s.temperature > 0 or s.presence_penalty or s.frequency_penalty or follows)

    def begin(self, attempt: int, *, goes_on: bool) -> None:
        """A new attempt; the last one's legs are gone."""
        assert not self.legs, f"request {self.request.id}: attempt {attempt} begins beside {list(self.legs)}"
        self.attempt, self.goes_on = attempt, goes_on
        self.keeps = self.single and (goes_on or self.sampling.structured is None)
        self.base = len(self.candidates[0].tokens) if self.keeps else 0
        self.given = self.candidates[0].tokens[: self.base] if goes_on and self.looks_back else []
        self.held = self.prefilled = None
        self.made = []
        for c in self.candidates:
            c.ahead = []
        if attempt > 1:
            self.line.restarted()

    def ask(self) -> tuple[list[int], Sampling]:
        """This attempt's prompt, and what remains to be made; what is `given` aside."""
        if not self.base or self.given:
            return self.prompt, self.sampling
        sampling = msgspec.structs.replace(
            self.sampling,
            max_tokens=self.sampling.max_tokens - self.base,
            min_tokens=max(0, self.sampling.min_tokens - self.base),
        )
        return self.prompt + self.candidates[0].tokens[: self.base], sampling

    def drop(self, leg: Leg) -> None:
        """It has ended, or is cancelled."""
        leg.over = True
        self.legs = {place: other for place, other in self.legs.items() if other is not leg}

    def complete(self) -> None:
        """Candidates that have all they may have are finished, whoever broke off before it said so."""
        for number, c in enumerate(self.candidates):
            if c.finish is None and len(c.tokens) >= self.sampling.max_tokens:
                self._give(number, len(c.tokens), LegTokens(number, [], "length"), self.line.first_token_s)

    # ------------------------------------------------------------ tokens

    def take(self, leg: Leg, news: LegTokens, now: float) -> None:
        """The next tokens of a leg."""
        if news.scores is not None:
            self.scores = news.scores
        start = self.base + leg.next[news.candidate]
        leg.next[news.candidate] += len(news.tokens)
        self._take(start, news, now)

    def first(self, now: float, finish: str | None) -> None:
        """The prefill instance's token goes to the client."""
        answer = self.prefilled
        assert answer is not None
        logprobs = None if answer.logprob is None else [answer.logprob]
        self._take(self.base, LegTokens(0, [answer.token], finish, logprobs, None if answer.top is None else [answer.top]), now)
        self.made = [answer.token]

    def _take(self, start: int, news: LegTokens, now: float) -> None:
        c = self.candidates[news.candidate]
        if start > len(c.tokens):
            c.ahead.append((start, news))  # a migration's destination speaks before its source has said all
            return
        self._give(news.candidate, start, news, now)
        while c.ahead and c.ahead[0][0] <= len(c.tokens):
            start, news = c.ahead.pop(0)
            self._give(news.candidate, start, news, now)

    def _give(self, number: int, start: int, news: LegTokens, now: float) -> None:
        c = self.candidates[number]
        known = len(c.tokens)
        new = news.tokens[known - start :]
        if self.sampling.structured is not None and news.tokens[: known - start] != c.tokens[start : start + len(news.tokens)]:
            raise Broken("what it makes anew differs from what the client has")
        if c.finish is not None or (not new and news.finish is None):
            return
        if new:
            if math.isnan(self.line.first_token_s):
                self.line.first_token(now)
            elif not math.isnan(c.last_s):
                self.gap((now - c.last_s) / len(new), len(new))
            c.last_s = now
            c.tokens += new
        c.finish = news.finish
        scores, self.scores = self.scores, None
        self.deliver(
            Tokens(
                self.request.id,
                number,
                known,
                new,
                news.finish,
                None if news.logprobs is None else news.logprobs[known - start :],
                None if news.top is None else news.top[known - start :],
                self.line.cached_tokens,
                max(0.0, self.line.prefill_start_s - self.request.arrival_s),
                prompt=scores,
            )
        )

    def end(self, stage: Stage, reason: str) -> None:
        """No more comes: tell the client of every candidate that has not finished."""
        finish = "abort" if stage is Stage.ABORTED else "error"
        for number, c in enumerate(self.candidates):
            if c.finish is None:
                c.finish = finish
                said = Ended(self.request.id, number, len(c.tokens), [], finish, error=reason, stage=stage)
                self.deliver(msgspec.structs.replace(said, unfit=self.unfit, overload=self.overload))
