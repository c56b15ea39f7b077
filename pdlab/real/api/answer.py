"""Runs a job and sends what comes of it, whole or as server-sent events. A client that hangs up ends the job at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdlab.real.api.errors import ApiError, encode
from pdlab.real.api.generate import Delta, Generation, Gone
from pdlab.real.api.service import Job, Service, Shape

DONE = b"data: [DONE]\n\n"


class Chunks:
    """The events of a stream. One that is text alone, as nearly all are, is put together from bytes made beforehand."""

    def __init__(self, head: dict[str, Any], shape: Shape, include_usage: bool) -> None:
        self.shape = shape
        self.begin = b"data: " + encode(head)[:-1] + b',"choices":['
        self.end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self.text_begin, self.text_end = self.begin + b'{"index":', shape.after + b"}" + self.end

    def choice(self, choice: dict[str, Any]) -> bytes:
        return self.begin + encode(choice) + self.end

    def news(self, deltas: list[Delta]) -> bytes:
        """Choices of which nothing can be shown yet are left out."""
        return b"".join([self._one(d) for d in deltas if d.text or d.finish or d.logprobs])

    def _one(self, delta: Delta) -> bytes:
        if delta.finish or delta.logprobs:
            return self.choice(self.shape.chunk(delta))
        return b"%b%d%b%b%b" % (self.text_begin, delta.choice, self.shape.before, encode(delta.text), self.text_end)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self.begin + b'],"usage":' + encode(usage) + b"}\n\n"


class Answer(Response):
    """Not begun before it is called; until the first token an error is still an answer of its own."""

    def __init__(self, service: Service, job: Job, request_id: str) -> None:
        super().__init__(media_type="text/event-stream" if job.stream else "application/json")
        del self.headers["content-length"]
        self.service, self.job = service, job
        shape = job.shape
        self.head = {
            "id": f"{shape.prefix}-{request_id}",
            "object": shape.chunk_kind if job.stream else shape.kind,
            "created": int(time.time()),
            "model": service.model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError as long as nothing was sent."""
        with self.service.admitted(self.job) as generation, _watched(receive, generation):
            try:
                await (self._stream if self.job.stream else self._whole)(generation, send)
            except Gone:
                return

    async def _whole(self, generation: Generation, send: Send) -> None:
        while generation.open:
            await generation.news()
        shape = self.job.shape
        choices = [shape.whole(index, choice) for index, choice in enumerate(generation.best(self.job.n))]
        body = encode({**self.head, "choices": choices, "usage": _usage(generation)})
        self.headers["content-length"] = str(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, generation: Generation, send: Send) -> None:
        chunks = Chunks(self.head, self.job.shape, self.job.include_usage)
        deltas = await generation.news()
        self.headers["cache-control"] = "no-cache"
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        text = b"".join([chunks.choice(choice) for choice in self.job.shape.opening(len(generation.choices))]) + chunks.news(deltas)
        try:
            while generation.open:
                if text:
                    await send({"type": "http.response.body", "body": text, "more_body": True})
                text = chunks.news(await generation.news())
            if self.job.include_usage:
                text += chunks.usage(_usage(generation))
        except ApiError as error:
            text = b"data: " + encode(error.body()) + b"\n\n"
        await send({"type": "http.response.body", "body": text + DONE})


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
