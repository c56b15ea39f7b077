"""An instance over HTTP: docs/protocol.md from the router's side.

The connections are asyncio protocols over httptools instead of a client library, since a request (both legs) costs the router
0.1 ms of CPU so and 0.33 ms by aiohttp, half of what it may cost in all. What a peer sends is bounded: heads, lines of a stream, whole
answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from pdlab.real.api.serve import keep_alive
from pdlab.real.cluster.remote import Broken, Fenced, Full, LegAsk, LegNews, LegTokens, Prefilled, TransferTrouble, Unfit
from pdlab.real.engine.messages import Sampling
from pdlab.real.wire import MOST_IDS, TOKEN_HEADER, Continue, KvParams, Rejoin, Release, RoleChange, StreamEvent
from pdlab.types import InstanceSpec, Role, UsageError

CONNECT_S, CALL_S, ALIVE_S = 2.0, 5.0, 1.0
MOST_HEAD_BYTES, MOST_LINE_BYTES, MOST_BODY_BYTES = 64 << 10, 16 << 20, 32 << 20
MOST_HELD_BYTES = 1 << 20  # of an answer that nobody has read yet; the socket then waits
MOST_IDLE = 512
ENDING_S = 1.0  # from a stream's [DONE] to the end of its answer
# vLLM leases KV for 30 s, and only a decode server renews it; a later pull reads, without an error, what lies there by then. The world asks
# every 10 s.
UNRENEWED_S, FORGET_S = 15.0, 60.0

TROUBLES = (Full, Unfit, Broken, TransferTrouble)
FINISHES = (None, "stop", "length")
CLIENTS_FAULT = ("invalid_request_error", "BadRequestError")  # as error chunks name it: pdlab, vLLM

encode = msgspec.json.Encoder().encode

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Connection(asyncio.Protocol):
    """One exchange at a time. `heard`: something of the answer has come; `done`: all of it has."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._wrong = ""
        self.status, self.heard, self.headed, self.done = 0, False, False, True
        self._head_bytes, self._held_bytes, self._parts = 0, 0, list[bytes]()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        keep_alive(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._wrong = self._wrong or (str(exc) if exc else "closed by the instance")
        self._pool.forget(self)
        if self._ending is not None:
            self._ending.cancel()
        self._wake()

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if not self.headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"no HTTP: {error}")
        if not self.headed and self._head_bytes > MOST_HEAD_BYTES:
            self._fail("the head of the answer is too long")
        if self._held_bytes > MOST_HELD_BYTES and self.open:
            assert self._transport is not None
            self._transport.pause_reading()
        self._wake()

    def on_message_begin(self) -> None:
        if self.done:
            self._fail("an answer that nobody asked for")

    def on_headers_complete(self) -> None:
        self.status, self.headed = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        self.done = True
        if not self._parser.should_keep_alive():
            self._wrong = self._wrong or "closed by the instance"
        if self._ending is not None:
            self.leave(True)

    def ask(self, request: bytes) -> None:
        assert self._transport is not None
        self.status, self.heard, self.headed, self.done = 0, False, False, False
        self._head_bytes, self._held_bytes, self._parts = 0, 0, []
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for the status. Raises Broken."""
        while not self.headed:
            await self._news()

    async def read(self) -> bytes:
        """What has come of the body since; empty: that was all. Raises Broken."""
        while not self._parts:
            if self.done:
                return b""
            await self._news()
        found = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        if self._held_bytes > MOST_HELD_BYTES and self.open:
            assert self._transport is not None
            self._transport.resume_reading()
        self._parts, self._held_bytes = [], 0
        return found

    async def whole(self) -> bytes:
        """The body. Raises Broken."""
        found = bytearray()
        while part := await self.read():
            found += part
            if len(found) > MOST_BODY_BYTES:
                raise Broken("the answer is too long")
        return bytes(found)

    def leave(self, ended: bool) -> None:
        """The exchange is over. `ended`: its last byte is here or must come at once, and the connection can serve another; else it is
        closed."""
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        if ended and self.done and not self._wrong and self.open:
            self._pool.idle(self)
        elif ended and not self.done and not self._wrong:
            self._ending = asyncio.get_running_loop().call_later(ENDING_S, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, why: str) -> None:
        self._wrong = self._wrong or why
        self.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self) -> None:
        if self._wrong:
            raise Broken(self._wrong)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Connections:
    """Kept-alive connections to one instance. Raises UsageError where `url`, `token` or `api_key` cannot be used."""

    def __init__(self, url: str, token: str = "", api_key: str = "") -> None:
        try:
            parts = urlsplit(url)
            self._tls, host, port = parts.scheme == "https", parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"an instance's url must be like http://host:8000, not {url!r}")
        for name, value in (("token", token), ("API key", api_key)):
            if not value.isascii() or not value.isprintable():
                raise UsageError(f"the {name} must be printable ASCII to go into an HTTP header")
        self.url, self._host, self._port = url, host, port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").encode()
        head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        head += f"{TOKEN_HEADER}: {token}\r\n" if token else ""
        head += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = head.encode("ascii")
        self._idle: dict[Connection, None] = {}
        self._all: set[Connection] = set()

    async def ask(self, method: bytes, path: bytes, body: bytes = b"", leg: str = "") -> Connection:
        """Send, and wait for the status. One that was kept alive may turn out to have been closed meanwhile; then another is tried. Raises
        Broken."""
        named = b"X-Request-Id: %b\r\n" % leg.encode("ascii") if leg else b""
        request = b"%b %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (method, self._prefix, path, self._head, named, len(body), body)
        while True:
            kept = self._kept()
            connection = kept or await self._connect()
            try:
                connection.ask(request)
                await connection.head()
                return connection
            except Broken:
                connection.abort()
                if kept is None or kept.heard:
                    raise
            except BaseException:
                connection.abort()
                raise

    async def call(self, method: bytes, path: bytes, body: bytes = b"", within_s: float = CALL_S) -> tuple[int, bytes]:
        """(status, body) of a small exchange. Raises Broken."""
        try:
            async with asyncio.timeout(within_s):
                connection = await self.ask(method, path, body)
                try:
                    return connection.status, await connection.whole()
                finally:
                    connection.leave(connection.done)
        except TimeoutError:
            raise Broken(f"{self.url} did not answer within {within_s:g} s") from None

    def close(self) -> None:
        """All of them, at once; whatever is under way breaks."""
        for connection in list(self._all):
            connection.abort()

    def idle(self, connection: Connection) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle[connection] = None
        else:
            connection.abort()

    def forget(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._all.discard(connection)

    def _kept(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port, ssl=self._tls or None)
        except TimeoutError:
            raise Broken(f"cannot connect to {self.url} within {CONNECT_S:g} s") from None
        except OSError as error:
            raise Broken(f"cannot connect to {self.url}: {error.strerror or error}") from None
        self._all.add(connection)
        return connection


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
    seed: int | None = None
    logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    detokenize: bool = True
    priority: int = 0
    kv_transfer_params: KvParams | msgspec.Raw | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """By vLLM's return_tokens_as_token_ids: the keys of `top_logprobs` are "token_id:123"."""

    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct, frozen=True):
    index: int = 0
    token_ids: Annotated[list[Token], msgspec.Meta(max_length=MOST_IDS)] | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Trouble(msgspec.Struct, frozen=True):
    message: str = ""
    type: str | None = None
    code: str | int | None = None


