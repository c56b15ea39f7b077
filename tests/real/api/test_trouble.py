"""Overload, clients that hang up, drains, an engine that dies, signals: afterwards nothing is left."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pdlab.core.types import UsageError
from pdlab.real.api.http_server import bind
from tests.support.api_world import ApiWorld, served
from tests.support.echo_engine import EchoEngine
from tests.support.waiting import until


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "over and over ", "max_tokens": 400, **fields}


async def raw_request(url: str, fields: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


def hang_up(world: ApiWorld, fields: dict[str, Any], when: Callable[[], bool]) -> None:
    """Ask, and do not wait for the answer."""

    async def play() -> None:
        _, writer = await raw_request(world.url, fields)
        await asyncio.to_thread(until, when)
        writer.close()
        await writer.wait_closed()

    asyncio.run(play())


def first_of(answer: httpx.Response) -> Generator[str, None, None]:
    """The lines after the first. Letting go of them hangs up."""
    lines = answer.iter_lines()
    assert isinstance(lines, Generator)
    next(lines)
    return lines


@contextmanager
def slow(folder: Path, **options: Any) -> Iterator[ApiWorld]:
    with served(folder, engine=EchoEngine(step_s=0.005), **options) as world:
        yield world


def test_a_stream_whose_reader_hangs_up_is_cancelled(folder: Path) -> None:
    with slow(folder) as world:
        world.engine.holds_at = 3
        with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="ab", max_tokens=400, n=3, stream=True)
            next(iter(stream))
            assert len(world.engine.live) == 3
            stream.close()
        until(world.at_rest)
        assert world.engine.cancelled == [(1, -1)]
        assert world.service.metrics.finished["abort"] == 1


def test_a_whole_answer_nobody_waits_for_is_cancelled(folder: Path) -> None:
    with slow(folder) as world:
        world.engine.holds_at = 3
        hang_up(world, body(prompt=["ab", "cd"]), lambda: len(world.engine.live) == 2)
        until(world.at_rest)
        assert sorted(world.engine.cancelled) == [(1, -1), (2, -1)]


def test_hanging_up_while_waiting_in_the_queue(folder: Path) -> None:
    with slow(folder) as world:
        world.engine.paused = True
        for stream in (False, True):
            hang_up(world, body(stream=stream), lambda: len(world.engine.live) == 1)
            until(world.at_rest)
        assert world.engine.cancelled == [(1, -1), (2, -1)]


def test_hanging_up_in_the_middle_of_the_body(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(folder) as world:
        host, port = world.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"prompt"'
            )
        time.sleep(0.1)
        assert world.at_rest()
        assert not world.engine.submitted
        assert httpx.post(f"{world.url}/v1/completions", json=body(max_tokens=1)).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"], "no traceback in the server's log"


def test_a_reader_that_stops_reading_holds_nobody_up(folder: Path) -> None:
    with served(folder, engine=EchoEngine(context=60_000, per_step=4)) as world:

        async def play() -> int:
            _, writer = await raw_request(world.url, body(stream=True, max_tokens=50_000))
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{world.url}/v1/completions", json=body())
            await asyncio.sleep(0.3)
            writer.transport.abort()
            return answer.status_code

        assert asyncio.run(play()) == 200
        until(world.at_rest)


def test_five_hundred_clients_half_of_which_hang_up(folder: Path) -> None:
    async def one(url: str, i: int) -> str:
        stream = i % 4 < 2
        reader, writer = await raw_request(url, body(prompt=f"client {i} " * (1 + i % 9), stream=stream, n=1 + i % 2, max_tokens=60))
        try:
            if i % 2:
                return (await reader.read()).decode()
            if i % 3:
                await reader.readline()
            else:
                await asyncio.sleep(0.001 * i)
            return ""
        finally:
            writer.close()

    async def everybody(url: str) -> list[str]:
        return await asyncio.gather(*(one(url, i) for i in range(500)))

    with served(folder, engine=EchoEngine(step_s=0.002, seqs=128)) as world:
        answers = asyncio.run(everybody(world.url))
        for i, answer in enumerate(answers):
            if i % 2:
                assert answer.startswith("HTTP/1.1 200"), answer[:300]
                assert "[DONE]" in answer if i % 4 < 2 else '"usage"' in answer
        until(world.at_rest)
        finished = world.service.metrics.finished
        assert finished["length"] >= 250
        assert sum(finished.values()) == len(world.engine.submitted)
        assert finished["error"] == finished["stop"] == 0


def test_beyond_the_bound_come_again_later(folder: Path) -> None:
    async def flood(world: ApiWorld, stream: bool) -> list[httpx.Response]:
        asked = body(max_tokens=60, stream=stream)
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=60)) as client:
            asking = asyncio.gather(*(client.post(f"{world.url}/v1/completions", json=asked) for _ in range(60)))
            await asyncio.to_thread(until, lambda: world.service.metrics.refused["429"] == 56)
            world.engine.paused = False
            return await asking

    for stream in (False, True):
        with slow(folder, max_requests=4) as world:
            world.engine.paused = True
            answers = asyncio.run(flood(world, stream))
            told = [a for a in answers if a.status_code == 429]
            assert {a.status_code for a in answers} == {200, 429}
            assert all(int(a.headers["retry-after"]) >= 1 for a in told)
            assert told[0].json()["error"]["code"] == "overloaded"
            assert told[0].json()["error"]["type"] == "rate_limit_error"
            assert world.service.metrics.refused["429"] == len(told)
            assert httpx.post(f"{world.url}/v1/completions", json=body(max_tokens=1)).status_code == 200


def test_the_bound_holds_at_every_moment(folder: Path) -> None:
    """Requests that come in the same turn of the loop do not all see the last free place."""
    most = 0

    class Counted(EchoEngine):
        def submit(self, *args: Any) -> Any:
            nonlocal most
            found = super().submit(*args)
            most = max(most, len(self.live))
            return found

    async def flood(url: str) -> None:
        pairs = await asyncio.gather(*(raw_request(url, body(max_tokens=100, stream=i % 2 == 0)) for i in range(100)))
        await asyncio.gather(*(reader.read() for reader, _ in pairs))
        for _, writer in pairs:
            writer.close()

    with served(folder, engine=Counted(step_s=0.02), max_requests=5) as world:
        asyncio.run(flood(world.url))
        until(world.at_rest)
        assert most == 5


def test_each_prompt_of_a_list_takes_a_place(folder: Path) -> None:
    with slow(folder, max_requests=4) as world:
        assert httpx.post(f"{world.url}/v1/completions", json=body(prompt=["a"] * 4, max_tokens=2)).status_code == 200
        answer = httpx.post(f"{world.url}/v1/completions", json=body(prompt=["a"] * 5, max_tokens=2))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_a_full_server_is_not_ready(folder: Path) -> None:
    with slow(folder, max_requests=1) as world:
        world.engine.holds_at = 3
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True)) as answer:
            lines = first_of(answer)
            ready = httpx.get(f"{world.url}/ready")
            assert ready.status_code == 503
            assert ready.json() == {"ready": False, "reasons": ["overloaded: 1 requests in flight, at most 1"]}
            assert httpx.get(f"{world.url}/health").status_code == 200
            lines.close()


def test_draining_lets_old_requests_end_and_takes_no_new_ones(folder: Path) -> None:
    with slow(folder) as world:
        world.engine.holds_at = 3
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True, max_tokens=100)) as answer:
            lines = answer.iter_lines()
            next(lines)
            world.service.drain()
            late = httpx.post(f"{world.url}/v1/completions", json=body())
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert late.headers["connection"] == "close"
            assert int(late.headers["retry-after"]) >= 1
            assert httpx.get(f"{world.url}/ready").json()["reasons"] == ["draining"]
            assert httpx.get(f"{world.url}/health").status_code == 200
            world.engine.holds_at = 0
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]


def test_a_dead_engine_is_told_to_everybody(folder: Path) -> None:
    with slow(folder) as world:
        world.engine.holds_at = 3
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            world.call(lambda: world.engine.die("the engine process has ended with status -9"))
            rest = [line for line in lines if line]
        assert "the engine process has ended with status -9" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert httpx.get(f"{world.url}/health").json()["error"]["message"] == "the engine process has ended with status -9"
        assert httpx.get(f"{world.url}/ready").json()["reasons"] == ["engine down: the engine process has ended with status -9"]
        late = httpx.post(f"{world.url}/v1/completions", json=body())
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_down")
        assert world.service.metrics.finished["error"] == 1
        assert world.service.metrics.finished["abort"] == 0
        until(world.at_rest)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_before_the_first_token_is_a_503(folder: Path, stream: bool) -> None:
    with slow(folder) as world:
        world.engine.paused = True

        async def play() -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as client:
                asked = asyncio.create_task(client.post(f"{world.url}/v1/completions", json=body(stream=stream)))
                while not world.engine.live:
                    await asyncio.sleep(0.01)
                world.call(lambda: world.engine.die("gone"))
                return await asked

        answer = asyncio.run(play())
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "gone")
        assert answer.headers["content-type"] == "application/json"


# ------------------------------------------------------------ a process of its own, with signals


@contextmanager
def process(folder: Path, *, drain_s: float = 300.0, waits: bool = False) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its engine stands still until SIGUSR1; with `waits` it loads only then."""
    command = [sys.executable, "-m", "tests.support.served_echo", str(folder), "0", str(drain_s), str(int(waits))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as found:
        try:
            assert found.stdout is not None
            port = found.stdout.readline().split()[1]
            if not waits:
                assert found.stdout.readline() == "ready\n", found.communicate(timeout=60)[1]
            yield f"http://127.0.0.1:{port}", found
        finally:
            found.kill()


def test_sigterm_finishes_what_runs_then_exits_0(folder: Path) -> None:
    with process(folder) as (url, server), httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=80)) as answer:
        lines = first_of(answer)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        server.send_signal(signal.SIGUSR1)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        said, complained = server.communicate(timeout=60)
        assert (server.returncode, said, complained) == (0, "left 0\n", "")


