"""One model served: how many requests are in flight, whether more may come, and what is asked of the engine for one."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pdlab.real.api.backend import Backend, Compiling, Foreign
from pdlab.real.api.errors import ApiError, bad, draining, fenced, overloaded
from pdlab.real.api.exchange import KvExchange
from pdlab.real.api.generate import Choice, Delta, Generation
from pdlab.real.api.legs import Here, Leg, Move, Prefill, Pull
from pdlab.real.api.metrics import EngineMetrics
from pdlab.real.api.requests import Ask
from pdlab.real.api.structured import GrammarCheck
from pdlab.real.engine.messages import Scored, StructuredOutputs
from pdlab.real.models.tokenizer import Tokenizer

if TYPE_CHECKING:  # OpenTelemetry is loaded where it is asked for
    from pdlab.real.api.traces import Traces

LONG_TEXT = 16_384  # characters
LONG_TEXTS = 4  # tokenized at once: a byte of text can take 500 of memory meanwhile
DENSE = 8  # bytes for each token that fits: a longer text seldom fits, so its parts are counted before it is tokenized as a whole
PART = 1 << 18  # characters
BODY_BYTES, MOST_BODY_BYTES = 1 << 20, 32 << 20
ESCAPED = 12  # bytes of JSON, at most, for a byte of text
COMMENT_S = 5.0
MOST_PROMPTS = 1024  # of one request, where nothing else bounds them


class Shape(Protocol):
    """How an endpoint's answers look. A chunk that is text alone is `before`, the text as JSON, `after`. `scores` are those of the choice's
    prompt, where they are asked for; with `needs_scores` a choice's opening waits for them."""

    @property
    def kind(self) -> str: ...
    @property
    def chunk_kind(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def before(self) -> bytes: ...
    @property
    def after(self) -> bytes: ...

    @property
    def needs_scores(self) -> bool: ...

    def opening(self, choice: int, scores: list[Scored] | None) -> dict[str, Any] | None: ...
    def chunk(self, delta: Delta) -> dict[str, Any]: ...
    def whole(self, index: int, choice: Choice, scores: list[Scored] | None) -> dict[str, Any]: ...
    def beside(self, scores: Mapping[int, list[Scored]]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A checked request: what to compute, and how to tell it. `n` of each prompt's `ask.sampling.best_of` candidates are shown. `leg`: the
    part that other instances have in it. `usage_always`: each chunk tells the usage so far."""

    shape: Shape
    prompts: Sequence[list[int]]
    ask: Ask
    n: int
    stream: bool
    include_usage: bool
    leg: Leg | None = None
    usage_always: bool = False


class Service:
    """At most `max_requests` prompts are in flight; None: the engine says when there are too many. With `api_key` or the cluster's `token`
    /v1 asks for either, unless there is no key and it is `open_to_clients`; /pdlab, and whatever has to do with other instances, asks for
    the token. `legs` are the requests in flight by their X-Request-Id. `tool_parser` is how calls of tools are read; "": they are not. A
    stream that has nothing to say for `comment_s` says so. `traces`: where each request's span goes."""

    def __init__(
        self,
        engine: Backend,
        tokenizer: Tokenizer,
        model: str,
        *,
        max_requests: int | None = 1024,
        api_key: str | None = None,
        token: str | None = None,
        exchange: KvExchange | None = None,
        tool_parser: str = "",
        open_to_clients: bool = False,
        comment_s: float = COMMENT_S,
        traces: Traces | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.max_requests, self.api_key, self.token, self.open_to_clients = max_requests, api_key, token, open_to_clients
        self.exchange, self.comment_s = exchange, comment_s
        self.tool_parser, self.traces = tool_parser, traces
        self.legs: dict[str, Generation] = {}
        self.running: set[Generation] = set()
        self.metrics = EngineMetrics(model, engine)
        self.grammars = GrammarCheck(tokenizer)
        self.in_flight = 0
        self.on_end: Callable[[], None] = lambda: None  # called when a request is not in flight any more
        self.draining = False
        self.closed = ""  # why its cluster sends nothing new here
        self.fenced = False  # it has lost its place in its cluster
        self.created = int(time.time())
        self.took_s = 1.0  # a request, smoothed: what Retry-After is guessed from
        self.reading_bytes = 0  # of bodies that are being read
        self._tokenizing = asyncio.Semaphore(LONG_TEXTS)
        self._ids = itertools.count(1)

    def drain(self) -> None:
        """Take no new requests; those here go on."""
        self.draining = True

    def not_ready(self) -> list[str]:
        """Why no request should come here now; empty when one may."""
        reasons = [f"engine down: {self.engine.down}"] if self.engine.down is not None else []
        if self.draining:
            reasons.append("draining")
        elif self.closed:
            reasons.append(self.closed)
        if self.max_requests is not None and self.in_flight >= self.max_requests:
            reasons.append(f"overloaded: {self.in_flight} requests in flight, at most {self.max_requests}")
        return reasons

    def check_reads(self) -> None:
        """Raises ApiError where nothing can be taken in, whatever a request says."""
        self._check_up(bool(self.engine.load.leases))
        self._check_room(1)

    def check_open(self, prompts: int = 1, leg: Leg | None = None) -> None:
        """Raises ApiError where as many prompts cannot be taken in now. What is leased here may still be decoded here when nothing new is
        taken in."""
        self._check_up(isinstance(leg, Here))
        self._check_room(prompts)

    def _check_up(self, leased: bool) -> None:
        if self.engine.down is not None:
            raise ApiError(503, self.engine.down, code="engine_down")
        if self.fenced:
            raise fenced()
        if (self.draining or self.closed) and not leased:
            raise draining()

    def _check_room(self, prompts: int) -> None:
        if self.max_requests is not None and self.in_flight + prompts > self.max_requests:
            wait_s = max(1, min(60, math.ceil(self.took_s)))
            raise overloaded(f"{self.in_flight} requests are in flight, at most {self.max_requests} are allowed", wait_s)

    @contextmanager
    def admitted(self, job: GenerateJob, name: str) -> Iterator[Generation]:
        """The job in flight: submitted on entry, cancelled where it is left before its end. Raises ApiError where there is no room."""
        prompts = len(job.prompts)
        self.check_open(prompts, job.leg)
        ids = [next(self._ids) for _ in job.prompts]
        self.in_flight += prompts
        started_s = time.monotonic()
        span, ask = None, job.ask
        if self.traces is not None:
            span = self.traces.request(ask.trace)
            ask = replace(ask, trace=span.carrier)
        generation = Generation(self.engine, self.tokenizer, self.metrics, ids, job.prompts, ask, job.leg, self.exchange)
        self.legs[name] = generation
        self.running.add(generation)
        try:
            with generation:
                yield generation
        finally:
            self.running.discard(generation)
            if self.legs.get(name) is generation:
                del self.legs[name]
            self.in_flight -= prompts
            self.on_end()
            if self.traces is not None and span is not None:
                self.traces.request_ended(span, generation, name, self.model, self.metrics.labels.get("role", ""))
            self.took_s += 0.1 * (time.monotonic() - started_s - self.took_s)

    def break_off(self, error: ApiError) -> None:
        """End all that is in flight with that error."""
        for generation in list(self.running):
            generation.break_off(error)

    async def check_peers(self, leg: Leg | None) -> None:
        """Whom a leg names, this server may connect to. Raises ApiError."""
        if self.exchange is None:
            return
        match leg:
            case Pull(source) if source.descriptor:
                await self.exchange.directory.check_descriptor(source.descriptor)
            case Prefill(push) if push is not None:
                await self.exchange.directory.check_descriptor(push.descriptor)
            case Move(url):
                await self.exchange.directory.check_url(url)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.model!r}", param="model", code="model_not_found")

    def check_prompts(self, prompts: int) -> None:
        most = MOST_PROMPTS if self.max_requests is None else self.max_requests
        if prompts > most:
            raise bad(f"prompt has {prompts} prompts, more than the {most} that may be in flight", "prompt")

    @property
    def most_text_bytes(self) -> int:
        """A longer text has more tokens than fit, however it is tokenized."""
        return self.tokenizer.longest_token_bytes * (self.engine.ready.max_tokens or LONG_TEXT)

    @property
    def most_body_bytes(self) -> int:
        return min(MOST_BODY_BYTES, BODY_BYTES + ESCAPED * self.most_text_bytes)

    def room(self, prompt_tokens: int, max_tokens: int | None, param: str, prompt_param: str) -> int:
        """`max_tokens` that fit beside a prompt; None asks for all there is."""
        most = self.engine.ready.max_tokens
        if prompt_tokens >= most:
            raise bad(
                f"the prompt has {prompt_tokens} tokens, which leaves no room for output in the {most} that fit",
                prompt_param,
                "context_length_exceeded",
            )
        if max_tokens is None:
            return most - prompt_tokens
        if prompt_tokens + max_tokens > most:
            raise bad(
                f"the prompt has {prompt_tokens} tokens and {param} is {max_tokens}, together more than the {most} that fit",
                param,
                "context_length_exceeded",
            )
        return max_tokens

    async def vet(self, structured: StructuredOutputs, field: str) -> None:
        """Try the grammar, and have the engine compile it. Raises ApiError with the reason why there is no such grammar. What vLLM servers
        alone will see they check themselves."""
        engine = self.engine
        if isinstance(engine, Foreign) and engine.foreign:
            return
        reason = await self.grammars.reason(structured)
        if not reason and isinstance(engine, Compiling):
            reason = await engine.compile(structured, await self.grammars.vocabulary())
        if engine.down is not None:
            raise ApiError(503, engine.down, code="engine_down")
        if reason:
            raise bad(f"{field}: {reason}", field)

    def check_length(self, text: str, param: str = "prompt") -> None:
        """Raises ApiError where a text has more tokens than fit, however it is tokenized."""
        if len(text) > self.most_text_bytes:
            raise self._too_long(f"has {len(text)} characters", param)
        if len(text) > LONG_TEXT and (size := _size(text)) > self.most_text_bytes:
            raise self._too_long(f"has {size} bytes", param)

    async def tokens_of(self, text: str, special: bool = True, param: str = "prompt", cut: bool = False) -> list[int]:
        """Raises ApiError where the text is too long to fit, before memory is taken for it. One that will be `cut` may have more
        tokens than fit, but not more bytes than the longest tokens could have."""
        self.check_length(text, param)
        if not cut and len(text) > LONG_TEXT and _size(text) > DENSE * self.engine.ready.max_tokens:
            await self._count_parts(text, param)
        return await self.encode(text, special)

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """A long text is tokenized in a thread, as a batch of one: for a single text `tokenizers` keeps the GIL, which would hold up
        everybody's tokens."""
        if len(text) <= LONG_TEXT:
            return self.tokenizer.encode(text, special)
        async with self._tokenizing:
            (found,) = await asyncio.to_thread(self.tokenizer.backend.encode_batch, [text], add_special_tokens=special)
        ids: list[int] = found.ids
        return ids

    async def _count_parts(self, text: str, param: str) -> None:
        """Raises ApiError where its parts have clearly more tokens than fit; at a cut a word may have a few more than in the whole."""
        most, tokens = self.engine.ready.max_tokens, 0
        for start in range(0, len(text), PART):
            tokens += len(await self.encode(text[start : start + PART], False))
            if tokens > most + most // 16 + 1024:
                raise self._too_long(f"has more than {tokens} tokens", param)

    def _too_long(self, what: str, param: str) -> ApiError:
        fits = (
            f"too long for the {self.engine.ready.max_tokens} tokens that fit, of at most {self.tokenizer.longest_token_bytes} bytes each"
        )
        return bad(f"the prompt {what}, {fits}", param, "context_length_exceeded")


def _size(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text.encode(errors="replace"))
