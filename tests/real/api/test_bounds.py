"""Everything that comes from a client has a bound, and is refused before memory is taken for it. docs/guides/security.md has the table."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from pdlab.real.api import app as apps
from pdlab.real.api import service as services
from pdlab.real.api.app import MOST_REQUEST_ID
from pdlab.real.api.http_server import bind, serve
from pdlab.real.api.protocol import MOST_HEAD_BYTES
from tests.support.api_world import JSON, ApiWorld, served
from tests.support.echo_engine import EchoEngine

HELLO = {"prompt": "hello", "max_tokens": 2}


@contextmanager
def listening(app: Starlette) -> Iterator[tuple[str, int]]:
    """Served as `pdlab serve` does it, by its own protocol, in a thread."""
    ended = threading.Event()

    async def run() -> None:
        task = asyncio.create_task(serve_until())
        while not ended.is_set():
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def serve_until() -> None:
        asyncio.get_running_loop().add_signal_handler = lambda *_: None  # type: ignore[method-assign]
        await serve(app, sock)

    sock = bind("127.0.0.1", 0)
    where = sock.getsockname()
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield where
    finally:
        ended.set()
        thread.join(30)
        sock.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def at(folder: Path) -> Iterator[tuple[ApiWorld, tuple[str, int]]]:
    with served(folder) as world, listening(world.app) as where:
        yield world, where


def said(where: tuple[str, int], *parts: bytes) -> bytes:
    """What comes back, until the other end hangs up."""
    with socket.create_connection(where, timeout=30) as sock:
        got = b""
        try:
            for part in parts:
                sock.sendall(part)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(1 << 16):
                got += more
        except ConnectionError:
            pass
        return got


def heads() -> Iterator[tuple[str, list[bytes]]]:
    line = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    most = MOST_HEAD_BYTES
    yield "one header", [line + b"X-A: " + b"a" * most + b"\r\n\r\n"]
    yield "one that never ends", [line + b"X-A: ", *[b"a" * 4096] * (most // 4096 + 2)]
    yield "many", [line, *[b"X-%d: b\r\n" % n for n in range(most // 8)], b"\r\n"]
    yield "a long path", [b"GET /" + b"a" * most + b" HTTP/1.1\r\nHost: x\r\n\r\n"]
    yield "a long path and nothing else", [b"GET /" + b"a" * most + b" HTTP/1.1\r\n\r\n"]
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    yield "trailers", [chunked, *[b"X-%d: b\r\n" % n for n in range(most // 8)], b"\r\n"]


@pytest.mark.parametrize(("what", "parts"), list(heads()), ids=[what for what, _ in heads()])
def test_a_head_that_is_too_long_is_answered_431_and_the_next_client_is_served(
    at: tuple[ApiWorld, tuple[str, int]], what: str, parts: list[bytes]
) -> None:
    answer = said(at[1], *parts)
    assert answer.startswith(b"HTTP/1.1 431 ") or (what == "trailers" and b" 431 " in answer), answer[:80]
    error = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error" and "64 KiB" in error["message"]
    fits = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-A: " + b"a" * (MOST_HEAD_BYTES - 200) + b"\r\n\r\n"
    assert said(at[1], fits).startswith(b"HTTP/1.1 200 ")


def test_heads_of_many_requests_on_one_connection_are_counted_each_for_itself(at: tuple[ApiWorld, tuple[str, int]]) -> None:
    host, port = at[1]
    with httpx.Client(base_url=f"http://{host}:{port}", headers={"X-A": "a" * (MOST_HEAD_BYTES // 3)}) as http:
        for _ in range(8):
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=HELLO | {"prompt": "x" * 400}).status_code == 200


def test_a_request_id_that_is_too_long_is_refused_and_not_repeated(at: tuple[ApiWorld, tuple[str, int]]) -> None:
    host, port = at[1]
    for length, status in ((MOST_REQUEST_ID, 200), (MOST_REQUEST_ID + 1, 431), (60_000, 431)):
        named = {"X-Request-Id": "i" * length}
        answer = httpx.post(f"http://{host}:{port}/v1/completions", json={**HELLO, "stream": True}, headers=named)
        assert answer.status_code == status
        assert (answer.headers["x-request-id"] == "i" * length) is (status == 200)
        if status == 431:
            assert answer.json()["error"]["code"] == "request_id_too_long" and len(answer.content) < 1000
        for path in ("/ready", "/version", "/nowhere"):
            assert len(httpx.get(f"http://{host}:{port}{path}", headers=named).headers["x-request-id"]) <= MOST_REQUEST_ID


def asks(text: str) -> list[tuple[str, dict[str, Any], str]]:
    return [
        ("/v1/completions", {"prompt": text, "max_tokens": 1}, "prompt"),
        ("/v1/completions", {"prompt": ["a", text], "max_tokens": 1}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/tokenize", {"prompt": text}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ]


def test_text_that_cannot_fit_is_refused_by_its_length_before_it_is_tokenized(at: tuple[ApiWorld, tuple[str, int]]) -> None:
    world, (host, port) = at
    tokenizer = world.service.tokenizer
    assert tokenizer.longest_token_bytes == len("<start>")
    too_long = "x" * (world.service.most_text_bytes + 1)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(tokenizer, "encode", lambda *_: pytest.fail("tokenized"))
        for path, body, param in asks(too_long):
            answer = httpx.post(f"http://{host}:{port}{path}", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded"), path
            assert error["type"] == "invalid_request_error" and "too long for the 512 tokens" in error["message"]
    for path, body, _ in asks("x" * 300):
        assert httpx.post(f"http://{host}:{port}{path}", json=body).status_code == 200
    ids = httpx.post(f"http://{host}:{port}/v1/completions", json={"prompt": [1] * 100_000, "max_tokens": 1})
    assert (ids.status_code, ids.json()["error"]["code"]) == (400, "context_length_exceeded")
    back = httpx.post(f"http://{host}:{port}/detokenize", json={"tokens": [1] * 513})
    assert (back.status_code, back.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_is_bounded_by_the_context(at: tuple[ApiWorld, tuple[str, int]]) -> None:
    world, (host, port) = at
    most = world.service.most_body_bytes
    assert most == services.BODY_BYTES + services.ESCAPED * 7 * 512 < 2 << 20
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = httpx.post(f"http://{host}:{port}{path}", content=b" " * (most + 1), headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_long")
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in "x" * 300)
    body = f'{{"prompt": "{escaped}", "max_tokens": 1}}'
    assert httpx.post(f"http://{host}:{port}/v1/completions", content=body, headers=JSON).status_code == 200
    assert world.service.reading_bytes == 0


def test_bodies_that_are_read_at_once_are_bounded_together(at: tuple[ApiWorld, tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    world, where = at
    monkeypatch.setattr(apps, "MOST_READING_BYTES", 1 << 19)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (1 << 19)
    with socket.create_connection(where, timeout=30) as slow:
        slow.sendall(head + b" " * (3 << 17))
        until_s = time.monotonic() + 30
        while world.service.reading_bytes < 3 << 17 and time.monotonic() < until_s:
            time.sleep(0.01)
        answer = httpx.post(f"http://{where[0]}:{where[1]}/v1/completions", content=b" " * (1 << 18), headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
    while world.service.reading_bytes and time.monotonic() < until_s:
        time.sleep(0.01)
    assert world.service.reading_bytes == 0


def test_text_below_the_bound_by_length_is_counted_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "PART", 20_000)
    with served(folder, engine=EchoEngine(context=10_000)) as world:
        counted: list[int] = []
        encode = world.service.encode

        async def count(text: str, special: bool = True) -> list[int]:
            counted.append(len(text))
            return await encode(text, special)

        monkeypatch.setattr(world.service, "encode", count)
        for tokens in (65_000, 69_999):  # below 7 bytes for each of 10,000 tokens that fit
            monkeypatch.setattr(services, "DENSE", 6)
            answer = httpx.post(f"{world.url}/v1/completions", json={"prompt": "x" * tokens, "max_tokens": 1}, timeout=60)
            assert answer.status_code == 400 and "more than 20000 tokens" in answer.json()["error"]["message"]
        assert counted == [20_000, 20_000]
        letters = httpx.post(f"{world.url}/v1/completions", json={"prompt": "é" * 36_000, "max_tokens": 1}, timeout=60)
        assert letters.status_code == 400 and "has 72000 bytes" in letters.json()["error"]["message"]
        assert counted == [20_000, 20_000], "too many bytes, though not too many characters"
        names = "<start>" * 9000  # 63,000 bytes that do fit
        assert httpx.post(f"{world.url}/v1/completions", json={"prompt": names, "max_tokens": 1}, timeout=60).status_code == 200


def test_few_long_texts_are_tokenized_at_once(folder: Path) -> None:
    """A byte of text can take 500 of memory meanwhile."""
    lock, running, most = threading.Lock(), 0, 0

    class Backend:
        def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
            return [SimpleNamespace(ids=[len(text)]) for text in texts]

    async def main() -> None:
        service = services.Service(EchoEngine(), SimpleNamespace(backend=Backend()), "tiny")  # type: ignore[arg-type]
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
        long = "x" * (services.LONG_TEXT + 1)
        assert await asyncio.gather(*(service.encode(long) for _ in range(32))) == [[len(long)]] * 32

    asyncio.run(main())
    assert most == services.LONG_TEXTS


MEASURE = """
import asyncio, resource, sys
from pdlab.real.api.service import Service
from pdlab.real.api.errors import ApiError
from pdlab.real.models.gguf_file import default_model
from pdlab.real.models.tokenizer import Tokenizer
from tests.support.echo_engine import EchoEngine
service = Service(EchoEngine(context=8192), Tokenizer.load(default_model()), "m")
def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = rss()
async def one(text):
    try:
        await service.tokens_of(text)
    except ApiError as error:
        return error.status
async def main():
    hostile = [chr(0x4e00 + n % 20000) * 1 for n in range(220_000)]
    texts = ["a" * (30 << 20), "7" * 660_000, "".join(hostile), " x" * 330_000]
    print(await asyncio.gather(*(one(text) for text in texts * 4)), rss() - before)
asyncio.run(main())
"""


def test_memory_stays_bounded_whatever_text_comes() -> None:
    """30 MB of letters took 4.5 GB; the worst that is tokenized now, sixteen at a time."""
    ended = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120, check=False)
    if "no such folder" in ended.stderr or "smollm2" in ended.stderr.lower():
        pytest.skip("the embedded model is not here")
    answers, _, grown_mib = ended.stdout.rpartition("]")
    assert answers.count("400") == 16, ended
    assert int(grown_mib) < 1200, f"{grown_mib} MiB"
    assert resource.getpagesize()
