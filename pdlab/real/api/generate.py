"""Drives one HTTP request: its prompts to the engine, tokens to text, an end at stop strings, and a cancellation where nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from pdlab.prefix import chain
from pdlab.real.api.engine import Engine
from pdlab.real.api.errors import ApiError
from pdlab.real.api.metrics import Metrics
from pdlab.real.api.requests import Ask
from pdlab.real.engine.detokenize import Detokenizer, StopStrings
from pdlab.real.engine.messages import Submit, Tokens
from pdlab.real.engine.tokenizer import Tokenizer

_GONE = Tokens(-1, 0, 0, [])


class Gone(Exception):
    """The client has hung up."""


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
    """One candidate of one prompt. `last_s` is when its last tokens came."""

    index: int
    detokenizer: Detokenizer
    stops: StopStrings | None
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    made: int = 0
    total_logprob: float = 0.0
    finish: str | None = None
    cached_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    queue_s: float = 0.0

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(self.made, 1)


class Generation:
    """`with generation: while generation.open: await generation.news()`. Leaving early cancels what still runs."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, metrics: Metrics, ids: Sequence[int], prompts: Sequence[list[int]], ask: Ask
    ) -> None:
        self.engine, self.metrics, self.ask = engine, metrics, ask
        self.first_id = {id: number for number, id in enumerate(ids)}
        self.prompts = prompts
        self.best_of = ask.sampling.best_of
        self.arriving: asyncio.Queue[Tokens] = asyncio.Queue()
        self.choices = [
            Choice(
                index,
                Detokenizer(tokenizer, ask.skip_special, continues=ask.continues),
                StopStrings(ask.stops, ask.include_stop) if ask.stops else None,
            )
            for index in range(len(prompts) * self.best_of)
        ]
        self.open = len(self.choices)
        self.started_s = 0.0
        self.failed = False
        self._clock: Callable[[], float] = asyncio.get_running_loop().time

    def __enter__(self) -> Generation:
        self.started_s = self._clock()
        block = self.engine.ready.block_tokens
        for id, prompt in zip(self.first_id, self.prompts, strict=True):
            self.engine.submit(Submit(id, prompt, self.ask.sampling, chain(prompt, block), self.ask.priority), self.arriving)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for id, number in self.first_id.items():
            if any(choice.finish is None for choice in self._of(number)):
                self.engine.cancel(id)
                self.metrics.ended("error" if self.failed else "abort")
        self.open = 0

    def leave(self) -> None:
        """The client has gone: whoever waits for news gets `Gone`."""
        self.arriving.put_nowait(_GONE)

    async def news(self) -> list[Delta]:
        """What came since the last call, one Delta for each choice. Raises ApiError where the engine has failed."""
        arriving = self.arriving
        found: dict[int, Delta] = {}
        tokens = await arriving.get()
        now = self._clock()
        while True:
            if (delta := self._take(tokens, now)) is not None:
                if (known := found.get(delta.choice)) is None:
                    found[delta.choice] = delta
                else:
                    known.text += delta.text
                    known.logprobs = known.logprobs + delta.logprobs
                    known.finish = delta.finish
            if arriving.empty():
                return list(found.values())
            tokens = arriving.get_nowait()

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(choice.made for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts; candidates of one prompt count it once."""
        return sum(max(choice.cached_tokens for choice in self._of(number)) for number in range(len(self.prompts)))

    def best(self, n: int) -> list[Choice]:
        """The n likeliest candidates of each prompt, by mean log-probability; all in order where n is best_of."""
        found = []
        for number in range(len(self.prompts)):
            candidates = self._of(number)
            found += candidates if n == self.best_of else sorted(candidates, key=lambda c: (-c.mean_logprob, c.index))[:n]
        return found

    def _of(self, number: int) -> list[Choice]:
        return self.choices[number * self.best_of : (number + 1) * self.best_of]

    def _take(self, tokens: Tokens, now: float) -> Delta | None:
        if tokens is _GONE:
            raise Gone
        choice = self.choices[self.first_id[tokens.id] * self.best_of + tokens.candidate]
        if choice.finish is not None:
            return None  # at a stop string; the engine had gone on
        if tokens.finish == "error":
            self.failed = True
            raise ApiError(500 if self.engine.down is None else 503, tokens.error or "the engine has failed", code="engine_failed")
        assert tokens.start == choice.made, f"tokens from {tokens.start} after {choice.made}"
        before = choice.made
        text, finish = self._text(choice, tokens)
        taken = choice.made - before
        if taken:
            self._observe(choice, tokens, taken, before == 0, now)
        logprobs = _logprobs(tokens, taken) if tokens.logprobs is not None else []
        choice.logprobs += logprobs
        choice.total_logprob += sum(one.logprob for one in logprobs)
        choice.text.append(text)
        if finish is not None:
            if tokens.finish is None:
                self.engine.cancel(tokens.id, tokens.candidate)
            self._end(choice, finish, now)
        return Delta(choice.index, text, logprobs, finish)

    def _text(self, choice: Choice, tokens: Tokens) -> tuple[str, str | None]:
        """(what can be shown, whether and why the choice ends). What ended it at the engine, a stop token, is no text."""
        shown = tokens.tokens[:-1] if tokens.finish == "stop" else tokens.tokens
        stops, detokenizer = choice.stops, choice.detokenizer
        if stops is None:
            choice.made += len(tokens.tokens)
            text = detokenizer.push(shown)
            return (text if tokens.finish is None else text + detokenizer.finish()), tokens.finish
        pieces = []
        least = self.ask.sampling.min_tokens
        for token in shown:
            choice.made += 1
            piece = detokenizer.push((token,))
            matched = False
            if choice.made > least:
                piece, matched = stops.push(piece)
            pieces.append(piece)
            if matched:
                return "".join(pieces), "stop"
        choice.made += len(tokens.tokens) - len(shown)
        if tokens.finish is not None:
            piece, matched = stops.push(detokenizer.finish())
            pieces.append(piece)
            if not matched:
                pieces.append(stops.finish())
        return "".join(pieces), tokens.finish

    def _observe(self, choice: Choice, tokens: Tokens, taken: int, first: bool, now: float) -> None:
        self.metrics.generated(taken)
        if first:
            choice.cached_tokens, choice.queue_s, choice.first_s = tokens.cached_tokens, tokens.queue_s, now
            if tokens.candidate == 0:
                self.metrics.first_token(now - self.started_s, tokens.queue_s)
        else:
            self.metrics.token_gap((now - choice.last_s) / taken, taken)
        choice.last_s = now

    def _end(self, choice: Choice, finish: str, now: float) -> None:
        choice.finish = finish
        self.open -= 1
        number = choice.index // self.best_of
        if all(one.finish is not None for one in self._of(number)):
            first = self._of(number)[0]
            self.metrics.ended(finish)
            self.metrics.completed(now - self.started_s, first.first_s - self.started_s, first.queue_s, now - first.first_s, first.made)


def _logprobs(tokens: Tokens, taken: int) -> list[Logprob]:
    assert tokens.logprobs is not None
    tops = tokens.top or [[]] * len(tokens.tokens)
    return [Logprob(token, logprob, top) for token, logprob, top in zip(tokens.tokens[:taken], tokens.logprobs[:taken], tops, strict=False)]
