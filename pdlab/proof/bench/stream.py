"""The answer to a completion, as a stream of server-sent events: when tokens came, how many, and what the server says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from pdlab.real.net.sse import Events


class StreamChoice(msgspec.Struct):
    index: int | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class StreamUsage(msgspec.Struct):
    completion_tokens: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    prompt_tokens_details: Details | None = None


class Told(msgspec.Struct):
    timeline: dict[str, Any] | None = None


class StreamChunk(msgspec.Struct):
    choices: list[StreamChoice] | None = None
    usage: StreamUsage | None = None
    pdlab: Told | None = None
    error: msgspec.Raw = msgspec.Raw()
    object: str | None = None


FAILED = ("error", "abort")  # reasons to finish that are none
KEPT_BYTES = 1 << 16  # of an answer that is no stream, for the message
_decode = msgspec.json.Decoder(StreamChunk).decode


class TimedStream:
    """Give `take` its body, each part when it comes, and set its `status`. Times are on `clock`. `on_gap(seconds)` is called between chunks
    of one sequence; a chunk is counted once, however many tokens it has. A chunk without token ids and without text is no token: some
    servers send one before the prompt is computed. `keep`: remember when each came."""

    def __init__(self, on_gap: Callable[[float], None], keep: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.status = 0
        self.content = b""  # its first bytes, until events come
        self._on_gap, self._clock = on_gap, clock
        self._now = 0.0
        self._last: dict[int, float] = {}
        self._events = Events(self._event)
        self._first = StreamChoice()
        self._first_usage: StreamUsage | None = None
        self._characters = 0  # of the sequence that began
        self._blank_s: tuple[float, float] | None = None  # of the first and the last chunk that brought a sequence nothing
        self._first_s = self._last_s = float("nan")
        self._counted = 0
        self.chunks = 0
        self.events = 0
        self.usage: StreamUsage | None = None
        self.timeline: dict[str, Any] | None = None
        self.error: str | None = None
        self.finished: set[int] = set()
        self.output: list[int] = []  # ids of the first sequence
        self.times: list[tuple[float, int, int]] | None = [] if keep else None  # of every chunk: when, of which sequence, how many tokens

    @property
    def done(self) -> bool:
        """[DONE] has come."""
        return self._events.done

    @property
    def counted(self) -> int:
        """Tokens of all sequences, as they came."""
        return self._counted or self._unseen

    @property
    def tokens(self) -> int:
        """Of all sequences: as the server counts them, or else as they came."""
        told = self.usage.completion_tokens if self.usage is not None else None
        return told or self.counted  # some servers say 0 of an answer that they have sent

    @property
    def first_s(self) -> float:
        return self._blank_s[0] if self._unseen and self._blank_s is not None else self._first_s

    @property
    def last_s(self) -> float:
        return self._blank_s[1] if self._unseen and self._blank_s is not None else self._last_s

    @property
    def first_tokens(self) -> int:
        """That came with the first chunk: by their ids, or by a usage that came along. Else its share of its sequence's text is its share
        of the tokens, unless chunks are about as many as tokens."""
        first, told = self._first, self._first_usage
        if first.token_ids is not None:
            return len(first.token_ids)
        if told is not None and told.completion_tokens:
            return told.completion_tokens
        if self.tokens < 1.05 * self.chunks or not first.text:
            return 1
        return max(1, round(self.tokens / max(len(self._last), 1) * len(first.text) / self._characters))

    @property
    def cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return (details.cached_tokens or 0) if details is not None else 0

    @property
    def _unseen(self) -> int:
        """Tokens by the server's count, where none of them had a text: special ones alone."""
        return (self.usage.completion_tokens or 0) if self.usage is not None and not self._counted else 0

    def take(self, part: bytes) -> bool:
        """A part of the body has come. There may always be more."""
        self._now = self._clock()
        if not self.events and len(self.content) < KEPT_BYTES:
            self.content += part[:KEPT_BYTES]
        events = self._events
        events.feed(part)
        if events.unread or events.too_long:
            self.error = self.error or f"an event is not a completion's: {said(events.unread) or 'it has no end'}"
        return False

    def _event(self, text: bytes, name: bytes) -> bool:
        self.events += 1
        try:
            chunk = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        began, now = not self._last, self._now
        for choice in chunk.choices or ():
            self._choice(choice, now)
        if chunk.usage is not None:
            self.usage = chunk.usage
            if began and self._last:
                self._first_usage = chunk.usage
        if chunk.pdlab is not None and chunk.pdlab.timeline is not None:
            self.timeline = chunk.pdlab.timeline
        if bytes(chunk.error) not in (b"", b"null") or chunk.object == "error" or name == b"error":
            self.error = said(text)
        return True

    def _choice(self, choice: StreamChoice, now: float) -> None:
        index, ids = choice.index or 0, choice.token_ids
        tokens = len(ids) if ids is not None else int(bool(choice.text))
        if choice.finish_reason is not None:
            self.finished.add(index)
            if choice.finish_reason in FAILED:
                self.error = self.error or f"finish_reason {choice.finish_reason}"
        if not tokens:
            self._blank_s = (now if self._blank_s is None else self._blank_s[0], now)
            return
        if ids is not None and index == 0:
            self.output += ids
        if index in self._last:
            self._on_gap(now - self._last[index])
        elif not self._last:
            self._first_s, self._first = now, choice
        self._last[index] = self._last_s = now
        self._counted += tokens
        self.chunks += 1
        if index == (self._first.index or 0):
            self._characters += len(choice.text or "")
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
