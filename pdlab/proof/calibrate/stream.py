"""A streaming request to any OpenAI-compatible server, and when each token of it came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import msgspec

from pdlab.core.types import UsageError
from pdlab.proof.bench.server import TIMELINE
from pdlab.proof.bench.stream import TimedStream
from pdlab.real.net.http import Broken, HttpClient

ANSWER_S = 600.0


@dataclass(frozen=True, slots=True)
class Heard:
    """Clock readings, seconds: when it was sent, and when each token came."""

    sent_s: float
    tokens_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.sent_s

    @property
    def gap_s(self) -> float:
        """The median time between tokens."""
        gaps = sorted(after - before for before, after in zip(self.tokens_s, self.tokens_s[1:], strict=False))
        return gaps[len(gaps) // 2]


_read_object = msgspec.json.Decoder(dict[str, Any]).decode


class MeasuredServer:
    """One that `http` calls (its URL without /v1). `ask` it for tokens; prompts are token ids, so that nothing is tokenized."""

    def __init__(self, http: HttpClient, model: str, vocab: int, *, temperature: float = 0.0, seed: int = 0) -> None:
        self.http, self.model, self.vocab, self.temperature = http, model, vocab, temperature
        self.random = random.Random(seed)

    @property
    def url(self) -> str:
        return self.http.url

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(self.vocab) for _ in range(tokens)]

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        """`kv`: where the prompt's KV waits, as another server's `prefill` has said. Raises UsageError when the server refuses, or sends no
        tokens."""
        body = self._body(
            prompt,
            output_tokens,
            min_tokens=output_tokens,
            temperature=self.temperature,
            stream=True,
            return_token_ids=True,  # else a token that completes no character would not be heard of
        )
        if kv is not None:
            body["kv_transfer_params"] = kv
        url, stream = self.url, TimedStream(lambda gap_s: None, keep=True)
        request = self.http.request(b"POST", b"/v1/completions", msgspec.json.encode(body))
        sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await self.http.stream(request, stream.take)
        except (Broken, TimeoutError) as error:
            raise UsageError(f"{url}: {error or f'no answer within {ANSWER_S:g} s'}") from None
        if status != 200:
            raise UsageError(f"{url} answers {status} to a completion: {stream.content.decode(errors='replace')[:200]}")
        stamps = [came_s for came_s, _, tokens in stream.times or () for _ in range(tokens)]
        if len(stamps) < min(2, output_tokens):
            raise UsageError(f"{url} has streamed {len(stamps)} tokens where {output_tokens} were asked for")
        return Heard(sent_s, tuple(stamps))

    async def timeline(self, prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
        """What the server tells of such a request: a router's `X-PDLab-Timeline`. Empty where it tells nothing. Raises UsageError."""
        answer = await self._whole(self._body(prompt, output_tokens), "a completion", TIMELINE)
        return dict((answer.get("pdlab") or {}).get("timeline") or {})

    async def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Have a prompt computed, and its KV kept for another server: where it waits, in this one's words. Raises UsageError."""
        body = self._body(prompt, 1, temperature=self.temperature, kv_transfer_params={"do_remote_decode": True})
        kv = (await self._whole(body, "a prefill leg")).get("kv_transfer_params")
        if not kv:
            raise UsageError(f"{self.url} keeps no KV for another server: start it with a KV connector that does")
        return dict(kv)

    def _body(self, prompt: Sequence[int], output_tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": list(prompt), "max_tokens": output_tokens, "ignore_eos": True, **more}

    async def _whole(self, body: dict[str, Any], what: str, headers: bytes = b"") -> dict[str, Any]:
        url = self.url
        try:
            status, raw = await self.http.call(b"POST", b"/v1/completions", msgspec.json.encode(body), ANSWER_S, headers)
        except Broken as error:
            raise UsageError(f"{url}: {error}") from None
        if status != 200:
            raise UsageError(f"{url} answers {status} to {what}: {raw.decode(errors='replace')[:200]}")
        try:
            return _read_object(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UsageError(f"{url} answers {what} with what cannot be read: {raw.decode(errors='replace')[:200]}") from None


@asynccontextmanager
async def servers(urls: Sequence[str], vocab: int, *, temperature: float = 0.0, seed: int = 0) -> AsyncIterator[list[MeasuredServer]]:
    """One at each of these, and the first model that it serves; their seeds count up from `seed`. Raises UsageError where nothing
    answers."""
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(HttpClient(url))) for url in urls]
        yield [MeasuredServer(http, await model_of(http), vocab, temperature=temperature, seed=seed + n) for n, http in enumerate(clients)]


async def model_of(http: HttpClient) -> str:
    """The first model it serves. Raises UsageError where nothing answers."""
    try:
        _, raw = await http.call(b"GET", b"/v1/models", within_s=ANSWER_S)
        return str(msgspec.json.decode(raw)["data"][0]["id"])
    except Broken as error:
        raise UsageError(f"--url {http.url}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"--url {http.url}: /v1/models does not name a model") from None
