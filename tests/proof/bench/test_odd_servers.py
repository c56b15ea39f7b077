"""The bench client at the wire: answers in forms that HTTP and other servers' streams allow, and those that only look like success."""

from __future__ import annotations

import asyncio
import contextlib
import gzip

import pytest

from pdlab.core.types import Stage
from pdlab.proof.bench.load import _judged
from pdlab.proof.bench.stream import TimedStream
from pdlab.real.net.http import Broken, HttpClient

TOKENS = b"".join(b'data: {"choices":[{"index":0,"text":"ab","finish_reason":%b}]}\n\n' % end for end in (b"null", b'"length"'))
EVENTS = TOKENS + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def sized(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answered(*parts: bytes, close: bool = False) -> TimedStream:
    """What a client makes of these bytes, twice on what it may take for one connection."""

    async def run() -> TimedStream:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    await reader.readexactly(2)
                    for part in parts:
                        writer.write(part)
                        await writer.drain()
                        await asyncio.sleep(0)
                    if close:
                        return
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, asyncio.timeout(60):
            with contextlib.closing(HttpClient(url)) as client:
                for _ in range(2):
                    stream = TimedStream(lambda gap: None)
                    stream.status = await client.stream(client.request(b"POST", b"/v1/completions", b"{}"), stream.take)
        return stream

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("parts", "close"),
    [
        ((sized(EVENTS),), False),
        ((HEAD + b"Connection: close\r\n\r\n" + EVENTS,), True),
        ((b"HTTP/1.0 200 OK\r\n\r\n", EVENTS[:40], EVENTS[40:]), True),
        ((b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + sized(EVENTS),), False),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n", sized(EVENTS)), False),
        ((b"HTTP/1.1 102 Processing\r\n\r\n", HEAD + b"\r\n" + EVENTS), True),
    ],
    ids=["length", "until close", "http 1.0", "early hints", "interim", "interim, until close"],
)
def test_an_answer_is_whole_in_every_form_of_http(parts, close):
    stream = answered(*parts, close=close)
    assert (stream.status, stream.tokens, stream.done) == (200, 2, True)
    assert _judged(stream, 1) == (Stage.DONE, None)


@pytest.mark.parametrize(
    "parts", [(sized(EVENTS)[:-20],), (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n",), (b"HTTP/1.1 102 Processing\r\n\r\n",)]
)
def test_an_answer_that_is_cut_is_lost(parts):
    with pytest.raises(Broken, match="the connection was lost"):
        answered(*parts, close=True)


def test_an_answer_until_close_that_is_cut_is_not_whole():
    stream = answered(HEAD + b"\r\n" + TOKENS[:80], close=True)
    assert _judged(stream, 1) == (Stage.FAILED, "the answer ended early")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"error":{"message":"no such model"}}', "no stream of events: no such model"),
        (b'{\n "error": {\n  "message": "no such model"\n }\n}', "no stream of events: no such model"),
        (b"<html>login</html>", "no stream of events: <html>login</html>"),
        (gzip.compress(EVENTS), "no stream of events: packed with gzip, which was not asked for"),
        (b"", "the answer ended early"),
        (TOKENS + b'event: error\ndata: {"message":"kaput"}\n\n', "kaput"),
        (TOKENS + b'data: {"object":"error","message":"gone","code":400}\n\ndata: [DONE]\n\n', "gone"),
        (TOKENS.replace(b'"length"', b'"error"') + b"data: [DONE]\n\n", "finish_reason error"),
        (TOKENS.replace(b'"length"', b'"abort"') + b"data: [DONE]\n\n", "finish_reason abort"),
        (TOKENS + b'data: {"choices":[],"usage":{"completion_tokens":-4}}\n\n', "an event is not a completion's: {'choices': [], 'usage'"),
        (TOKENS + b'data: {"choices":[],"usage":{"completion_tokens":99999999999999999999}}\n\n', "an event is not a completion's"),
        (TOKENS + b"data: {nonsense\n\n", "an event is not a completion's: {nonsense"),
    ],
)
def test_what_only_looks_like_success_has_its_reason(body, why):
    stage, reason = _judged(answered(sized(body)), 1)
    assert stage is Stage.FAILED
    assert (reason or "").startswith(why)


@pytest.mark.parametrize(
    "body",
    [
        EVENTS.replace(b'"index":0', b'"index":null'),
        TOKENS + b'data: {"choices":null,"usage":{"completion_tokens":2}}\n\n',
        TOKENS + b'data: {"choices":[],"usage":{"completion_tokens":0}}\n\n',
        b"event: message\n" + EVENTS,
    ],
    ids=["index null", "choices null", "usage of nothing", "named events"],
)
def test_what_other_servers_write_of_an_answer_is_read(body):
    stream = answered(sized(body))
    assert (stream.tokens, _judged(stream, 1)) == (2, (Stage.DONE, None))
