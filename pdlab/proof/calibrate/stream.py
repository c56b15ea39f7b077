"""A streaming request to any OpenAI-compatible server, and when each token of it came."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from pdlab.core.types import UsageError


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


class MeasuredServer:
    """One at `url` (without /v1). `ask` it for tokens; prompts are token ids, so that nothing is tokenized."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, vocab: int, *, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.session, self.url, self.model, self.vocab, self.temperature = session, url, model, vocab, temperature
        self.random = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(self.vocab) for _ in range(tokens)]

    async def ask(self, prompt: Sequence[int], output_tokens: int, kv: Mapping[str, Any] | None = None) -> Heard:
        """`kv`: where the prompt's KV waits, as another server's `prefill` has said. Raises UsageError when the server refuses, or sends no
        tokens."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": self.temperature,
            "stream": True,
            "return_token_ids": True,  # else a token that completes no character would not be heard of
        }
        if kv is not None:
            body["kv_transfer_params"] = kv
        stamps: list[float] = []
        sent_s = time.perf_counter()
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise UsageError(f"{self.url} answers {answer.status} to a completion: {(await answer.text())[:200]}")
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        stamps += [now] * _tokens(line[6:])
        except aiohttp.ClientError as error:
            raise UsageError(f"{self.url}: {error}") from None
        if len(stamps) < min(2, output_tokens):
            raise UsageError(f"{self.url} has streamed {len(stamps)} tokens where {output_tokens} were asked for")
        return Heard(sent_s, tuple(stamps))

    async def timeline(self, prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
        """What the server tells of such a request: a router's `X-PDLab-Timeline`. Empty where it tells nothing. Raises UsageError."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": output_tokens, "ignore_eos": True}
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body, headers={"X-PDLab-Timeline": "1"}) as answer:
                if answer.status != 200:
                    raise UsageError(f"{self.url} answers {answer.status} to a completion: {(await answer.text())[:200]}")
                told = (await answer.json()).get("pdlab") or {}
        except aiohttp.ClientError as error:
            raise UsageError(f"{self.url}: {error}") from None
        return dict(told.get("timeline") or {})

    async def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Have a prompt computed, and its KV kept for another server: where it waits, in this one's words. Raises UsageError."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "ignore_eos": True,
            "temperature": self.temperature,
            "kv_transfer_params": {"do_remote_decode": True},
        }
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise UsageError(f"{self.url} answers {answer.status} to a prefill leg: {(await answer.text())[:200]}")
                kv = (await answer.json()).get("kv_transfer_params")
        except aiohttp.ClientError as error:
            raise UsageError(f"{self.url}: {error}") from None
        if not kv:
            raise UsageError(f"{self.url} keeps no KV for another server: start it with a KV connector that does")
        return dict(kv)


def _tokens(event: bytes) -> int:
    """That an event brings: as many ids as it names, or one where it has text."""
    choices = json.loads(event).get("choices") or []
    return sum(len(c["token_ids"]) if c.get("token_ids") is not None else int(bool(c.get("text"))) for c in choices)


async def model_of(session: aiohttp.ClientSession, url: str) -> str:
    """The first model it serves. Raises UsageError where nothing answers."""
    try:
        async with session.get(f"{url}/v1/models") as answer:
            models = (await answer.json())["data"]
            return str(models[0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        raise UsageError(f"--url {url}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"--url {url}: /v1/models does not name a model") from None


async def connect() -> aiohttp.ClientSession:
    """As many connections as are asked for; close it."""
    timeout = aiohttp.ClientTimeout(total=600)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20)
