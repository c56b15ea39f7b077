"""Clients that stream token ids, and know what they must be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from pdlab.real.net.wire import TIMELINE_HEADER
from tests.support.served_cluster import NAME

TIMEOUT = httpx.Timeout(130.0)


def body(prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {**asked, "stream": True, "return_token_ids": True, "detokenize": False, **more}


class Client:
    """One request's stream. `error` is what the server said, `broken` that the connection did. Its times are `time.monotonic`'s; nan: not
    yet. `timeline` is the router's own account of it, where that told one."""

    def __init__(self, prompt: list[int], expected: Sequence[int], **more: Any) -> None:
        self.prompt, self.expected, self.more = prompt, list(expected), more
        self.tokens: list[int] = []
        self.status = 0
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        self.broken = False
        self.done = False  # [DONE], or a whole answer that is an error
        self.task: asyncio.Task[None] | None = None
        self.asked_s = self.first_s = self.ended_s = math.nan
        self.timeline: dict[str, Any] = {}
        self._news = asyncio.Condition()

    def start(self, http: httpx.AsyncClient, url: str) -> Client:
        self.asked_s = time.monotonic()
        self.task = asyncio.create_task(self._run(http, url))
        return self

    async def until(self, tokens: int) -> None:
        """Wait until it has as many, or has ended."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.tokens) >= tokens or self.done or self.broken)

    async def ended(self) -> None:
        assert self.task is not None
        await self.task

    async def hang_up(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def check(self, *, whole: bool = True) -> None:
        """No gap, no repeat, no token that is not the model's; whole, or with an error that says why."""
        assert self.tokens == self.expected[: len(self.tokens)], f"{self.tokens} is no beginning of {self.expected}"
        if whole or (self.error is None and not self.broken):
            assert self.done and self.error is None and not self.broken, f"{len(self.tokens)} tokens, then {self.error or 'the end'}"
            assert len(self.tokens) == len(self.expected) and self.finish == "length", f"{len(self.tokens)} of {len(self.expected)} tokens"
        elif self.error is not None:
            assert self.error.get("message") and self.done, f"an error without a reason: {self.error}"

    async def _run(self, http: httpx.AsyncClient, url: str) -> None:
        try:
            asked = body(self.prompt, len(self.expected), **self.more)
            async with http.stream("POST", f"{url}/v1/completions", json=asked, headers={TIMELINE_HEADER: "1"}) as answer:
                self.status = answer.status_code
                if self.status != 200:
                    self.error, self.done = json.loads(await answer.aread())["error"], True
                    return
                async for line in answer.aiter_lines():
                    await self._line(line)
            self.broken = not self.done
        except httpx.TransportError:
            self.broken = True
        finally:
            self.ended_s = time.monotonic()
            async with self._news:
                self._news.notify_all()

    async def _line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        if not line.startswith("data: {"):
            return
        chunk = json.loads(line.removeprefix("data: "))
        self.error = chunk.get("error") or self.error
        self.timeline = (chunk.get("pdlab") or {}).get("timeline") or self.timeline
        for choice in chunk.get("choices", []):
            self.tokens += choice.get("token_ids") or []
            if self.tokens and math.isnan(self.first_s):
                self.first_s = time.monotonic()
            self.finish = choice["finish_reason"] or self.finish
        async with self._news:
            self._news.notify_all()


class Load:
    """Clients of one router, or of several in turn."""

    def __init__(self, http: httpx.AsyncClient, urls: Sequence[str]) -> None:
        self.http, self.urls = http, urls
        self.clients: list[Client] = []

    def add(self, prompt: list[int], expected: Sequence[int], **more: Any) -> Client:
        url = self.urls[len(self.clients) % len(self.urls)]
        self.clients.append(Client(prompt, expected, **more).start(self.http, url))
        return self.clients[-1]

    def add_all(self, asked: Sequence[tuple[list[int], list[int]]], **more: Any) -> list[Client]:
        return [self.add(prompt, expected, **more) for prompt, expected in asked]

    async def ended(self, within_s: float = 120.0) -> None:
        """Every one has ended by then, but for those that have hung up."""
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(client.ended() for client in self.clients if client.task is None or not client.task.cancelled()))

    def check(self, *, whole: bool = True) -> None:
        for client in self.clients:
            client.check(whole=whole)


@asynccontextmanager
async def load(*urls: str) -> AsyncIterator[Load]:
    """What still streams at the end is hung up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as http:
        found = Load(http, urls)
        try:
            yield found
        finally:
            for client in found.clients:
                await client.hang_up()


async def expected(url: str, asked: Sequence[list[int]], tokens: int, **more: Any) -> list[list[int]]:
    """What a server makes of each prompt."""
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:

        async def one(prompt: list[int]) -> list[int]:
            answer = await http.post(f"{url}/v1/completions", json=body(prompt, tokens, stream=False, **more))
            assert answer.status_code == 200, answer.text
            found: list[int] = answer.json()["choices"][0]["token_ids"]
            assert len(found) == tokens
            return found

        return await asyncio.gather(*map(one, asked))