def test_what_does_not_end_in_time_is_cut_off(folder: Path) -> None:
    with (
        process(folder, drain_s=0.2) as (url, server),
        httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=490)) as answer,
    ):
        lines = first_of(answer)
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=60)
        assert (server.returncode, said) == (0, "left 1\n")
        lines.close()


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    with process(folder) as (url, server), httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=490)) as answer:
        lines = first_of(answer)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        server.send_signal(signal.SIGTERM)
        server.wait(60)  # of the 300 that it would have waited
        lines.close()


def test_while_loading_it_says_so(folder: Path) -> None:
    with process(folder, waits=True) as (url, server):
        until(lambda: httpx.get(f"{url}/ready").json() == {"ready": False, "reasons": ["loading"]})
        early = httpx.post(f"{url}/v1/completions", json=body(max_tokens=1))
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/version").status_code == 200
        server.send_signal(signal.SIGUSR1)
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert httpx.post(f"{url}/v1/completions", json=body(max_tokens=1)).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_port_in_use_is_a_clear_mistake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^port {port} on 127\.0\.0\.1 is in use: choose another with --port$"):
            bind("127.0.0.1", port)
    for host, bad_port in (("256.1.1.1", 0), ("127.0.0.1", 70_000), ("a" * 70, 0)):
        with pytest.raises(UsageError, match=r"^cannot listen on"):
            bind(host, bad_port)


