"""What a server is, and what it takes: asked once, before the clock runs, so that no request of the benchmark is spent on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdlab.core.types import UsageError
from pdlab.proof.bench.prompts import HIGH, LOW, PromptTokens
from pdlab.proof.bench.stream import said
from pdlab.real.net.host_names import host_mistake, shown
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.net.wire import TIMELINE_HEADER

TIMELINE = f"{TIMELINE_HEADER}: 1\r\n".encode()
ANSWER_S, TOKEN_S = 10.0, 600.0  # for a question, for a token
# What is beyond OpenAI's own fields; a server that refuses a field is asked again without what stands up to it.
BEYOND = (
    ("return_token_ids", "the tokens of a chunk are counted by usage or one a chunk, and prompts cannot repeat the server's answers"),
    ("priority", "no priorities are sent"),
    ("ttft_slo_ms", "no TTFT objectives are sent"),
    ("tpot_slo_ms", "no TPOT objectives are sent"),
    ("stream_options", "tokens are counted as they come, one a chunk"),
    ("min_tokens", "answers may end early"),
    ("ignore_eos", "answers may end early"),
)


@dataclass(frozen=True, slots=True)
class BenchServer:
    """`refused`: fields of `BEYOND` that it does not take. `version` is what it says of itself, "" nothing."""

    url: str
    model: str
    version: str
    vocabulary: PromptTokens
    refused: frozenset[str] = frozenset()

    def body(self, fields: Mapping[str, Any]) -> bytes:
        """A completion's, without what the server refuses."""
        return msgspec.json.encode({"model": self.model, **{k: v for k, v in fields.items() if k not in self.refused}})

    @property
    def notes(self) -> list[str]:
        return [f"the server refuses {name}: {why}" for name, why in BEYOND if name in self.refused]


def address(url: str) -> str:
    """Without /v1. Raises UsageError where it cannot be one."""
    full = url if "//" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:
        host = None
    if not host:
        raise UsageError(f"--url {shown(url)}: give a server's address, such as http://127.0.0.1:8000")
    if mistake := host_mistake(host):
        raise UsageError(f"--url {shown(url)}: {mistake}")
    return full.rstrip("/").removesuffix("/v1")


def fields(prompt: list[int], output_tokens: int, sequences: int = 1) -> dict[str, Any]:
    """A streamed completion of exactly that length."""
    found: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return found if sequences == 1 else {**found, "n": sequences}


async def ask(client: HttpClient, *, model: str | None, vocab: int | None, extra: Mapping[str, Any]) -> BenchServer:
    """Ask for its model and version, then for one token, with all the fields that the workload needs (`extra`: priority and objectives).
    Raises UsageError where there is no server, or none that takes token ids."""
    try:
        name = model or await _model(client)
        version = await _version(client)
        return await _tried(
            client, BenchServer(client.url, name, version, PromptTokens() if vocab is None else PromptTokens.of(vocab)), extra, vocab
        )
    except Broken as error:
        raise UsageError(f"--url {client.url}: {error}; is the server running?") from None


async def _model(client: HttpClient) -> str:
    status, found = await client.call(b"GET", b"/v1/models", within_s=ANSWER_S)
    if status == 401:
        raise UsageError(f"--url {client.url}: it wants a key; give --api-key")
    try:
        return str(msgspec.json.decode(found)["data"][0]["id"])
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        raise UsageError(f"--url {client.url}: /v1/models names no model (status {status}); give --model") from None


async def _version(client: HttpClient) -> str:
    status, found = await client.call(b"GET", b"/version", within_s=ANSWER_S)
    try:
        return str(msgspec.json.decode(found)["version"]) if status == 200 else ""
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


async def _tried(client: HttpClient, server: BenchServer, extra: Mapping[str, Any], vocab: int | None) -> BenchServer:
    vocabulary, refused = server.vocabulary, set[str]()
    for _ in range(len(BEYOND) + 2):
        server = BenchServer(server.url, server.model, server.version, vocabulary, frozenset(refused))
        asked = {**fields([vocabulary.high - 1, vocabulary.low], 1), **extra}
        status, answer = await client.call(b"POST", b"/v1/completions", server.body(asked), TOKEN_S, TIMELINE)
        if status == 200:
            return server
        why = said(answer)
        if status not in (400, 422):
            raise UsageError(f"--url {client.url}: a completion of one token is answered with {status}: {why}")
        if "vocab" in why.lower() and vocab is None and (size := _size(why)):
            vocabulary = PromptTokens.of(size)
            continue
        left = [field for field, _ in BEYOND if field in asked and field not in refused]
        if "vocab" in why.lower() or not left:
            raise UsageError(f"--url {client.url}: it refuses token ids up to {vocabulary.high - 1} ({why}); give --vocab")
        # the one it names, or else the least usual that is left
        refused.add(next((field for field in left if field in why), left[0]))
    raise UsageError(f"--url {client.url}: it refuses whatever is asked: {why}")


def _size(message: str) -> int | None:
    """A vocabulary's size, where the message tells one below the ids that were tried."""
    sizes = [int(number) for number in re.findall(r"\d+", message)]
    return max((size for size in sizes if LOW // 100 < size < HIGH - 1), default=None)
