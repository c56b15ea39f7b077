"""The answer to a completion, as a stream of server-sent events: when tokens came, how many, and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from pdlab.proof.bench.http import BenchExchange


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
KEPT_BYTES = 4096  # of an answer that is no stream, for the message
BOM = b"\xef\xbb\xbf"
_decode = msgspec.json.Decoder(StreamChunk).decode


class TimedStream(BenchExchange):
    """Times are on the client's clock. `on_gap(seconds)` is called between chunks of one sequence; a chunk is counted once, however many
    tokens it has. A chunk without token ids and without text is no token: some servers send one before the prompt is computed. `keep`:
    remember when each came. Lines are read as the standard of server-sent events has them; an event need not end with an empty line."""

    def __init__(self, on_gap: Callable[[float], None], keep: bool = False) -> None:
        super().__init__()
        self._on_gap = on_gap
        self._last: dict[int, float] = {}
        self._rest = self._pending = b""
        self._event_of_error = False
        self._cr = False  # what has come so far ends with a carriage return, whose line feed may follow
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
        self.done = False  # [DONE] has come
        self.output: list[int] = []  # ids of the first sequence
        self.times: list[tuple[float, int, int]] | None = [] if keep else None  # of every chunk: when, of which sequence, how many tokens

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

    def body(self, part: bytes, now: float) -> None:
        if self.status != 200:
            self.content += part
            return
        if not self.events and len(self.content) < KEPT_BYTES:
            self.content += part[:KEPT_BYTES]
        if self._cr and part.startswith(b"\n"):
            part, self._cr = part[1:], False
        if b"\r" in part:
            self._cr = part.endswith(b"\r")
            part = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif part:
            self._cr = False
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._line(line[5:].strip(), now)
            elif not line:
                if self._pending:
                    self.error = self.error or f"an event is not a completion's: {said(self._pending)}"
                self._pending, self._event_of_error = b"", False
            elif line.startswith(b"event:"):
                self._event_of_error = line[6:].strip() == b"error"
            elif line.startswith(BOM + b"data:"):
                self._line(line[8:].strip(), now)

    def _line(self, text: bytes, now: float) -> None:
        """A line of an event's data. Together with those before it, it is the event as soon as it can be read."""
        if not text:
            return
        self.events += 1
        if text == b"[DONE]":
            self.done = True
            return
        text = self._pending + b"\n" + text if self._pending else text
        try:
            chunk = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._pending = text
            return
        self._pending = b""
        self._event(chunk, text, now)

    def _event(self, chunk: StreamChunk, text: bytes, now: float) -> None:
        began = not self._last
        for choice in chunk.choices or ():
            self._choice(choice, now)
        if chunk.usage is not None:
            self.usage = chunk.usage
            if began and self._last:
                self._first_usage = chunk.usage
        if chunk.pdlab is not None and chunk.pdlab.timeline is not None:
            self.timeline = chunk.pdlab.timeline
        if bytes(chunk.error) not in (b"", b"null") or chunk.object == "error" or self._event_of_error:
            self.error = said(text)

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
