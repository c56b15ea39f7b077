"""What streaming costs: `python -m tests.real.api.bench_stream [--memory]`.

Over sockets, the kernel's part is the most of it; with --memory the app is called without any, and only its own work is left."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from pdlab.real.models.tokenizer import Tokenizer
from tests.support.echo_engine import EchoEngine, byte_tokenizer


def app_of(package: str, per_step: int) -> Any:
    module = importlib.import_module(f"{package}.app")
    tokenizer = Tokenizer.load(byte_tokenizer(Path(tempfile.mkdtemp())))
    return module.create_app(module.Service(EchoEngine(per_step=per_step, context=100_000), tokenizer, "tiny"))


def body(path: str, tokens: int) -> bytes:
    asked: dict[str, Any] = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
    if "chat" in path:
        asked["messages"] = [{"role": "user", "content": "hello there"}]
    else:
        asked["prompt"] = "the quick brown fox "
    return json.dumps(asked).encode()


def serve(package: str, sock: socket.socket, per_step: int) -> None:
    config = uvicorn.Config(app_of(package, per_step), log_level="warning", access_log=False, lifespan="off")
    uvloop.run(uvicorn.Server(config).serve(sockets=[sock]))


async def over_socket(port: int, path: str, tokens: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    payload = body(path, tokens)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode()
        + payload
    )
    events, tail = 0, b""
    while part := await reader.read(1 << 18):
        events += part.count(b"data: ")
        tail = (tail + part)[-200:]
    writer.close()
    assert b"[DONE]" in tail, tail
    return events


async def in_memory(app: Any, path: str, tokens: int) -> int:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("x", 80),
        "client": ("x", 1),
        "root_path": "",
        "state": {},
    }
    asked = [{"type": "http.request", "body": body(path, tokens), "more_body": False}]
    events = 0

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        nonlocal events
        events += message.get("body", b"").count(b"data: ")

    await app(scope, receive, send)
    return events


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", default="pdlab.real.api")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--per-step", type=int, default=1)
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    tokens = given.clients * given.tokens

    async def measure_memory() -> tuple[float, float, int]:
        app = app_of(given.package, given.per_step)
        await in_memory(app, given.path, 10)
        started_s, cpu = time.perf_counter(), time.process_time()
        events = sum(await asyncio.gather(*(in_memory(app, given.path, given.tokens) for _ in range(given.clients))))
        return time.perf_counter() - started_s, time.process_time() - cpu, events

    async def measure_sockets(port: int, pid: int) -> tuple[float, float, int]:
        await over_socket(port, given.path, 10)
        started_s, cpu = time.perf_counter(), cpu_s(pid)
        events = sum(await asyncio.gather(*(over_socket(port, given.path, given.tokens) for _ in range(given.clients))))
        return time.perf_counter() - started_s, cpu_s(pid) - cpu, events

    if given.memory:
        wall_s, used_s, events = uvloop.run(measure_memory())
    else:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
            process = multiprocessing.Process(target=serve, args=(given.package, sock, given.per_step), daemon=True)
            process.start()
            assert process.pid is not None
            time.sleep(4)
            wall_s, used_s, events = uvloop.run(measure_sockets(sock.getsockname()[1], process.pid))
            process.terminate()
    print(
        f"{given.package} {given.path} {'memory' if given.memory else 'sockets'} {given.clients} clients: {tokens / wall_s:,.0f} tokens/s, "
        f"CPU {1e6 * used_s / tokens:.1f} us a token, {events / tokens:.2f} events a token"
    )


if __name__ == "__main__":
    main()
