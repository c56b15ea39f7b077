"""Runs a job and sends what comes of it, whole or as server-sent events. A client that hangs up ends the job at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdlab.real.api.backend import Timed
from pdlab.real.api.errors import ApiError, encode
from pdlab.real.api.generate import Delta, Generation, Gone
from pdlab.real.api.legs import Prefill, handed_on
from pdlab.real.api.service import GenerateJob, Service, Shape
from pdlab.real.net.wire import StreamEvent

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
MANY_SCORES = 4096  # of prompts' tokens: their JSON takes tens of milliseconds
STATUS_S = 0.1  # within which a refusal of a stream is still an answer of its own


class Chunks:
    """The events of a stream. One that is text alone (and `token_ids`), as nearly all are, is put together from bytes made beforehand."""

    def __init__(self, head: dict[str, Any], shape: Shape, include_usage: bool, token_ids: bool = False) -> None:
        self.shape, self.token_ids = shape, token_ids
        self.begin = b"data: " + encode(head)[:-1] + b',"choices":['
        self.end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self.text_begin, self.text_end = self.begin + b'{"index":', shape.after + b"}" + self.end
        self.ids_begin, self.ids_end = shape.after + b',"token_ids":', b"}" + self.end

    def choice(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> bytes:
        """`usage`: that of the choice so far, where each chunk tells it."""
        return self.begin + encode(choice) + (self.end if usage is None else b'],"usage":' + encode(usage) + b"}\n\n")

    def news(self, deltas: list[Delta]) -> bytes:
        """Choices of which nothing can be shown yet are left out."""
        if self.token_ids:
            return b"".join([self._with_ids(d) for d in deltas if d.tokens or d.finish or d.text])
        return b"".join([self._one(d) for d in deltas if d.text or d.finish or d.logprobs or d.calls])

    def counted(self, deltas: list[Delta], usage: Callable[[int], dict[str, Any]]) -> bytes:
        """As `news`; each chunk tells its choice's usage so far."""
        found = []
        for delta in deltas:
            if delta.text or delta.finish or delta.logprobs or delta.calls or (self.token_ids and delta.tokens):
                choice = self.shape.chunk(delta)
                if self.token_ids:
                    choice["token_ids"] = delta.tokens
                found.append(self.choice(choice, usage(delta.choice)))
        return b"".join(found)

    def _one(self, delta: Delta) -> bytes:
        if delta.finish or delta.logprobs or delta.calls:
            return self.choice(self.shape.chunk(delta))
        return b"%b%d%b%b%b" % (self.text_begin, delta.choice, self.shape.before, encode(delta.text), self.text_end)

    def _with_ids(self, delta: Delta) -> bytes:
        if delta.finish or delta.logprobs or delta.calls:
            return self.choice({**self.shape.chunk(delta), "token_ids": delta.tokens})
        text, ids = encode(delta.text), encode(delta.tokens)
        return b"%b%d%b%b%b%b%b" % (self.text_begin, delta.choice, self.shape.before, text, self.ids_begin, ids, self.ids_end)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self.begin + b'],"usage":' + encode(usage) + b"}\n\n"

    def pdlab(self, told: object) -> bytes:
        """A chunk without choices."""
        return self.begin + b'],"pdlab":' + encode(told) + b"}\n\n"


