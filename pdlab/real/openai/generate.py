"""Drives one request: its prompts to the engine, tokens to text, an end at stop strings, and a cancellation where nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdlab.prefix import chain
from pdlab.real.engine.detokenize import Detokenizer, StopStrings
from pdlab.real.engine.messages import Ready, Sampling, Step, Submit, Tokens
from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.real.openai.errors import ApiError
from pdlab.real.openai.metrics import Metrics


class Engine(Protocol):
    """What the HTTP process needs of an engine; `EngineClient` is one."""

    ready: Ready
    load: Step
    down: str | None

    def submit(self, submit: Submit, arriving: asyncio.Queue[Tokens] | None = None) -> asyncio.Queue[Tokens]: ...

    def cancel(self, id: int, candidate: int = -1) -> None: ...


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token: its own log-probability, and the likeliest alternatives'."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Delta:
    """News of one choice."""

    choice: int
    text: str
    logprobs: list[Logprob]
    finish: str | None = None


@dataclass(slots=True)
class Choice:
    """One candidate of one prompt."""

    index: int
    detokenizer: Detokenizer
    stops: StopStrings | None
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    made: int = 0
    total_logprob: float = 0.0
    finish: str | None = None
    cached_tokens: int = 0
    last_s: float = 0.0

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(self.made, 1)


class Generation:
    """`async for deltas in generation` until every choice has ended; leaving early cancels the rest. `echo` is shown before each output."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        ids: Sequence[int],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        stops: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        continues: bool = False,
        priority: int = 0,
    ) -> None:
        self.engine, self.metrics, self.sampling = engine, metrics, sampling
        self.first_id = {id: number for number, id in enumerate(ids)}
        self.prompts = prompts
        self.priority = priority
        self.prompt_tokens = sum(map(len, prompts))
        self.arriving: asyncio.Queue[Tokens] = asyncio.Queue()
        self.choices = [
            Choice(
                index,
                Detokenizer(tokenizer, skip_special, continues=continues),
                StopStrings(stops, include_stop) if stops else None,
            )
            for index in range(len(prompts) * sampling.best_of)
        ]
        self.open = len(self.choices)
        self.started_s = self.first_s = self.queue_s = 0.0

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        clock = asyncio.get_running_loop().time
        self.started_s = clock()
        block = self.engine.ready.block_tokens
        for id, number in self.first_id.items():
            prompt = self.prompts[number]
            self.engine.submit(Submit(id, prompt, self.sampling, chain(prompt, block), self.priority), self.arriving)
        try:
            while self.open:
                news = [await self.arriving.get()]
                while not self.arriving.empty():
                    news.append(self.arriving.get_nowait())
                now = clock()
                if deltas := [delta for tokens in news if (delta := self._take(tokens, now)) is not None]:
                    yield _merged(deltas)
        finally:
            if self.open:
                for id in self.first_id:
                    self.engine.cancel(id)
                self.metrics.ended("abort", self.completion_tokens)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.made for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts; candidates of one prompt count it once."""
        return sum(self.choices[number * self.sampling.best_of].cached_tokens for number in range(len(self.prompts)))

    def _take(self, tokens: Tokens, now: float) -> Delta | None:
        choice = self.choices[self.first_id[tokens.id] * self.sampling.best_of + tokens.candidate]
        if choice.finish is not None:
            return None  # at a stop string; the engine had gone on
        if tokens.finish == "error":
            raise ApiError(500 if self.engine.down is None else 503, tokens.error or "the engine has failed")
        assert tokens.start == choice.made, f"tokens from {tokens.start} after {choice.made}"
        self._observe(choice, tokens, now)
        choice.made += len(tokens.tokens)
        shown = tokens.tokens[:-1] if tokens.finish == "stop" else tokens.tokens  # what ended it is no text
        text = choice.detokenizer.push(shown)
        if tokens.finish is not None:
            text += choice.detokenizer.finish()
        finish = tokens.finish
        if choice.stops is not None and choice.made > self.sampling.min_tokens:
            text, matched = choice.stops.push(text)
            if matched:
                if finish is None:
                    self.engine.cancel(tokens.id, tokens.candidate)
                finish = "stop"
            elif finish is not None:
                text += choice.stops.finish()
        logprobs = _logprobs(tokens)
        choice.total_logprob += sum(tokens.logprobs or ())
        choice.text.append(text)
        choice.logprobs += logprobs
        if finish is not None:
            self._end(choice, finish, now)
        return Delta(choice.index, text, logprobs, finish)

    def _observe(self, choice: Choice, tokens: Tokens, now: float) -> None:
        if not tokens.tokens:
            return
        if choice.made:
            self.metrics.token_gap((now - choice.last_s) / len(tokens.tokens), len(tokens.tokens))
        else:
            choice.cached_tokens = tokens.cached_tokens
            if choice.index == 0:
                self.first_s, self.queue_s = now - self.started_s, tokens.queue_s
                self.metrics.first_token(self.first_s, self.queue_s)
        choice.last_s = now

    def _end(self, choice: Choice, finish: str, now: float) -> None:
        choice.finish = finish
        self.open -= 1
        if not self.open:
            self.metrics.ended(finish, self.completion_tokens)
            self.metrics.completed(now - self.started_s, self.first_s, self.queue_s, self.choices[0].made)


def _logprobs(tokens: Tokens) -> list[Logprob]:
    if tokens.logprobs is None:
        return []
    tops = tokens.top or [[]] * len(tokens.logprobs)
    return [Logprob(t, lp, top) for t, lp, top in zip(tokens.tokens, tokens.logprobs, tops, strict=True)]


def _merged(deltas: list[Delta]) -> list[Delta]:
    """One for each choice, in order of first news."""
    if len(deltas) == 1:
        return deltas
    found: dict[int, Delta] = {}
    for delta in deltas:
        if (known := found.get(delta.choice)) is None:
            found[delta.choice] = delta
        else:
            known.text += delta.text
            known.logprobs = known.logprobs + delta.logprobs
            known.finish = delta.finish
    return list(found.values())
