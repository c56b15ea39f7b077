"""Runs a job and sends what comes of it, whole or as server-sent events. A client that hangs up ends the job at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdlab.real.api.engine import Timed
from pdlab.real.api.errors import ApiError, encode
from pdlab.real.api.generate import Delta, Generation, Gone
from pdlab.real.api.legs import Prefill, handed_on
from pdlab.real.api.service import Job, Service, Shape
from pdlab.real.wire import StreamEvent

DONE = b"data: [DONE]\n\n"


class Chunks:
    """The events of a stream. One that is text alone (and `token_ids`), as nearly all are, is put together from bytes made beforehand."""

    def __init__(self, head: dict[str, Any], shape: Shape, include_usage: bool, token_ids: bool = False) -> None:
        self.shape, self.token_ids = shape, token_ids
        self.begin = b"data: " + encode(head)[:-1] + b',"choices":['
        self.end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self.text_begin, self.text_end = self.begin + b'{"index":', shape.after + b"}" + self.end
        self.ids_begin, self.ids_end = shape.after + b',"token_ids":', b"}" + self.end

    def choice(self, choice: dict[str, Any]) -> bytes:
        return self.begin + encode(choice) + self.end

    def news(self, deltas: list[Delta]) -> bytes:
        """Choices of which nothing can be shown yet are left out."""
        if self.token_ids:
            return b"".join([self._with_ids(d) for d in deltas if d.tokens or d.finish or d.text])
        return b"".join([self._one(d) for d in deltas if d.text or d.finish or d.logprobs or d.calls])

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

    def __init__(self, service: Service, job: Job, request_id: str, timeline: bool = False) -> None:
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
        job = self.job
        choices = [job.shape.whole(index, choice) for index, choice in enumerate(generation.best(job.n))]
        if job.ask.token_ids:
            for shown, choice in zip(choices, generation.best(job.n), strict=True):
                shown["token_ids"] = choice.tokens
        body = {**self.head, "choices": choices, "usage": _usage(generation)}
        told = self._timeline(generation) or {}
        if isinstance(job.leg, Prefill):
            body["kv_transfer_params"] = self._handed_on(generation, server)
            told |= {"event": "prefilled", "queue_s": generation.choices[0].queue_s}
        if told:
            body["pdlab"] = told
        raw = encode(body)
        self.headers["content-length"] = str(len(raw))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": raw})
        generation.delivered = isinstance(job.leg, Prefill) and body["kv_transfer_params"] is not None

    async def _stream(self, generation: Generation, send: Send) -> None:
        job = self.job
        chunks = Chunks(self.head, job.shape, job.include_usage, job.ask.token_ids)
        deltas = await generation.news()
        while not deltas and not generation.events:
            deltas = await generation.news()
        self.headers["cache-control"] = "no-cache"
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        text = _events(chunks, generation) + b"".join([chunks.choice(choice) for choice in job.shape.opening(len(generation.choices))])
        text += chunks.news(deltas)
        try:
            while generation.open:
                if text:
                    await send({"type": "http.response.body", "body": text, "more_body": True})
                text = chunks.news(await generation.news())
                if generation.events:
                    text = _events(chunks, generation) + text
            if generation.moved:
                text += chunks.pdlab(StreamEvent("moved"))
            if job.include_usage:
                text += chunks.usage(_usage(generation))
            if (timeline := self._timeline(generation)) is not None:
                text += chunks.pdlab(timeline)
        except ApiError as error:
            text = b"data: " + encode(error.body()) + b"\n\n"
        await send({"type": "http.response.body", "body": text + DONE})

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
