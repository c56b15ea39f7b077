"""An instance over HTTP: docs/reference/protocol.md from the router's side."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import msgspec

from pdlab.core.types import InstanceSpec, Report, Role, UsageError
from pdlab.real.api.metrics import CAUSES
from pdlab.real.engine.messages import Sampling, Scored, StructuredOutputs
from pdlab.real.net.http import Broken, HttpClient, HttpConnection, Unheard
from pdlab.real.net.sse import Events
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import MOST_IDS, RELAY_HEADER, Continue, KvParams, LeaseBody, Rejoin, RoleChange, StreamEvent, trace_lines
from pdlab.real.registry.records import Garbage, read_report
from pdlab.real.router.remote import (
    ALIVE_S,
    Busy,
    Fenced,
    Hear,
    InstanceFull,
    LegAsk,
    LegNews,
    LegTokens,
    Prefilled,
    TransferTrouble,
    Unfit,
)
from pdlab.real.router.vllm import Vllm

# vLLM leases KV for 30 s, and only a decode server renews it; a later pull reads, without an error, what lies there by then. The world asks
# every 10 s.
UNRENEWED_S, FORGET_S = 15.0, 60.0
MOST_RELAYS = 1024

TROUBLES = (InstanceFull, Unfit, Broken, TransferTrouble)
FINISHES = (None, "stop", "length")
CLIENTS_FAULT = ("invalid_request_error", "BadRequestError")  # as error chunks name it: pdlab, vLLM

encode = msgspec.json.Encoder().encode

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Body(msgspec.Struct, frozen=True, omit_defaults=True):
    """A leg's. What has a default is left out where it has it; the sampling fields have none, since vLLM's own come from the model."""

    model: str
    prompt: list[int]
    max_tokens: int
    stream: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int = 0
    n: int = 1
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: list[str] = []
    prompt_logprobs: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    detokenize: bool = True
    priority: int = 0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    waited_ms: float = 0.0
    service_tier: str | None = None  # "flex": offline
    kv_transfer_params: KvParams | msgspec.Raw | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """By vLLM's return_tokens_as_token_ids: the keys of `top_logprobs` are "token_id:123"."""

    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's, of one token."""

    logprob: float
    rank: int | None = None


class LegChoice(msgspec.Struct, frozen=True):
    index: int = 0
    token_ids: Annotated[list[Token], msgspec.Meta(max_length=MOST_IDS)] | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Annotated[list[dict[str, PromptLogprob] | None], msgspec.Meta(max_length=MOST_IDS)] | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    message: str = ""
    type: str | None = None
    code: str | int | None = None
    cause: str | None = None  # of KV that did not come


