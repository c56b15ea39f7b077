from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest

from pdlab.proof.bench.stream import TimedStream, said

TWO = (
    b'data: {"choices":[{"index":0,"text":"a","token_ids":[5],"finish_reason":null}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"text":"bc","token_ids":[6,7],"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":16}}}\n\n'
    b'data: {"choices":[],"pdlab":{"timeline":{"arrival_s":1.5}}}\n\ndata: [DONE]\n\n'
)


class Played(TimedStream):
    """On a clock that stands at when its parts came."""

    def __init__(self, on_gap: Callable[[float], None]) -> None:
        super().__init__(on_gap, keep=True, clock=lambda: self.now_s)
        self.now_s = 0.0

    def body(self, part: bytes, now_s: float) -> None:
        self.now_s = now_s
        assert not self.take(part)


def fed(feed: Callable[[Played], None]) -> tuple[Played, list[float]]:
    gaps: list[float] = []
    stream = Played(gaps.append)
    feed(stream)
    return stream, gaps


def in_pieces(size: int) -> Callable[[Played], None]:
    def feed(stream: Played) -> None:
        for at in range(0, len(TWO), size):
            stream.body(TWO[at : at + size], float(at // 90))

    return feed


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_events_are_found_however_the_bytes_are_cut(size: int) -> None:
    stream, gaps = fed(in_pieces(size))
    assert stream.output == [5, 6, 7] and stream.tokens == stream.counted == 3 and stream.chunks == 2
    assert stream.cached_tokens == 16 and stream.timeline == {"arrival_s": 1.5} and stream.finished == {0}
    assert len(gaps) == 1 and stream.error is None


def test_each_sequence_has_gaps_of_its_own() -> None:
    def feed(stream: Played) -> None:
        for now, index in ((1.0, 0), (1.5, 1), (2.0, 0), (3.0, 1)):
            stream.body(b'data: {"choices":[{"index":%d,"text":"x"}]}\n\n' % index, now)

    stream, gaps = fed(feed)
    assert gaps == [1.0, 1.5] and (stream.first_s, stream.last_s) == (1.0, 3.0)
    assert stream.times == [(1.0, 0, 1), (1.5, 1, 1), (2.0, 0, 1), (3.0, 1, 1)]


def test_without_ids_or_usage_a_chunk_with_text_is_a_token() -> None:
    def feed(stream: Played) -> None:
        stream.body(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n', 1.0)

    stream, _ = fed(feed)
    assert stream.tokens == 1 and stream.finished == {0} and stream.cached_tokens == 0


def text(words: str | None, finish: str | None = None) -> bytes:
    return msgspec.json.encode({"choices": [{"text": words, "finish_reason": finish}]})


ALIKE = [text("a"), text("b"), text("c", "stop"), b"[DONE]"]


@pytest.mark.parametrize(
    "form",
    [
        b"data: %b\n\n",
        b"data:%b\n\n",
        b"data:  %b \n\n",
        b"data:%b\r\n\r\n",
        b"data: %b\r\r",
        b": keep-alive\n\ndata:%b\n\n",
        b"event: completion\nid: 7\nretry: 10\ndata: %b\n\n",
        b"data\n\ndata:\n\ndata:%b\n\n",
        b"data: %b\n",  # no empty line between: not as the standard has it, and common
    ],
)
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_events_are_read_in_every_form_that_the_standard_allows(form: bytes, size: int) -> None:
    whole = b"\xef\xbb\xbf" + b"".join(form % one for one in ALIKE)

    def feed(stream: Played) -> None:
        for at in range(0, len(whole), size):
            stream.body(whole[at : at + size], float(at))

    stream, gaps = fed(feed)
    assert (stream.tokens, stream.finished, stream.error, stream.done) == (3, {0}, None, True) and len(gaps) == 2


def test_an_event_may_be_spread_over_several_lines_of_data() -> None:
    lines = b'data: {"choices":\r\ndata:  [{"text": "a",\r\n: in between\r\ndata: "finish_reason": "stop"}]}\r\n\r\n'
    stream, _ = fed(lambda s: s.body(lines, 2.0))
    assert (stream.tokens, stream.finished, stream.error, stream.first_s) == (1, {0}, None, 2.0)


@pytest.mark.parametrize("blank", [text(""), text(None), b'{"choices":[{"index":0,"text":"","token_ids":[]}]}', b'{"choices":[]}'])
def test_a_chunk_without_text_or_tokens_is_no_token_wherever_it_comes(blank: bytes) -> None:
    def feed(stream: Played) -> None:
        for now, event in enumerate((blank, blank, text("a"), blank, text("b"), text("", "length"))):
            stream.body(b"data: %b\n\n" % event, float(now))

    stream, gaps = fed(feed)
    assert (stream.first_s, stream.last_s, stream.tokens, gaps) == (2.0, 4.0, 2, [2.0])


def test_tokens_that_have_no_text_at_all_are_counted_by_usage_and_timed_by_their_chunks() -> None:
    def feed(stream: Played) -> None:
        for now in (1.0, 2.0, 3.0):
            stream.body(b"data: %b\n\n" % text("", "length" if now == 3.0 else None), now)
        stream.body(b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n', 3.0)

    stream, _ = fed(feed)
    assert (stream.tokens, stream.counted, stream.first_s, stream.last_s) == (3, 3, 1.0, 3.0)


@pytest.mark.parametrize(
    ("chunks", "first"),
    [
        ([b'{"choices":[{"text":"abcd","token_ids":[1,2,3,4]}]}', text("efgh"), text("ij", "length")], 4),
        ([text("abcd"), text("efgh"), text("ij", "length")], 4),  # by the length of texts
        ([text("abcdefghij"), text("", "length")], 10),
        ([b'{"choices":[{"text":"abcd"}],"usage":{"completion_tokens":3}}', text("efghij", "length")], 3),
        ([text("x")] * 9 + [text("yyyyyyy", "length")], 1),  # a token a chunk
    ],
)
def test_how_many_tokens_came_with_the_first_chunk_is_known_or_estimated(chunks: list[bytes], first: int) -> None:
    def feed(stream: Played) -> None:
        for now, chunk in enumerate([*chunks, b'{"choices":[],"usage":{"completion_tokens":10}}']):
            stream.body(b"data: %b\n\n" % chunk, float(now))

    stream, _ = fed(feed)
    assert (stream.tokens, stream.first_tokens) == (10, first)


def test_an_error_event_is_kept_and_nonsense_is_one() -> None:
    stream, _ = fed(lambda s: s.body(b'data: {"error":{"message":"engine died"}}\n\n', 1.0))
    assert stream.error == "engine died" and math.isnan(stream.first_s)
    assert fed(lambda s: s.body(b"data: {\n\n", 1.0))[0].error.startswith("an event is not a completion's")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"error":{"message":"no\\nroom"}}', "no room"),
        (b'{"detail":"x"}', "x"),
        (b"oops", "oops"),
        (b'"' + b"a" * 300 + b'"', "a" * 159 + "…"),
    ],
)
def test_the_message_of_a_refusal_is_short_and_on_one_line(text: bytes, words: str) -> None:
    assert said(text) == words


def test_comments_are_no_tokens() -> None:
    def feed(stream: Played) -> None:
        for at, line in enumerate([b": waiting\n\n", *TWO.splitlines(keepends=True), b": data: {}\n\n"]):
            stream.body(line, float(at))

    stream, _ = fed(feed)
    assert (stream.counted, stream.error, stream.output) == (3, None, [5, 6, 7])
    assert stream.first_s == 1.0
