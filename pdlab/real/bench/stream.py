"""The answer to a completion, as a stream of server-sent events: when tokens came, how many, and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pdlab.real.bench.http import Exchange


class Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class Told(msgspec.Struct):
    timeline: dict[str, Any] | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    pdlab: Told | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(Chunk).decode


class Stream(Exchange):
    """Times are on the client's clock. `on_gap(seconds)` is called between chunks of one sequence; a chunk is counted once, however many
    tokens it has. `keep`: remember when each came."""

    def __init__(self, on_gap: Callable[[float], None], keep: bool = False) -> None:
        super().__init__()
        self._on_gap = on_gap
        self._last: dict[int, float] = {}
        self._rest = b""
        self.first_s = self.last_s = float("nan")
        self.counted = self.chunks = 0
        self.usage: Usage | None = None
        self.timeline: dict[str, Any] | None = None
        self.error: str | None = None
        self.finished: set[int] = set()
        self.output: list[int] = []  # ids of the first sequence
        self.times: list[tuple[float, int, int]] | None = [] if keep else None  # of every chunk: when, of which sequence, how many tokens

    @property
    def tokens(self) -> int:
        """Of all sequences: as the server counts them, or else as they came."""
        told = self.usage.completion_tokens if self.usage is not None else None
        return self.counted if told is None else told

    @property
    def cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return (details.cached_tokens or 0) if details is not None else 0

    def body(self, part: bytes, now: float) -> None:
        if self.status != 200:
            self.content += part
            return
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
                self._event(line[5:], now)

    def _event(self, text: bytes, now: float) -> None:
        try:
            chunk = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.error = self.error or "an event is not a completion's"
            return
        for choice in chunk.choices:
            self._choice(choice, now)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.pdlab is not None and chunk.pdlab.timeline is not None:
            self.timeline = chunk.pdlab.timeline
        if bytes(chunk.error) not in (b"", b"null"):
            self.error = said(text)

    def _choice(self, choice: Choice, now: float) -> None:
        index, ids = choice.index, choice.token_ids
        tokens = len(ids) if ids is not None else int(bool(choice.text) or choice.finish_reason is None)
        if choice.finish_reason is not None:
            self.finished.add(index)
        if not tokens:
            return
        if ids is not None and index == 0:
            self.output += ids
        if index in self._last:
            self._on_gap(now - self._last[index])
        elif not self._last:
            self.first_s = now
        self._last[index] = self.last_s = now
        self.counted += tokens
        self.chunks += 1
        if self.times is not None:
            self.times.append((now, index, tokens))


def said(text: bytes) -> str:
    """The message of an error, short, whatever its shape."""
    try:
        body = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = text.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    words = " ".join(str(body).split())
    return words if len(words) <= 160 else words[:159] + "…"
