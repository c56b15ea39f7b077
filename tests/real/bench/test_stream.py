from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from pdlab.real.bench.stream import Stream, said

TWO = (
    b'data: {"choices":[{"index":0,"text":"a","token_ids":[5],"finish_reason":null}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"text":"bc","token_ids":[6,7],"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":16}}}\n\n'
    b'data: {"choices":[],"pdlab":{"timeline":{"arrival_s":1.5}}}\n\ndata: [DONE]\n\n'
)


def fed(feed: Callable[[Stream], None], status: int = 200) -> tuple[Stream, list[float]]:
    gaps: list[float] = []

    async def run() -> Stream:
        stream = Stream(gaps.append, keep=True)
        stream.status = status
        feed(stream)
        return stream

    return asyncio.run(run()), gaps


def in_pieces(size: int) -> Callable[[Stream], None]:
    def feed(stream: Stream) -> None:
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
    def feed(stream: Stream) -> None:
        for now, index in ((1.0, 0), (1.5, 1), (2.0, 0), (3.0, 1)):
            stream.body(b'data: {"choices":[{"index":%d,"text":"x"}]}\n\n' % index, now)

    stream, gaps = fed(feed)
    assert gaps == [1.0, 1.5] and (stream.first_s, stream.last_s) == (1.0, 3.0)
    assert stream.times == [(1.0, 0, 1), (1.5, 1, 1), (2.0, 0, 1), (3.0, 1, 1)]


def test_without_ids_or_usage_a_chunk_is_a_token_and_an_empty_last_one_none() -> None:
    def feed(stream: Stream) -> None:
        stream.body(b'data: {"choices":[{"text":""}]}\n\ndata: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n', 1.0)

    stream, _ = fed(feed)
    assert stream.tokens == 1 and stream.finished == {0} and stream.cached_tokens == 0


def test_an_error_event_is_kept_and_nonsense_is_one() -> None:
    stream, _ = fed(lambda s: s.body(b'data: {"error":{"message":"engine died"}}\n\n', 1.0))
    assert stream.error == "engine died" and math.isnan(stream.first_s)
    assert fed(lambda s: s.body(b"data: {\n\n", 1.0))[0].error == "an event is not a completion's"


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