def test_a_stream_whose_prompt_takes_long_has_its_head_at_once_and_comments(folder: Path) -> None:
    with served(folder, comment_s=0.2) as world:
        world.engine.paused = True
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True, max_tokens=3), timeout=30) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            for _ in range(3):
                assert next(lines).startswith(":")
                assert next(lines) == ""
            world.engine.paused = False
            rest = [line for line in lines if line]
        assert [line.startswith("data: ") for line in rest].count(True) == 4  # three tokens, and the end
        assert rest[-1] == "data: [DONE]"


def test_the_head_does_not_wait_for_the_first_comment(folder: Path) -> None:
    with served(folder, comment_s=3600.0) as world:
        world.engine.paused = True
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True), timeout=30) as answer:
            assert answer.status_code == 200
        until(world.at_rest)


@pytest.mark.parametrize("chat", [False, True])
def test_comments_are_nothing_to_the_official_client(folder: Path, chat: bool) -> None:
    with served(folder, comment_s=0.1) as world, openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        world.engine.paused = True
        threading.Timer(0.5, lambda: world.call(lambda: setattr(world.engine, "paused", False))).start()
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "stream": True}
        if chat:
            chunks = list(client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **asked))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == "user\n"
            assert chunks[0].choices[0].delta.role == "assistant"
        else:
            assert "".join(c.choices[0].text for c in client.completions.create(prompt="ab", **asked)) == "ababab"


def test_a_stream_that_falls_silent_later_says_so(folder: Path) -> None:
    with served(folder, comment_s=0.2) as world:
        world.engine.holds_at = 2
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True, max_tokens=4), timeout=30) as answer:
            found = []
            for line in answer.iter_lines():
                found += [line] if line else []
                if line.startswith(":"):
                    world.engine.holds_at = 0
        assert [line[:1] for line in found].count(":") >= 1
        assert found[0].startswith("data: ") and found[-1] == "data: [DONE]"


def test_a_stream_refused_at_once_has_the_refusals_status(folder: Path) -> None:
    with served(folder) as world:
        world.call(lambda: setattr(world.engine, "down", "it is down"))
        until(lambda: world.engine.down is not None)
        assert httpx.post(f"{world.url}/v1/completions", json=body(stream=True)).status_code == 503


def test_a_stream_that_fails_late_says_so_within(folder: Path) -> None:
    with served(folder, comment_s=0.1) as world:
        world.engine.paused = True
        with httpx.stream("POST", f"{world.url}/v1/completions", json=body(stream=True), timeout=30) as answer:
            lines = [next(lines_of := answer.iter_lines())]
            world.call(lambda: world.engine.die("it has died"))
            lines += [line for line in lines_of if line.startswith("data: ")]
        assert lines[0].startswith(":")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "it has died"
        assert lines[-1] == "data: [DONE]"
        until(world.at_rest)