class Cached(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class LegUsage(msgspec.Struct, frozen=True):
    prompt_tokens_details: Cached | None = None


class LegAnswer(msgspec.Struct, frozen=True):
    """A completion, or a chunk of one, or an error: what the router needs of it."""

    choices: list[LegChoice] = []
    pdlab: StreamEvent | None = None
    error: ErrorBody | None = None
    usage: LegUsage | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")

    def cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return (details.cached_tokens if details is not None else None) or 0


_decode_answer = msgspec.json.Decoder(LegAnswer).decode
_decode_params = msgspec.json.Decoder(KvParams).decode


def trouble(status: int, error: ErrorBody | None) -> Exception:
    """What an answer's status means to the router, or for 200 the error within its stream."""
    message = error.message if error is not None else ""
    code = error.code if error is not None else None
    if code == "kv_full" or status == 429:
        return InstanceFull(message)
    if code == "kv_lost" or status == 409:
        cause = error.cause if error is not None else None
        return TransferTrouble(message, cause=cause if cause in CAUSES else "failed")
    if code == "lease_lost":
        return Fenced(message)
    if code in ("draining", "loading"):
        return Busy(message)
    if status in (400, 413, 422) or (status == 200 and error is not None and error.type in CLIENTS_FAULT):
        return Unfit(message)
    return Broken(f"{message or 'an answer without a reason'} ({code or status})")


def scored(given: Logprobs, tokens: int, alternatives: int) -> tuple[list[float], list[list[tuple[int, float]]] | None]:
    """Log-probabilities of the sampled tokens, and the likeliest `alternatives` to each. Raises Broken."""
    own = [-math.inf if one is None else one for one in given.token_logprobs]
    top = [_ranked(one or {})[:alternatives] for one in given.top_logprobs or []] if alternatives else None
    if len(own) != tokens or (top is not None and len(top) != tokens):
        raise Broken(f"log-probabilities of {len(own)} tokens came with {tokens}")
    return own, top


def _ranked(found: dict[str, float]) -> list[tuple[int, float]]:
    """The sampled token is among its own alternatives, though it may be less likely than any."""
    try:
        return sorted(((int(name.removeprefix("token_id:")), logprob) for name, logprob in found.items()), key=lambda one: -one[1])
    except ValueError:
        raise Broken("log-probabilities came without token ids") from None


def prompt_scores(told: list[dict[str, PromptLogprob] | None] | None, tokens: Sequence[int], alternatives: int) -> list[Scored]:
    """Of the prompt `tokens` but the first. Raises Broken."""
    if told is None or len(told) != len(tokens):
        raise Broken(f"log-probabilities of {len(told or ())} tokens came for a prompt of {len(tokens)}")
    found = []
    for token, ranked in zip(tokens[1:], told[1:], strict=True):
        own = (ranked or {}).get(str(token))
        if own is None:
            raise Broken(f"log-probabilities of the prompt came without that of its token {token}")
        top = _ranked({name: one.logprob for name, one in (ranked or {}).items()})[:alternatives]
        found.append(Scored(own.logprob, own.rank or 0, top))
    return found


def _read_answer(raw: bytes) -> LegAnswer:
    try:
        return _decode_answer(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken("an answer that cannot be read") from None


def _read_trouble(raw: bytes) -> LegAnswer:
    """Of an answer that is no success: anything may stand there."""
    try:
        return _decode_answer(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return LegAnswer(error=ErrorBody(raw[:200].decode(errors="replace")))


def _prefilled(answer: LegAnswer, ask: LegAsk) -> Prefilled:
    choice = answer.choices[0] if len(answer.choices) == 1 else LegChoice()
    if choice.token_ids is None or len(choice.token_ids) != 1 or choice.finish_reason not in ("stop", "length"):
        raise Broken("a prefill leg was not answered by one token")
    logprobs, top = scored(choice.logprobs, 1, ask.sampling.logprobs or 0) if choice.logprobs is not None else (None, None)
    wanted = ask.sampling.prompt_logprobs
    scores = prompt_scores(choice.prompt_logprobs, ask.tokens, wanted) if wanted is not None else None
    raw = bytes(answer.kv_transfer_params)
    try:
        params = _decode_params(raw) if raw != b"null" else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken("kv_transfer_params that cannot be read") from None
    return Prefilled(
        choice.token_ids[0],
        choice.finish_reason,
        cached_tokens=answer.cached_tokens(),
        queue_s=answer.pdlab.queue_s if answer.pdlab is not None else 0.0,
        raw_params=raw if params is not None else None,
        params=params,
        logprob=logprobs[0] if logprobs is not None else None,
        top=top[0] if top is not None else None,
        scores=scores,
        fetched=answer.pdlab.fetched if answer.pdlab is not None else None,
    )


class LegStream:
    """Server-sent events to a leg's news. `failed`: what to raise after the news; `ended`: [DONE] has come. `prompt` is the leg's, where
    its log-probabilities are asked for."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self.failed: Exception | None = None
        self._candidates = self._open = sampling.best_of
        self._alternatives = sampling.logprobs or 0
        self._prompt, self._prompt_logprobs = prompt, sampling.prompt_logprobs
        self._events = Events(self._event)
        self._found: list[LegNews] = []

    @property
    def ended(self) -> bool:
        return self._events.done

    def feed(self, read: bytes) -> list[LegNews]:
        """Tokens of one candidate that came together go out together."""
        events = self._events
        try:
            events.feed(read)
            if events.unread:
                raise Broken("an answer that cannot be read")
            if events.too_long:
                raise Broken("a line of the stream is too long")
            if events.done and self._open:
                raise Broken("the stream ended before its tokens did")
        except TROUBLES as error:
            self.failed = error
        found, self._found = self._found, []
        return found

    def _event(self, data: bytes, _name: bytes) -> bool:
        try:
            answer = _decode_answer(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if answer.error is not None:
            raise trouble(200, answer.error)
        if answer.pdlab is not None:
            if answer.pdlab.event == "moved":
                self._open = 0
            self._found.append(answer.pdlab)
        for choice in answer.choices:
            self._tokens(choice)
        return True

    def _tokens(self, choice: LegChoice) -> None:
        candidate, tokens, finish, found = choice.index, choice.token_ids or [], choice.finish_reason, self._found
        if finish is not None:
            self._open -= 1
        if finish not in FINISHES or not 0 <= candidate < self._candidates or self._open < 0:
            raise Broken(f"the stream has finish_reason {finish!r} for choice {candidate}")
        if self._prompt_logprobs is not None:  # they come with what comes first
            scores = prompt_scores(choice.prompt_logprobs, self._prompt, self._prompt_logprobs)
            self._prompt_logprobs = None
            found.append(LegTokens(candidate, [], scores=scores))
        if choice.logprobs is not None:
            logprobs, top = scored(choice.logprobs, len(tokens), self._alternatives)
            found.append(LegTokens(candidate, tokens, finish, logprobs, top))
            return
        last = found[-1] if found else None
        joins = isinstance(last, LegTokens) and last.finish is None and last.logprobs is None and last.scores is None
        if joins and isinstance(last, LegTokens) and last.candidate == candidate:
            found[-1] = LegTokens(candidate, last.tokens + tokens, finish)
        elif tokens or finish:
            found.append(LegTokens(candidate, tokens, finish))


class HttpRemote:
    """A `remote.Remote`. `token` is the cluster's internal one, which only pdlab's instances are sent, `api_key` the instance's.
    Raises UsageError where the spec's url cannot be used. `close` when the incarnation is gone: all that is under way breaks."""

    def __init__(self, spec: InstanceSpec, *, token: str = "", api_key: str = "", tls: Tls = PLAIN) -> None:
        self.spec = spec
        self._http = HttpClient(spec.url, token if spec.engine == "pdlab" else "", api_key, tls)
        self._vllm = Vllm(spec.url, api_key, tls) if spec.engine == "vllm" else None
        self._leased_s: dict[str, float] = {}  # by a vLLM server, when
        self._token, self._tls = token, tls
        self._relays: dict[str, HttpClient] = {}  # those who pass its answers on

    def close(self) -> None:
        self._http.close()
        for relay in self._relays.values():
            relay.close()
        if self._vllm is not None:
            self._vllm.close()

    async def prefill(self, ask: LegAsk) -> Prefilled:
        connection = await self._leg(ask, stream=False)
        try:
            raw = await connection.whole()
            answer = _read_answer(raw) if connection.status == 200 else _read_trouble(raw)
            if connection.status != 200 or answer.error is not None:
                raise trouble(connection.status, answer.error)
            if ask.sampling.prompt_logprobs is None:
                found = _prefilled(answer, ask)
            else:  # of a long prompt they take tens of milliseconds
                found = await asyncio.to_thread(_prefilled, answer, ask)
            if not self._pdlab and found.params is not None:
                self._leased(found.params.remote_request_id or "")
            return found
        finally:
            connection.leave(connection.done)

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        connection = await self._leg(ask, stream=True)
        stream = LegStream(ask.sampling, ask.tokens)

        def read(part: bytes) -> bool:
            for news in stream.feed(part):
                hear(news)
            if stream.failed is not None:
                raise stream.failed
            return stream.ended

        try:
            if connection.status != 200:
                raise trouble(connection.status, _read_trouble(await connection.whole()).error)
            await connection.follow(read)
            if not stream.ended:
                raise Broken("the stream broke off")
        finally:
            connection.leave(stream.ended or connection.done)

    async def proceed(self, go: Continue) -> None:
        await self._told(b"/pdlab/v1/continue", encode(go))

    async def release(self, lease: str) -> None:
        """A vLLM server cannot be asked: what it leases ends 30 s after its last heartbeat."""
        if self._pdlab:
            with suppress(Broken):
                await self._http.call(b"POST", b"/pdlab/v1/release", encode(LeaseBody(lease)))

    async def renew(self, lease: str) -> bool:
        """Of a vLLM server, which cannot be asked: False when its lease may end before the next time."""
        if not self._pdlab:
            now = asyncio.get_running_loop().time()
            return now - self._leased_s.get(lease, now) < UNRENEWED_S
        try:
            status, _ = await self._http.call(b"POST", b"/pdlab/v1/renew", encode(LeaseBody(lease)))
        except Broken:
            return False
        return 200 <= status < 300

    async def alive(self, within_s: float = ALIVE_S) -> bool | None:
        try:
            status, _ = await self._http.call(b"GET", b"/health", within_s=within_s)
        except Unheard:
            return None
        except Broken:  # nobody listens, or whoever takes its connections, a proxy perhaps, hangs up on new ones
            return False
        return status == 200

    async def load(self) -> Report | None:
        try:
            if self._vllm is not None:
                return await self._vllm.report(self.spec, time.time())
            status, raw = await self._http.call(b"GET", b"/pdlab/v1/report", within_s=ALIVE_S)
            return read_report(self.spec.name, raw) if status == 200 else None
        except (Broken, Garbage, UsageError):
            return None

    async def switch(self, role: Role) -> None:
        await self._told(b"/pdlab/v1/role", encode(RoleChange(role.value)))

    async def drain(self) -> None:
        await self._told(b"/pdlab/v1/drain", b"{}")

    async def rejoin(self) -> None:
        """A vLLM server cannot be asked."""
        if self._pdlab:
            with suppress(Broken):
                await self._told(b"/pdlab/v1/rejoin", encode(Rejoin(self.spec.incarnation)))

    @property
    def _pdlab(self) -> bool:
        return self.spec.engine != "vllm"

    def _leased(self, lease: str) -> None:
        now = asyncio.get_running_loop().time()
        while self._leased_s and now - next(iter(self._leased_s.values())) > FORGET_S:
            del self._leased_s[next(iter(self._leased_s))]
        self._leased_s[lease] = now

    async def _told(self, path: bytes, body: bytes) -> None:
        status, raw = await self._http.call(b"POST", path, body)
        if not 200 <= status < 300:
            error = _read_trouble(raw).error
            raise Broken(f"{path.decode()}: {error.message if error is not None and error.message else status}")

    async def _leg(self, ask: LegAsk, *, stream: bool) -> HttpConnection:
        """A prefill leg makes one token of one candidate. vLLM's priorities run the other way, and most of its servers refuse them."""
        sampling, params = ask.sampling, ask.params
        if sampling.prompt_logprobs is not None and stream and not self._pdlab:
            raise Unfit("prompt_logprobs, and echo with logprobs, do not come in the stream of a vLLM server")
        if params is None and not stream:
            params = KvParams(do_remote_decode=True)
        least = min(sampling.min_tokens, 1) if sampling.best_of == 1 else 0  # of several, the token is dropped
        body = Body(
            model=self.spec.model,
            prompt=ask.tokens,
            max_tokens=sampling.max_tokens if stream else 1,
            stream=stream,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            min_tokens=sampling.min_tokens if stream else least,
            n=sampling.best_of if stream else 1,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            logit_bias=sampling.logit_bias,
            allowed_token_ids=sampling.allowed_token_ids,
            bad_words=list(sampling.bad_words),
            prompt_logprobs=sampling.prompt_logprobs,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            structured_outputs=sampling.structured,
            return_token_ids=True,
            return_tokens_as_token_ids=sampling.logprobs is not None,
            detokenize=not self._pdlab,
            priority=ask.priority if self._pdlab else 0,
            ttft_slo_ms=_ms(ask.ttft_slo_s) if self._pdlab else None,
            tpot_slo_ms=_ms(ask.tpot_slo_s) if self._pdlab else None,
            waited_ms=round(1000 * ask.waited_s, 3) if self._pdlab else 0.0,
            service_tier="flex" if self._pdlab and ask.offline else None,
            kv_transfer_params=params if params is not None or ask.raw_params is None else msgspec.Raw(ask.raw_params),
        )
        named = b"X-Request-Id: %b\r\n" % ask.leg.encode("ascii")
        if ask.trace is not None:
            named += trace_lines(ask.trace)
        if not ask.through:
            return await self._http.send(self._http.request(b"POST", b"/v1/completions", encode(body), named))
        relay = self._relays.get(ask.through) or self._relay(ask.through)
        named += b"%b: %b\r\n" % (RELAY_HEADER.encode(), self.spec.url.encode("ascii"))
        return await relay.send(relay.request(b"POST", b"/pdlab/v1/relay", encode(body), named))

    def _relay(self, url: str) -> HttpClient:
        while len(self._relays) >= MOST_RELAYS:
            self._relays.pop(next(iter(self._relays))).close()
        made = self._relays[url] = HttpClient(url, self._token, tls=self._tls)
        return made


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