class Answer(Response):
    """Not begun before it is called; until the first token, or event, an error is still an answer of its own. `timeline`: the request's
    stages are told at the end, if the engine knows them."""

    def __init__(self, service: Service, job: GenerateJob, request_id: str, timeline: bool = False) -> None:
        super().__init__(media_type="text/event-stream" if job.stream else "application/json")
        del self.headers["content-length"]
        self.service, self.job, self.name = service, job, request_id
        self.timed = service.engine if timeline and isinstance(service.engine, Timed) else None
        shape = job.shape
        self.head = {
            "id": f"{shape.prefix}-{request_id}",
            "object": shape.chunk_kind if job.stream else shape.kind,
            "created": int(time.time()),
            "model": service.model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError as long as nothing was sent."""
        with self.service.admitted(self.job, self.name) as generation, _watched(receive, generation):
            try:
                if self.job.stream:
                    await self._stream(generation, send)
                else:
                    await self._whole(generation, send, scope.get("server") or ("", 0))
            except Gone:
                return

    async def _whole(self, generation: Generation, send: Send, server: tuple[str, int]) -> None:
        while generation.open:
            await generation.news()
        if generation.moved:
            raise ApiError(409, "the request has moved to another instance", code="moved")
        if sum(map(len, generation.scores.values())) > MANY_SCORES:  # others' tokens go on meanwhile
            body, raw = await asyncio.to_thread(self._told, generation, server)
        else:
            body, raw = self._told(generation, server)
        self.headers["content-length"] = str(len(raw))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": raw})
        generation.delivered = isinstance(self.job.leg, Prefill) and body["kv_transfer_params"] is not None

    def _told(self, generation: Generation, server: tuple[str, int]) -> tuple[dict[str, Any], bytes]:
        """A whole answer, and its bytes."""
        job = self.job
        best = generation.best(job.n)
        choices = [job.shape.whole(index, choice, generation.scores_of(choice.index)) for index, choice in enumerate(best)]
        if job.ask.token_ids:
            for shown, choice in zip(choices, best, strict=True):
                shown["token_ids"] = choice.tokens
        body = {**self.head, "choices": choices, "usage": _usage(generation), **job.shape.beside(generation.scores)}
        told = self._timeline(generation) or {}
        if isinstance(job.leg, Prefill):
            body["kv_transfer_params"] = self._handed_on(generation, server)
            told |= {"event": "prefilled", "queue_s": generation.choices[0].queue_s}
            if generation.fetched is not None:
                told["fetched"] = generation.fetched
        if told:
            body["pdlab"] = told
        return body, encode(body)

    async def _stream(self, generation: Generation, send: Send) -> None:
        """Where nothing is to be said for a while, a comment says so: a proxy, or a client, on the way may hang up on silence."""
        job = self.job
        chunks = Chunks(self.head, job.shape, job.include_usage, job.ask.token_ids)
        silence = Silence(generation.wake, STATUS_S)
        try:
            deltas = await generation.news()
            while not deltas and not generation.events and not silence.over:
                deltas = await generation.news()
            self.headers["cache-control"] = "no-cache"
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            silence.limit_s = self.service.comment_s
            openings = Openings(job.shape, generation)
            try:
                text = self._news(chunks, openings, generation, deltas)
                while generation.open:
                    if not text and silence.over:
                        text = COMMENT
                    if text:
                        await send({"type": "http.response.body", "body": text, "more_body": True})
                        silence.broken()
                    text = self._news(chunks, openings, generation, await generation.news())
                if generation.moved:
                    text += chunks.pdlab(StreamEvent("moved"))
                if job.include_usage:
                    text += chunks.usage(_usage(generation))
                if (timeline := self._timeline(generation)) is not None:
                    text += chunks.pdlab(timeline)
            except ApiError as error:
                text = b"data: " + encode(error.body()) + b"\n\n"
            await send({"type": "http.response.body", "body": text + DONE})
        finally:
            silence.end()

    def _news(self, chunks: Chunks, openings: Openings, generation: Generation, deltas: list[Delta]) -> bytes:
        text = _events(chunks, generation) if generation.events else b""
        counts = self.job.usage_always
        if deltas and openings.left:
            text += b"".join([chunks.choice(one, _usage_of(generation, one["index"], 0) if counts else None) for one in openings.due()])
        if counts:
            return text + chunks.counted(deltas, lambda choice: _usage_of(generation, choice, generation.told_of(choice)))
        return text + chunks.news(deltas)

    def _handed_on(self, generation: Generation, server: tuple[str, int]) -> dict[str, Any] | None:
        """None where its token ended the request, or the KV was pushed."""
        exchange, held = generation.exchange, generation.held
        if exchange is None or held is None or generation.choices[0].finish == "stop":
            return None
        return handed_on(held, self.service.engine.ready, exchange.host or server[0], exchange.port or server[1] or 0)

    def _timeline(self, generation: Generation) -> dict[str, Any] | None:
        if self.timed is None or (found := self.timed.timeline(next(iter(generation.first_id)))) is None:
            return None
        return {"timeline": found}


class Openings:
    """What comes before each choice's first token: of all choices at once, or where it tells of the prompt, of each when that is
    computed."""

    def __init__(self, shape: Shape, generation: Generation) -> None:
        self.shape, self.generation = shape, generation
        self.left = list(range(len(generation.choices)))

    def due(self) -> list[dict[str, Any]]:
        generation, waits = self.generation, self.shape.needs_scores
        due = [choice for choice in self.left if not waits or generation.scores_of(choice) is not None]
        self.left = [choice for choice in self.left if choice not in due]
        found = [self.shape.opening(choice, generation.scores_of(choice)) for choice in due]
        return [opening for opening in found if opening is not None]


class Silence:
    """Of a stream: `over` when nothing was said for `limit_s`; then `wake` is called."""

    def __init__(self, wake: Callable[[], None], limit_s: float) -> None:
        self.wake, self.limit_s = wake, limit_s
        self._loop = asyncio.get_running_loop()
        self._since_s = self._loop.time()
        self._timer = self._loop.call_later(limit_s, self._ring)

    @property
    def over(self) -> bool:
        return self._loop.time() - self._since_s >= self.limit_s

    def broken(self) -> None:
        """Something was said."""
        self._since_s = self._loop.time()

    def end(self) -> None:
        self._timer.cancel()

    def _ring(self) -> None:
        if self.over:
            self.wake()
        left_s = self._since_s + self.limit_s - self._loop.time()
        self._timer = self._loop.call_later(left_s if left_s > 0 else self.limit_s, self._ring)


def _events(chunks: Chunks, generation: Generation) -> bytes:
    told, generation.events = generation.events, []
    return b"".join([chunks.pdlab(event) for event in told])


@contextmanager
def _watched(receive: Receive, generation: Generation) -> Iterator[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.leave()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


def _usage(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _usage_of(generation: Generation, choice: int, completion: int) -> dict[str, Any]:
    """So far, of one choice, which has `completion` tokens, and its prompt."""
    prompt = len(generation.prompts[choice // generation.best_of])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