class Cached(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens_details: Cached | None = None


class Answer(msgspec.Struct, frozen=True):
    """A completion, or a chunk of one, or an error: what the router needs of it."""

    choices: list[Choice] = []
    pdlab: StreamEvent | None = None
    error: Trouble | None = None
    usage: Usage | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")

    def cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return (details.cached_tokens if details is not None else None) or 0


_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_params = msgspec.json.Decoder(KvParams).decode


def trouble(status: int, error: Trouble | None) -> Exception:
    """What an answer's status means to the router, or for 200 the error within its stream."""
    message = error.message if error is not None else ""
    code = error.code if error is not None else None
    if code == "kv_full" or status == 429:
        return Full(message)
    if code == "kv_lost" or status == 409:
        return TransferTrouble(message)
    if code == "lease_lost":
        return Fenced(message)
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


def _read_answer(raw: bytes) -> Answer:
    try:
        return _decode_answer(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken("an answer that cannot be read") from None


def _read_trouble(raw: bytes) -> Answer:
    """Of an answer that is no success: anything may stand there."""
    try:
        return _decode_answer(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Answer(error=Trouble(raw[:200].decode(errors="replace")))


def _prefilled(answer: Answer, alternatives: int | None) -> Prefilled:
    choice = answer.choices[0] if len(answer.choices) == 1 else Choice()
    if choice.token_ids is None or len(choice.token_ids) != 1 or choice.finish_reason not in ("stop", "length"):
        raise Broken("a prefill leg was not answered by one token")
    logprobs, top = scored(choice.logprobs, 1, alternatives or 0) if choice.logprobs is not None else (None, None)
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
    )


class Stream:
    """Server-sent events to a leg's news. `failed`: what to raise after the news; `ended`: [DONE] has come."""

    def __init__(self, sampling: Sampling) -> None:
        self.ended = False
        self.failed: Exception | None = None
        self._candidates = self._open = sampling.best_of
        self._alternatives = sampling.logprobs or 0
        self._rest = bytearray()

    def feed(self, read: bytes) -> list[LegNews]:
        """Tokens of one candidate that came together go out together."""
        found: list[LegNews] = []
        self._rest += read
        cut = self._rest.rfind(b"\n", len(self._rest) - len(read))
        if cut < 0:
            if len(self._rest) > MOST_LINE_BYTES:
                self.failed = Broken("a line of the stream is too long")
            return found
        lines = bytes(self._rest[:cut]).split(b"\n")
        del self._rest[: cut + 1]
        try:
            for line in lines:
                if line.startswith(b"data:") and not self.ended:
                    self._event(line[5:].strip(), found)
        except TROUBLES as error:
            self.failed = error
        return found

    def _event(self, event: bytes, found: list[LegNews]) -> None:
        if event == b"[DONE]":
            if self._open:
                raise Broken("the stream ended before its tokens did")
            self.ended = True
            return
        answer = _read_answer(event)
        if answer.error is not None:
            raise trouble(200, answer.error)
        if answer.pdlab is not None:
            if answer.pdlab.event == "moved":
                self._open = 0
            found.append(answer.pdlab)
        for choice in answer.choices:
            self._tokens(choice, answer.cached_tokens(), found)

    def _tokens(self, choice: Choice, cached_tokens: int, found: list[LegNews]) -> None:
        candidate, tokens, finish = choice.index, choice.token_ids or [], choice.finish_reason
        if finish is not None:
            self._open -= 1
        if finish not in FINISHES or not 0 <= candidate < self._candidates or self._open < 0:
            raise Broken(f"the stream has finish_reason {finish!r} for choice {candidate}")
        if choice.logprobs is not None:
            logprobs, top = scored(choice.logprobs, len(tokens), self._alternatives)
            found.append(LegTokens(candidate, tokens, finish, logprobs, top, cached_tokens))
            return
        last = found[-1] if found else None
        if isinstance(last, LegTokens) and last.candidate == candidate and last.finish is None and last.logprobs is None:
            found[-1] = LegTokens(candidate, last.tokens + tokens, finish, cached_tokens=last.cached_tokens or cached_tokens)
        elif tokens or finish:
            found.append(LegTokens(candidate, tokens, finish, cached_tokens=cached_tokens))


class HttpRemote:
    """A `remote.Remote`. `token` is the cluster's internal one, `api_key` the instance's. Raises UsageError where the spec's url cannot
    be used. `close` when the incarnation is gone: all that is under way breaks."""

    def __init__(self, spec: InstanceSpec, *, token: str = "", api_key: str = "") -> None:
        self.spec = spec
        self._connections = Connections(spec.url, token, api_key)
        self._leased_s: dict[str, float] = {}  # by a vLLM server, when

    def close(self) -> None:
        self._connections.close()

    async def prefill(self, ask: LegAsk) -> Prefilled:
        connection = await self._leg(ask, stream=False)
        try:
            raw = await connection.whole()
            answer = _read_answer(raw) if connection.status == 200 else _read_trouble(raw)
            if connection.status != 200 or answer.error is not None:
                raise trouble(connection.status, answer.error)
            found = _prefilled(answer, ask.sampling.logprobs)
            if not self._pdlab and found.params is not None:
                self._leased(found.params.remote_request_id or "")
            return found
        finally:
            connection.leave(connection.done)

    async def decode(self, ask: LegAsk) -> AsyncIterator[LegNews]:
        connection = await self._leg(ask, stream=True)
        stream = Stream(ask.sampling)
        try:
            if connection.status != 200:
                raise trouble(connection.status, _read_trouble(await connection.whole()).error)
            while not stream.ended:
                read = await connection.read()
                found = stream.feed(read)
                for news in found:
                    yield news
                if stream.failed is not None:
                    raise stream.failed
                if not read:
                    raise Broken("the stream broke off")
        finally:
            connection.leave(stream.ended or connection.done)

    async def proceed(self, go: Continue) -> None:
        await self._told(b"/pdlab/v1/continue", encode(go))

    async def release(self, lease: str) -> None:
        """A vLLM server cannot be asked: what it leases ends 30 s after its last heartbeat."""
        if self._pdlab:
            with suppress(Broken):
                await self._connections.call(b"POST", b"/pdlab/v1/release", encode(Release(lease)))

    async def renew(self, lease: str) -> bool:
        """Of a vLLM server, which cannot be asked: False when its lease may end before the next time."""
        if not self._pdlab:
            now = asyncio.get_running_loop().time()
            return now - self._leased_s.get(lease, now) < UNRENEWED_S
        try:
            status, _ = await self._connections.call(b"POST", b"/pdlab/v1/renew", encode(Release(lease)))
        except Broken:
            return False
        return 200 <= status < 300

    async def alive(self) -> bool:
        try:
            status, _ = await self._connections.call(b"GET", b"/health", within_s=ALIVE_S)
        except Broken:
            return False
        return status == 200

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
        status, raw = await self._connections.call(b"POST", path, body)
        if not 200 <= status < 300:
            error = _read_trouble(raw).error
            raise Broken(f"{path.decode()}: {error.message if error is not None and error.message else status}")

    async def _leg(self, ask: LegAsk, *, stream: bool) -> Connection:
        """A prefill leg makes one token of one candidate. vLLM's priorities run the other way, and most of its servers refuse them."""
        sampling, params = ask.sampling, ask.params
        if params is None and not stream:
            params = KvParams(do_remote_decode=True)
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
            min_tokens=sampling.min_tokens if stream else 0,
            n=sampling.best_of if stream else 1,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            logit_bias=sampling.logit_bias,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            return_token_ids=True,
            return_tokens_as_token_ids=sampling.logprobs is not None,
            detokenize=not self._pdlab,
            priority=ask.priority if self._pdlab else 0,
            kv_transfer_params=params if params is not None or ask.raw_params is None else msgspec.Raw(ask.raw_params),
        )
        return await self._connections.ask(b"POST", b"/v1/completions", encode(body), ask.leg)
