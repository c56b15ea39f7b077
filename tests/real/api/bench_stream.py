"""How many tokens a second one core streams: `python -m tests.real.api.bench_stream [--package pdlab.real.openai]`."""

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


def serve(package, sock, per_step, step_s, cpu):
    import uvicorn

    from pdlab.real.engine.tokenizer import Tokenizer
    from tests.real.api.stand_in import EchoEngine, byte_tokenizer

    app_module = importlib.import_module(package + ".app")

    async def main():
        folder = byte_tokenizer(Path(tempfile.mkdtemp()))
        engine = EchoEngine(per_step=per_step, step_s=step_s, context=100000)
        service = (app_module.Service)(engine, Tokenizer.load(folder), "tiny")
        app = app_module.create_app(service)
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
        task = asyncio.create_task(uvicorn.Server(config).serve(sockets=[sock]))
        # cost of CPU time, published by the metrics of the process
        await task

    asyncio.run(main()) if os.environ.get("NO_UVLOOP") else __import__("uvloop").run(main())


async def client(port, tokens, path, extra):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    b = {"max_tokens": tokens, "stream": True, "ignore_eos": True, **extra}
    b |= {"prompt": "the quick brown fox "} if "chat" not in path else {"messages": [{"role": "user", "content": "hello there"}]}
    payload = json.dumps(b).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    events = size = 0
    tail = b""
    while part := await reader.read(1 << 18):
        events += part.count(b"data: ")
        size += len(part)
        tail = (tail + part)[-200:]
    writer.close()
    assert b"[DONE]" in tail, tail
    return events, size


def cpu_s(pid):
    f = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(f[11]) + int(f[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--package", default="pdlab.real.api")
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--tokens", type=int, default=500)
    p.add_argument("--per-step", type=int, default=1)
    p.add_argument("--step-s", type=float, default=0.0)
    p.add_argument("--path", default="/v1/completions")
    p.add_argument("--extra", default="{}")
    a = p.parse_args()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    port = sock.getsockname()[1]
    proc = multiprocessing.Process(target=serve, args=(a.package, sock, a.per_step, a.step_s, 0), daemon=True)
    proc.start()
    time.sleep(4)

    async def main():
        await client(port, 10, a.path, json.loads(a.extra))
        c0, t0 = cpu_s(proc.pid), time.perf_counter()
        r = await asyncio.gather(*(client(port, a.tokens, a.path, json.loads(a.extra)) for _ in range(a.clients)))
        t = time.perf_counter() - t0
        c = cpu_s(proc.pid) - c0
        n = a.clients * a.tokens
        print(
            f"{a.package} {a.path} clients {a.clients}: {n / t:,.0f} tok/s wall, cpu {1e6 * c / n:.1f} us/token ({n / c:,.0f} tok/s/core), {sum(x[0] for x in r) / n:.2f} events/token, {sum(x[1] for x in r) / n:.0f} B/token"
        )

    asyncio.run(main())
    proc.terminate()
