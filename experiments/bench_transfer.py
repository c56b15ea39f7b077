"""Latency and rate of KV transfers between two processes of this machine, beside a plain memcpy and a plain blocking TCP loopback.

    python experiments/bench_transfer.py [--seconds 0.5] [--layers 8 --kv-heads 2 --block-tokens 16 --head-dim 64] [--only tcp]

As root, `--namespaces` puts the two processes into network namespaces of their own, a veth pair between them: packets pass the whole stack,
and no path takes loopback or shared memory.

A transfer is one `pull`, or one `expect` and `push`, of whole blocks, from the await to its Result, lease and all; the KV memory is 128 MiB
at each end and the blocks are shuffled ("in order": consecutive). Medians, after one to warm up. "lag" is the longest that the event loop
was held up at the destination while the 64 MiB ones ran.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

os.environ.setdefault("UCX_NET_DEVICES", "lo")

import torch
from rich.console import Console
from rich.table import Table

from pdlab.real.transfer import nixl
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.shared import shared_kv

NEAR, FAR = "pdlab-near", "pdlab-far"
ADDRESSES = {NEAR: "10.214.7.2", FAR: "10.214.7.3"}
HERE = os.environ.get("PDLAB_BENCH_NAMESPACE", "")  # which of the two this process is in
TOKEN = "of-a-benchmark" if HERE else ""  # between hosts nothing goes without one
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "64 MiB": 1 << 26}
KV_BYTES = 1 << 27
Shape = tuple[int, int, int, int]


def kv_of(shape: Shape, shared: bool, device: str) -> torch.Tensor:
    layers, kv_heads, block_tokens, head_dim = shape
    blocks = KV_BYTES // (layers * 2 * kv_heads * block_tokens * head_dim * 2)
    full = (layers, 2, blocks, kv_heads, block_tokens, head_dim)
    kv = shared_kv(full, torch.bfloat16) if shared else torch.empty(full, dtype=torch.bfloat16, device=device)
    return kv.fill_(1.0)


def endpoint(kv: torch.Tensor, name: str, transport: str) -> KvEndpoint:
    host = ADDRESSES[HERE] if HERE else "127.0.0.1"
    return KvEndpoint(
        kv,
        name=name,
        incarnation="1",
        block_tokens=kv.shape[4],
        model_hash="bench",
        transport=transport,
        host=host,
        token=TOKEN,
    )


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    """The two, with a veth pair between them."""

    def ip(words: str, *, check: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=check)

    with contextlib.ExitStack() as stack:
        for name in ADDRESSES:
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}", check=False)
        ip(f"link add eth0 netns {NEAR} type veth peer name eth0 netns {FAR}")
        for name, address in ADDRESSES.items():
            for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip(f"-n {name} {command}")
        yield


def inside(name: str, command: list[str]) -> list[str]:
    return ["ip", "netns", "exec", name, "env", f"PDLAB_BENCH_NAMESPACE={name}", "UCX_NET_DEVICES=eth0", "UCX_TLS=tcp", *command]


async def serve(transport: str, shared: bool, device: str, shape: Shape) -> None:
    """The other process: offers and pushes as it is told."""
    loop = asyncio.get_running_loop()
    async with endpoint(kv_of(shape, shared, device), "source", transport) as own:
        print(base64.b64encode(own.descriptor()).decode(), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            told = json.loads(line)
            if told["op"] == "offer":
                own.offer(told["id"], told["blocks"])
                print("{}", flush=True)
            else:
                result = await own.push(base64.b64decode(told["to"]), told["id"], told["blocks"], told["target"], deadline_s=60)
                print(json.dumps({"status": result.status, "seconds": result.seconds}), flush=True)


async def measure(transport: str, shared: bool, device: str, shape: Shape, seconds: float) -> list[tuple[str, dict[str, float], float]]:
    """(direction, {size: median seconds}, longest hold-up of the event loop)."""
    command = [sys.executable, __file__, "--serve", f"{transport},{int(shared)},{device}", "--shape", ",".join(map(str, shape))]
    process = subprocess.Popen(inside(FAR, command) if HERE else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def ask(what: dict[str, object] | None = None) -> str:
        assert process.stdin is not None and process.stdout is not None
        if what is not None:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
        while not (line := process.stdout.readline()).startswith(("{", "ey")):
            assert line, "the other process has gone"  # else NIXL's own lines
        return line

    rng, found = random.Random(1), []
    try:
        kv = kv_of(shape, shared, device)
        async with endpoint(kv, "target", transport) as own:
            at = base64.b64decode(ask())
            block_bytes = kv[:, :, 0].numel() * 2
            numbers = iter(range(1 << 30))

            async def pull(blocks: list[int], target: list[int]) -> float:
                lease = f"{next(numbers)}"
                ask({"op": "offer", "id": lease, "blocks": blocks})
                began = time.perf_counter()
                result = await own.pull(at, lease, blocks, target, deadline_s=60)
                assert result.status == "done", result
                return time.perf_counter() - began

            async def push(blocks: list[int], target: list[int]) -> float:
                ticket = f"{next(numbers)}"
                arriving = own.expect(ticket, target, deadline_s=60)
                told = {"op": "push", "id": ticket, "to": base64.b64encode(own.descriptor()).decode(), "blocks": blocks, "target": target}
                answer = json.loads(await asyncio.to_thread(ask, told))
                assert answer["status"] == (await arriving).status == "done", answer
                return float(answer["seconds"])

            for name, how, shuffled in (("pull", pull, True), ("pull, in order", pull, False), ("push", push, True)):
                medians, lag = {}, 0.0
                for size, bytes in SIZES.items():
                    n = bytes // block_bytes
                    assert n, f"blocks of {block_bytes} bytes are larger than {size}: take fewer layers"

                    def pick(n: int = n, shuffled: bool = shuffled) -> list[int]:
                        return rng.sample(range(kv.shape[2]), n) if shuffled else list(range(n))

                    medians[size], lag = await repeat(lambda how=how, pick=pick: how(pick(), pick()), seconds)  # type: ignore[misc]
                found.append((name, medians, lag))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    return found


async def repeat(one: Callable[[], Awaitable[float]], seconds: float) -> tuple[float, float]:
    """(median, longest hold-up of the event loop meanwhile)."""
    await one()
    times, lags, stop = [], [0.0], asyncio.Event()

    async def tick() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - began - 0.001)

    ticking = asyncio.ensure_future(tick())
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        times.append(await one())
    stop.set()
    await ticking
    return statistics.median(times), max(lags)


def memcpy_s(bytes: int, seconds: float) -> float:
    source, target = torch.ones(1 << 27, dtype=torch.uint8), torch.zeros(1 << 27, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times, at, until = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        began = time.perf_counter()
        target[at : at + bytes].copy_(source[at : at + bytes])
        times.append(time.perf_counter() - began)
        at = (at + bytes) % ((1 << 27) - bytes + 1)
    torch.set_num_threads(threads)
    return statistics.median(times)


def loopback_s(bytes: int, seconds: float) -> float:
    """One byte there, `bytes` back, in one buffer each, in two processes."""
    code = (
        "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
        "s.setsockopt(6,1,1)\nb=bytearray(int(sys.argv[2]))\nwhile s.recv(1): s.sendall(b)"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen([sys.executable, "-c", code, str(listener.getsockname()[1]), str(bytes)])
        sock, _ = listener.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        view, times, until = memoryview(bytearray(bytes)), [], time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 5:
            began = time.perf_counter()
            sock.sendall(b"x")
            done = 0
            while done < bytes:
                done += sock.recv_into(view[done:])
            times.append(time.perf_counter() - began)
    process.wait()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.5)
    for field, default in (("layers", 8), ("kv-heads", 2), ("block-tokens", 16), ("head-dim", 64)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--only", default="", help="shm, tcp, nixl or cuda_ipc")
    parser.add_argument("--device", default="cpu", help="where the KV memory is; cuda: cuda_ipc and NIXL")
    parser.add_argument("--namespaces", action="store_true", help="the two processes in network namespaces of their own (as root)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        transport, shared, device = given.serve.split(",")
        layers, kv_heads, block_tokens, head_dim = map(int, given.shape.split(","))
        asyncio.run(serve(transport, shared == "1", device, (layers, kv_heads, block_tokens, head_dim)))
        return
    if given.namespaces and not HERE:
        with namespaces():
            subprocess.run(inside(NEAR, [sys.executable, __file__, *sys.argv[1:]]), check=True)
        return
    shape = (given.layers, given.kv_heads, given.block_tokens, given.head_dim)
    table = Table(
        "path", *SIZES, "64 MiB lag", title=f"KV transfers, blocks of {2 * 2 * shape[0] * shape[1] * shape[2] * shape[3]:,} bytes"
    )

    def row(name: str, medians: dict[str, float], lag: float | None = None) -> None:
        cells = [f"{s * 1e6:,.0f} us  {SIZES[size] / s / 1e9:.2f} GB/s" for size, s in medians.items()]
        table.add_row(name, *cells, "" if lag is None else f"{lag * 1e3:.1f} ms")

    row("memcpy, one thread", {size: memcpy_s(bytes, given.seconds) for size, bytes in SIZES.items()})
    ways = [("tcp", "tcp", False)]
    if given.device != "cpu":
        ways = [("cuda_ipc", "cuda_ipc", False)]
    elif not HERE:
        row("TCP loopback, blocking", {size: loopback_s(bytes, given.seconds) for size, bytes in SIZES.items()})
        ways = [("shm", "shm", True), ("shm, staged", "shm", False), *ways]
    if nixl.api() is not None:
        ways.append(("nixl", "nixl", False))
    for name, transport, shared in (way for way in ways if given.only in way[1]):
        for direction, medians, lag in asyncio.run(measure(transport, shared, given.device, shape, given.seconds)):
            row(f"{name}: {direction}", medians, lag)
    Console(width=140).print(table)
    if nixl.api() is None:
        print("nixl is not installed (pip install nixl-cu12)")
    assert threading.active_count() == 1


if __name__ == "__main__":
    main()
