"""The OpenAI API over an engine: routes, admission, streaming, and what an operator asks (health, readiness, metrics)."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from pdlab import __version__
from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.real.openai import requests as bodies
from pdlab.real.openai.errors import ApiError, bad
from pdlab.real.openai.generate import Engine, Generation
from pdlab.real.openai.metrics import Metrics
from pdlab.real.openai.requests import ChatRequest, Common, CompletionRequest
from pdlab.real.openai.shapes import DONE, Chats, Completions, encode, event, usage
from pdlab.types import UsageError

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
MOST_BODY_BYTES = 32 << 20


class Service:
    """One model served. At most `max_requests` are in flight; with `api_key`, /v1 asks for it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, *, max_requests: int = 1024, api_key: str | None = None) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, model
        self.max_requests, self.api_key = max_requests, api_key
        self.metrics = Metrics(model, engine.ready, lambda: engine.load)
        self.ids = itertools.count(1)
        self.in_flight = 0
        self.draining = False
        self.created = int(time.time())
        self.took_s = 1.0  # a request, smoothed: what Retry-After is guessed from

    # ------------------------------------------------------------ admission

    def not_ready(self) -> list[str]:
        """Why no request should come here now; empty when one may."""
        reasons = [self.engine.down] if self.engine.down is not None else []
        if self.draining:
            reasons.append("draining")
        if self.in_flight >= self.max_requests:
            reasons.append(f"overloaded: {self.in_flight} requests in flight, at most {self.max_requests}")
        return reasons

    def admit(self) -> None:
        """Raises ApiError where no request can be taken in now."""
        if self.engine.down is not None:
            raise ApiError(503, self.engine.down, code="engine_down")
        if self.draining:
            raise ApiError(503, "the server is draining and takes no new requests", code="draining", retry_after_s=5)
        if self.in_flight >= self.max_requests:
            wait_s = max(1, min(60, round(self.took_s)))
            raise ApiError(
                429,
                f"{self.in_flight} requests are in flight, at most {self.max_requests} are allowed: try again in {wait_s} s",
                kind="rate_limit_error",
                code="overloaded",
                retry_after_s=wait_s,
            )

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.model!r}", param="model", code="model_not_found")

    def room(self, prompt_tokens: int, max_tokens: int | None, param: str) -> int:
        """`max_tokens` that fit beside a prompt; None asks for all there is."""
        most = self.engine.ready.max_tokens
        if max_tokens is None:
            max_tokens = max(most - prompt_tokens, 1)
        if prompt_tokens + max_tokens > most:
            raise bad(
                f"the prompt has {prompt_tokens} tokens and {param} is {max_tokens}, together more than the {most} that fit",
                "prompt" if prompt_tokens >= most else param,
                "context_length_exceeded",
            )
        return max_tokens

    # ------------------------------------------------------------ /v1

    async def completions(self, request: Request) -> Response:
        body = bodies.parse(await _read(request), CompletionRequest)
        self.check_model(body.model)
        n, best_of = bodies.choices(body, body.best_of)
        if body.suffix:
            raise bad("suffix is not supported", "suffix")
        if body.logprobs is not None and not 0 <= body.logprobs <= bodies.MOST_LOGPROBS:
            raise bad(f"logprobs must be from 0 to {bodies.MOST_LOGPROBS}, not {body.logprobs}", "logprobs")
        if body.echo and body.logprobs is not None:
            raise bad("echo with logprobs is not supported: prompt tokens have no log-probabilities here", "echo")
        given = bodies.prompts(body.prompt)
        prompts = [self._tokens(prompt) for prompt in given]
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        for prompt in prompts:
            self.room(len(prompt), max_tokens, "max_tokens")
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in given] if body.echo else []
        shape = Completions(self.tokenizer, body.logprobs, echoes, best_of)
        return await self._answer(request, body, shape, prompts, max_tokens, n, best_of, body.logprobs)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise bad("prompt is empty", "prompt")
        vocab = self.engine.ready.vocab
        wrong = next((token for token in tokens if not 0 <= token < vocab), None)
        if wrong is not None:
            raise bad(f"prompt has token {wrong}, which is not in the vocabulary of {vocab}", "prompt")
        return tokens

    async def chat(self, request: Request) -> Response:
        body = bodies.parse(await _read(request), ChatRequest)
        self.check_model(body.model)
        n, best_of = bodies.choices(body, None)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        if not 0 <= (body.top_logprobs or 0) <= bodies.MOST_LOGPROBS:
            raise bad(f"top_logprobs must be from 0 to {bodies.MOST_LOGPROBS}, not {body.top_logprobs}", "top_logprobs")
        if body.response_format is not None and body.response_format.get("type") != "text":
            raise bad(f"response_format {body.response_format.get('type')!r} is not supported, only text", "response_format")
        if body.tool_choice not in (None, "none", "auto"):
            raise bad("tool_choice can only be none or auto: calls are not forced", "tool_choice")
        prompt = self._tokens_of_chat(body)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        max_tokens = self.room(len(prompt), asked, "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._answer(request, body, Chats(self.tokenizer, logprobs), [prompt], max_tokens, n, best_of, logprobs)

    def _tokens_of_chat(self, body: ChatRequest | bodies.TokenizeRequest) -> list[int]:
        messages = [message.plain() for message in body.messages or ()]
        if not messages:
            raise bad("messages is empty", "messages")
        options: dict[str, Any] = {}
        if isinstance(body, ChatRequest):
            options = {**(body.chat_template_kwargs or {}), "continue_final": bool(body.continue_final_message)}
            if body.tools and body.tool_choice != "none":
                options["tools"] = body.tools
        try:
            return self.tokenizer.encode(self.tokenizer.chat(messages, **options), special=False)
        except (UsageError, TypeError) as error:
            raise bad(str(error), "messages") from None

    async def _answer(
        self,
        request: Request,
        body: Common,
        shape: Completions | Chats,
        prompts: list[list[int]],
        max_tokens: int,
        n: int,
        best_of: int,
        logprobs: int | None,
    ) -> Response:
        chooses = best_of > n
        sampling = bodies.sampling(
            body,
            max_tokens=max_tokens,
            best_of=best_of,
            logprobs=0 if chooses and logprobs is None else logprobs,
            vocab=self.engine.ready.vocab,
        )
        stops = bodies.stops(body.stop)
        self.admit()
        generation = Generation(
            self.engine,
            self.tokenizer,
            self.metrics,
            [next(self.ids) for _ in prompts],
            prompts,
            sampling,
            stops=stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            continues=isinstance(shape, Completions),
            priority=body.priority or 0,
        )
        head = {"id": f"{shape.prefix}-{request.state.request_id}", "created": int(time.time()), "model": self.model}
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = self._counted(self._stream(generation, shape, {**head, "object": shape.chunk_kind}, with_usage))
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        await _unless_gone(request, self._counted(_drained(generation)))
        choices = _best(generation, best_of, n)
        whole = {**head, "object": shape.kind, "choices": [shape.whole(i, c) for i, c in enumerate(choices)], "usage": usage(generation)}
        return Response(encode(whole), media_type="application/json")

    async def _counted(self, work: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """One more request in flight while the work goes on."""
        self.in_flight += 1
        started_s = time.monotonic()
        try:
            async for part in work:
                yield part
        finally:
            self.in_flight -= 1
            self.took_s += 0.1 * (time.monotonic() - started_s - self.took_s)
            await work.aclose()  # type: ignore[attr-defined]

    async def _stream(
        self, generation: Generation, shape: Completions | Chats, head: dict[str, Any], with_usage: bool
    ) -> AsyncIterator[bytes]:
        extra = {"usage": None} if with_usage else {}
        opening = [event({**head, **extra, "choices": [choice]}) for choice in shape.opening(len(generation.choices))]
        deltas = generation.__aiter__()
        try:
            if opening:
                yield b"".join(opening)
            async for found in deltas:
                shown = [d for d in found if d.text or d.finish or d.logprobs]
                if shown:
                    yield b"".join([event({**head, **extra, "choices": [shape.chunk(d)]}) for d in shown])
            if with_usage:
                yield event({**head, "choices": [], "usage": usage(generation)})
            yield DONE
        except ApiError as error:
            yield event(error.body())
            yield DONE
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]

    async def models(self, request: Request) -> Response:
        card = {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "pdlab",
            "max_model_len": self.engine.ready.max_tokens,
        }
        if (name := request.path_params.get("name")) is not None:
            self.check_model(name)
            return Response(encode(card), media_type="application/json")
        return Response(encode({"object": "list", "data": [card]}), media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        body = bodies.parse(await _read(request), bodies.TokenizeRequest)
        tokens = self._tokens_of_chat(body) if body.prompt is None else self.tokenizer.encode(body.prompt, body.add_special_tokens)
        answer = {"count": len(tokens), "max_model_len": self.engine.ready.max_tokens, "tokens": tokens}
        return Response(encode(answer), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        body = bodies.parse(await _read(request), bodies.DetokenizeRequest)
        if body.tokens:
            self._tokens(body.tokens)
        return Response(encode({"prompt": self.tokenizer.decode(body.tokens, skip_special=False)}), media_type="application/json")

    # ------------------------------------------------------------ for operators

    async def health(self, request: Request) -> Response:
        if self.engine.down is not None:
            raise ApiError(503, self.engine.down, code="engine_down")
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        reasons = self.not_ready()
        body = {"ready": not reasons, "reasons": reasons}
        return Response(encode(body), 503 if reasons else 200, media_type="application/json")

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return Response(encode({"version": __version__}), media_type="application/json")


async def _read(request: Request) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MOST_BODY_BYTES:
            raise ApiError(413, f"the body exceeds {MOST_BODY_BYTES >> 20} MiB")
    return bytes(raw)


async def _drained(generation: Generation) -> AsyncIterator[bytes]:
    """Run to the end; nothing is shown on the way."""
    deltas = generation.__aiter__()
    try:
        async for _ in deltas:
            yield b""
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]


async def _unless_gone(request: Request, work: AsyncIterator[bytes]) -> None:
    """Run to the end, or until the client has hung up: then the work is closed, which cancels it in the engine."""

    async def all_of_it() -> None:
        async for _ in work:
            pass

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    running, gone = asyncio.create_task(all_of_it()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ApiError(499, "the client has gone")
        running.result()
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)
        await work.aclose()  # type: ignore[attr-defined]


def _best(generation: Generation, best_of: int, n: int) -> list[Any]:
    """The n likeliest candidates of each prompt, by mean log-probability; all in order where n is best_of."""
    found = []
    for first in range(0, len(generation.choices), best_of):
        candidates = generation.choices[first : first + best_of]
        found += candidates if n == best_of else sorted(candidates, key=lambda c: (-c.mean_logprob, c.index))[:n]
    return found


def create_app(service: Service) -> FastAPI:
    """Routes, request ids, keys, and errors in OpenAI's shape."""
    app = FastAPI(title="pdlab", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def route(path: str, handler: Handler, *methods: str) -> None:
        async def guarded(request: Request) -> Response:
            request.state.request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
            try:
                if service.api_key is not None and path.startswith("/v1/"):
                    _check_key(request, service.api_key)
                response = await handler(request)
            except ApiError as caught:
                error = caught
            except Exception:
                log.exception("%s %s failed", request.method, request.url.path)
                error = ApiError(500, "the server has failed on this request; its log says more")
            else:
                response.headers["X-Request-Id"] = request.state.request_id
                return response
            if error.status in (429, 503):
                service.metrics.rejected(error.status)
            response = error.response()
            response.headers["X-Request-Id"] = request.state.request_id
            return response

        app.add_route(path, guarded, methods=list(methods))

    route("/v1/completions", service.completions, "POST")
    route("/v1/chat/completions", service.chat, "POST")
    route("/v1/models", service.models, "GET")
    route("/v1/models/{name:path}", service.models, "GET")
    route("/tokenize", service.tokenize, "POST")
    route("/detokenize", service.detokenize, "POST")
    route("/health", service.health, "GET")
    route("/ready", service.ready, "GET")
    route("/metrics", service.prometheus, "GET")
    route("/version", service.version, "GET")

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
        return ApiError(error.status_code, text.get(error.status_code, str(error.detail))).response()

    app.add_exception_handler(HTTPException, http_error)
    return app


def _check_key(request: Request, key: str) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
        raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
