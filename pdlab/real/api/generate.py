"""Drives one HTTP request: its prompts to the engine, tokens to text, an end at stop strings, and a cancellation where nobody waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from pdlab.core.prefix import chain
from pdlab.core.types import Stage
from pdlab.real.api.backend import Backend, Ended
from pdlab.real.api.errors import ApiError, overloaded
from pdlab.real.api.exchange import KvExchange
from pdlab.real.api.legs import Alone, Here, Leg, Move, Prefill, Pull, Reserve, kv_lost
from pdlab.real.api.metrics import EngineMetrics
from pdlab.real.api.requests import Ask
from pdlab.real.api.tool_calls import CallParser, CallPiece
from pdlab.real.engine.messages import (
    FromQueue,
    Full,
    Held,
    Landed,
    Missed,
    News,
    Proceed,
    Receive,
    Reserved,
    Resume,
    Scored,
    Source,
    Submit,
    Tokens,
)
from pdlab.real.models.detokenize import Detokenizer, StopStrings
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.wire import FetchedFrom, FetchFrom, StreamEvent

log = logging.getLogger(__name__)

_GONE, _NONE = Tokens(-1, 0, 0, []), Tokens(-1, 0, 0, [])
MOST_BEHIND = 1 << 16  # messages of the engine that wait for one reader


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
    """News of one choice. `text` is without `calls` of tools."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[Logprob]
    finish: str | None = None
    calls: list[CallPiece] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """One candidate of one prompt. `made` counts what was made elsewhere, too; `tokens` are kept where they are asked for; `last_s` is when
    its last tokens came."""

    index: int
    detokenizer: Detokenizer | None
    stops: StopStrings | None
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    made: int = 0
    total_logprob: float = 0.0
    finish: str | None = None
    cached_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    queue_s: float = 0.0
    parser: CallParser | None = None
    calls: list[CallPiece] = field(default_factory=list)

    @property
    def shown_finish(self) -> str | None:
        """As clients are told."""
        return "tool_calls" if self.finish == "stop" and self.calls else self.finish

    def parse(self, text: str) -> tuple[str, list[CallPiece]]:
        """What of its text is text, and the news of calls. After its end, what is left of both, too."""
        if self.parser is None:
            return text, []
        found = [self.parser.push(text), *([self.parser.finish()] if self.finish is not None else [])]
        pieces = [piece for one in found for piece in one.calls]
        self.calls += pieces
        return "".join(one.content for one in found), pieces

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(self.made, 1)


class _Arriving(asyncio.Queue[FromQueue]):
    """What waits for a reader of these requests. Where that is too much they are cancelled, and the rest is dropped: `overrun`. It knows
    nothing of its Generation, so that neither waits for the garbage collector."""

    def __init__(self, engine: Backend, ids: Iterable[int]) -> None:
        super().__init__()
        self.overrun = False
        self._engine, self._ids = engine, ids

    def put_nowait(self, item: FromQueue) -> None:
        behind = self.qsize()
        if behind < MOST_BEHIND:
            super().put_nowait(item)
        elif behind == MOST_BEHIND:
            self.overrun = True
            super().put_nowait(_GONE)
            for id in self._ids:
                self._engine.cancel(id)


class Generation:
    """`with generation: while generation.open: await generation.news()`. Leaving early cancels what still runs, and ends the lease on a
    prompt's KV that was not `delivered`. `events` are what the stream is to tell of the KV; who tells takes them out. `moved`: another
    instance goes on. `given` tokens were made elsewhere. `scores` are those of the prompts' tokens, by the prompt's number, where they are
    asked for: they come before its first token."""

    def __init__(
        self,
        engine: Backend,
        tokenizer: Tokenizer,
        metrics: EngineMetrics,
        ids: Sequence[int],
        prompts: Sequence[list[int]],
        ask: Ask,
        leg: Leg | None = None,
        exchange: KvExchange | None = None,
    ) -> None:
        self.engine, self.metrics, self.ask = engine, metrics, ask
        self.leg, self.exchange = None if isinstance(leg, Alone) else leg, exchange
        self.first_id = {id: number for number, id in enumerate(ids)}
        self.prompts = prompts
        self.best_of = ask.sampling.best_of
        self.arriving = _Arriving(engine, ids)
        kept = ask.tools.kept_ids if ask.tools is not None else frozenset[int]()
        self.choices = [
            Choice(
                index,
                Detokenizer(tokenizer, ask.skip_special, continues=ask.continues, kept=kept) if ask.text else None,
                StopStrings(ask.stops, ask.include_stop) if ask.stops else None,
                parser=ask.tools.parser() if ask.tools is not None else None,
            )
            for index in range(len(prompts) * self.best_of)
        ]
        self.open = len(self.choices)
        self.started_s = 0.0
        self.failed = False
        self.error = ""  # why
        self.events: list[StreamEvent] = []
        self.scores: dict[int, list[Scored]] = {}
        self.held: Held | None = None
        self.fetched: FetchedFrom | None = None  # what came of a prefix that was to be read
        self.delivered = False
        self.moved = False
        self.given = 0
        self._landed = self.leg is None or isinstance(leg, Prefill)
        self._tells = isinstance(leg, Alone)
        self._fetch = leg.fetch if isinstance(leg, Alone | Prefill) else None
        self._reserved = False
        self._cause = "failed"  # why KV does not come
        self._trouble: ApiError | None = None
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._moving: asyncio.Task[None] | None = None
        self._clock: Callable[[], float] = asyncio.get_running_loop().time

    def __enter__(self) -> Generation:
        self.started_s = self._clock()
        ready, ask, decodes_here = self.engine.ready, self.ask, not isinstance(self.leg, Prefill)
        push = self.leg.push if isinstance(self.leg, Prefill) else None
        for id, prompt in zip(self.first_id, self.prompts, strict=True):
            hashes = chain(prompt, ready.block_tokens) if ask.sampling.prompt_logprobs is None else ()
            sampling, left = ask.sampling, ready.max_tokens - len(prompt)
            if 0 < left < sampling.max_tokens:  # of a default: what a client asks for was checked
                sampling = msgspec.structs.replace(sampling, max_tokens=left)
            self._begin(
                Submit(
                    id,
                    prompt,
                    sampling,
                    hashes,
                    ask.priority,
                    decodes_here,
                    push,
                    ask.ttft_slo_s,
                    ask.tpot_slo_s,
                    time.monotonic(),
                    ask.waited_s,
                    ask.session,
                    ask.tenant,
                    ask.offline,
                    ask.trace,
                )
            )
        return self

    def _begin(self, submit: Submit) -> None:
        leg, arriving = self.leg, self.arriving
        if self._fetch is not None and submit.hashes and self.exchange is not None:
            self._moving = asyncio.create_task(self._borrow(self.exchange, self._fetch, submit), name=f"prefix of {submit.id}")
            return
        if leg is None or isinstance(leg, Prefill):
            self.engine.submit(submit, arriving)
            return
        assert self.exchange is not None, "a leg is read only where KV is exchanged"
        engine = self.exchange.engine
        match leg:
            case Pull(source, made, deadline_s):
                self._give(made)
                engine.receive(Receive(submit, made, source, True, deadline_s), arriving)
            case Reserve(made, deadline_s):
                self._give(made)
                engine.receive(Receive(submit, made, None, False, deadline_s), arriving)
            case Here(lease, made):
                self._give(made)
                engine.resume(Resume(submit, lease, made), arriving)
            case Move():
                self._moving = asyncio.create_task(self._move(self.exchange, leg, submit), name=f"migration of {leg.leg}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._moving is not None:
            self._moving.cancel()
        for id, number in self.first_id.items():
            if any(choice.finish is None for choice in self._of(number)):
                self.engine.cancel(id)
                self.metrics.ended("error" if self.failed else "abort")
        if self.held is not None and not self.delivered and self.exchange is not None:
            self.exchange.engine.release(self.held.lease)
        self.open = 0

    async def _move(self, exchange: KvExchange, move: Move, submit: Submit) -> None:
        try:
            await exchange.mover.bring(move, submit, self.arriving, self._news, self._give)
        except ApiError as error:
            self.break_off(error)
        except Exception:
            log.exception("migration of %s failed", move.leg)
            self.break_off(ApiError(500, "the migration has failed here; the server's log says more"))

    async def _borrow(self, exchange: KvExchange, fetch: FetchFrom, submit: Submit) -> None:
        self.fetched = FetchedFrom()
        self.fetched = await exchange.mover.borrow(fetch, submit, self.arriving) or self.fetched

    def wake(self) -> None:
        """Whoever waits for news gets none."""
        self.arriving.put_nowait(_NONE)

    def leave(self) -> None:
        """The client has gone: whoever waits for news gets `Gone`."""
        self.arriving.put_nowait(_GONE)

    def break_off(self, error: ApiError) -> None:
        """Whoever waits for news gets the error."""
        self._trouble = error
        self.arriving.put_nowait(_GONE)

    @property
    def sole_id(self) -> int | None:
        """What the engine calls it, where it is one candidate of one prompt: only such a one can be moved."""
        return next(iter(self.first_id)) if len(self.choices) == 1 else None

    @property
    def waits(self) -> bool:
        """It has reserved, and was not told yet where its KV is."""
        return self._reserved

    def proceed(self, made: list[int], source: Source | None) -> None:
        """Tell it: `made` in all."""
        assert self.exchange is not None and self._reserved, "only what has reserved waits"
        self._reserved = False
        self._give(made)
        self.exchange.engine.proceed(Proceed(next(iter(self.first_id)), made, source))

    def _give(self, made: list[int]) -> None:
        """Output that exists already, in all: text goes on after it."""
        new = made[self.given :]
        self.given = len(made)
        for choice in self.choices:
            choice.made = self.given
            if choice.detokenizer is not None:
                choice.detokenizer.push(new)

    async def news(self) -> list[Delta]:
        """What came since the last call, one Delta for each choice; news of the KV are `events` then. Raises ApiError where the engine has
        failed, or the KV did not come."""
        arriving = self.arriving
        found: dict[int, Delta] = {}
        tokens = await arriving.get()
        now = self._clock()
        while True:
            if not isinstance(tokens, Tokens):
                self._learn(tokens)
            elif tokens is not _NONE and (delta := self._take(tokens, now)) is not None:
                if (known := found.get(delta.choice)) is None:
                    found[delta.choice] = delta
                else:
                    known.text += delta.text
                    known.tokens = known.tokens + delta.tokens
                    known.logprobs = known.logprobs + delta.logprobs
                    known.finish = delta.finish
                    known.calls = known.calls + delta.calls
            if arriving.empty():
                return list(found.values())
            tokens = arriving.get_nowait()

    @property
    def elapsed_s(self) -> float:
        """Since it began."""
        return self._clock() - self.started_s

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        """Of this leg."""
        return sum(choice.made - self.given for choice in self.choices)

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

    def told_of(self, choice: int) -> int:
        """Tokens of a choice, of this leg."""
        return self.choices[choice].made - self.given

    def scores_of(self, choice: int) -> list[Scored] | None:
        """Of the choice's prompt; None: not asked for, or not there yet."""
        return self.scores.get(choice // self.best_of)

    def _of(self, number: int) -> list[Choice]:
        return self.choices[number * self.best_of : (number + 1) * self.best_of]

    def _learn(self, news: Held | News) -> None:
        if isinstance(news, Full):
            raise ApiError(503, f"no room to reserve: {news.reason}", code="kv_full", retry_after_s=1)
        if isinstance(news, Held):
            self.held = news
        elif self._moving is not None and not isinstance(news, Missed):
            self._news.put_nowait(news)
        elif isinstance(news, Reserved) and isinstance(self.leg, Reserve):
            self._reserved = True
            own = self.engine.ready.descriptor.decode()
            self.events.append(StreamEvent("reserved", news.ticket, own, news.blocks, news.cached_tokens))
        if isinstance(news, Missed):
            self._cause = news.cause
            if self.fetched is not None:
                self.fetched = FetchedFrom(unreachable=news.cause != "expired")
        if isinstance(news, Landed):
            if self.fetched is not None:
                self.fetched = FetchedFrom(news.prefix_tokens, news.bytes, news.seconds)
            self._landed = True
            if news.seconds > 0.0:  # else it was here
                self.metrics.transferred(news.bytes, news.seconds)
            if self.leg is not None and not isinstance(self.leg, Prefill) and self.leg.events:
                self.events.append(
                    StreamEvent(
                        "transferred",
                        bytes=news.bytes,
                        seconds=news.seconds,
                        waited_s=news.waited_s,
                        transport=news.transport,
                        made=news.made,
                    )
                )

    def _take(self, tokens: Tokens, now: float) -> Delta | None:
        if tokens is _GONE:
            raise self._why_gone()
        number = self.first_id[tokens.id]
        choice = self.choices[number * self.best_of + tokens.candidate]
        if tokens.prompt is not None:
            self.scores[number] = tokens.prompt
        if choice.finish is not None:
            return None  # at a stop string; the engine had gone on
        if tokens.finish == "error":
            self.failed, self.error = True, tokens.error
            if isinstance(tokens, Ended):
                raise _failure(tokens)
            if not self._landed and self.engine.down is None:
                self.metrics.transfer_failed(self._cause)
                raise kv_lost(tokens.error, self._cause)
            raise ApiError(500 if self.engine.down is None else 503, tokens.error or "the engine has failed", code="engine_failed")
        assert tokens.start == choice.made, f"tokens from {tokens.start} after {choice.made}"
        if self.ask.only_prompt:
            self._observe(choice, tokens, 0, True, now)
            self._end(choice, "length", now)
            return Delta(choice.index, "", [], [], "length")
        before = choice.made
        text, finish = self._text(choice, tokens)
        taken = choice.made - before
        if taken:
            self._observe(choice, tokens, taken, before == self.given, now)
        told = tokens.tokens if taken == len(tokens.tokens) else tokens.tokens[:taken]
        if self.ask.token_ids:
            choice.tokens += told
        logprobs = _logprobs(tokens, taken) if tokens.logprobs is not None else []
        choice.logprobs += logprobs
        choice.total_logprob += sum(one.logprob for one in logprobs)
        if finish is not None:
            if tokens.finish is None:
                self.engine.cancel(tokens.id, tokens.candidate)
            if finish == "held":
                finish = "length"
            self._end(choice, finish, now)
            if finish == "moved":
                self.moved, finish = True, None
        text, calls = choice.parse(text)
        choice.text.append(text)
        return Delta(choice.index, text, told, logprobs, finish and choice.shown_finish, calls)

    def _why_gone(self) -> Exception:
        """Why no more news come."""
        if self._trouble is None and self.arriving.overrun:
            return ApiError(500, f"more than {MOST_BEHIND} pieces of the answer waited to be read", code="reader_too_slow")
        if self._trouble is not None and self._trouble.cause:
            self.metrics.transfer_failed(self._trouble.cause)
        return self._trouble or Gone()

    def _text(self, choice: Choice, tokens: Tokens) -> tuple[str, str | None]:
        """(what can be shown, whether and why the choice ends). What ended it at the engine, a stop token, is no text, unless what ends it
        is to be included."""
        stops, detokenizer = choice.stops, choice.detokenizer
        if detokenizer is None:
            choice.made += len(tokens.tokens)
            return "", tokens.finish
        shown = tokens.tokens[:-1] if tokens.finish == "stop" and not self.ask.include_stop else tokens.tokens
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
                if self._tells:
                    told = StreamEvent("prefilled", cached_tokens=tokens.cached_tokens, queue_s=tokens.queue_s, fetched=self.fetched)
                    self.events.append(told)
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
            made = [one.made - self.given for one in self._of(number)]
            self.metrics.asked(len(self.prompts[number]), made, self.ask.sampling.max_tokens)
            self.metrics.completed(
                now - self.started_s, first.first_s - self.started_s, first.queue_s, now - first.first_s, first.made - self.given
            )


def _logprobs(tokens: Tokens, taken: int) -> list[Logprob]:
    assert tokens.logprobs is not None
    tops = tokens.top or [[]] * len(tokens.tokens)
    return [Logprob(token, logprob, top) for token, logprob, top in zip(tokens.tokens[:taken], tokens.logprobs[:taken], tops, strict=False)]


def _failure(ended: Ended) -> ApiError:
    """How a cluster's request came to no good end."""
    if ended.unfit:
        return ApiError(400, ended.error, code="unfit")
    if ended.overload:
        return overloaded(ended.error, 1)
    match ended.stage:
        case Stage.REJECTED:
            return ApiError(503, ended.error, code="rejected", retry_after_s=1)
        case Stage.EXPIRED:
            return ApiError(504, ended.error, code="expired")
        case _:
            return ApiError(500, ended.error, code="engine_failed")
