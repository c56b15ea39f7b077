"""What the router itself costs: two instances that answer at once and compute nothing, the real router process, a client.

    python -m experiments.bench_cluster [--seconds 5] [--policy round_robin]

requests   streams of 2 tokens, both legs: prefill at one instance, decode at the other
tokens     long streams, each with a token every 20 ms as an engine's steps send them
latency    few such streams: from the instance's send to the client's read, less the same without a router between

CPU is the router process's alone, by /proc. The router has a core of its own where the machine has two; instances and client share the
others. On a shared machine the wall-clock figures are lower bounds: "on one core" is what the CPU time would allow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import uvloop

from pdlab.core.router import Router
from pdlab.core.types import MADE, PULL, InstanceSpec, Report, Role
from pdlab.experiment.deployment import TransferSpec
from pdlab.policies import load as load_policy
from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import bind, serve
from pdlab.real.api.service import Service
from pdlab.real.launch.instance import run_until_stopped
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.http import HttpClient
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.world import LiveWorld
from tests.support.echo_engine import VOCAB, byte_tokenizer
from tests.support.fake_instance import key_of

ROOT = Path(__file__).parents[1]
STEP_S = 0.02
PROMPT_TOKENS = 128
REPORT_S = 0.5


class Text(msgspec.Struct):
    text: str


class Chunk(msgspec.Struct):
    choices: list[Text] = []


decode = msgspec.json.Decoder(Chunk).decode


# ---------------------------------------------------------------- the router's process


async def route(urls: list[str], policy: str) -> None:
    """Serves the cluster of these instances, the last of which decodes, until SIGTERM."""
    started_s = time.monotonic()
    router = Router(load_policy.build(policy, Path()), seed=1)
    world = LiveWorld(router, HttpRemote, transfer=TransferSpec(), now=lambda: time.monotonic() - started_s)
    world.open()
    specs = [
        InstanceSpec(
            name=f"{role.value}-{i}",
            role=role,
            kv_blocks=1 << 20,
            max_seqs=1 << 16,
            url=url,
            model="fake",
            capabilities=(PULL, MADE),
        )
        for i, url in enumerate(urls)
        for role in [Role.DECODE if i == len(urls) - 1 else Role.PREFILL]
    ]
    for spec in specs:
        world.instances.join(spec)

    async def report() -> None:
        while True:
            for spec in specs:
                world.instances.report(Report(spec.name, 0, time.time(), free_blocks=spec.kv_blocks))
            await asyncio.sleep(REPORT_S)

    reporting = asyncio.create_task(report())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(byte_tokenizer(Path(folder)))
    service = Service(ClusterEngine(world, "fake", VOCAB), tokenizer, "fake", max_requests=1 << 16)
    sock = bind("127.0.0.1", 0)
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    await serve(create_app(service), sock, drain_s=0.1)
    reporting.cancel()
    await world.close()


# ---------------------------------------------------------------- the client


def prompt(i: int) -> list[int]:
    return [*(48 + int(digit) for digit in f"{i:08d}"), *(97 + (i + k) % 26 for k in range(PROMPT_TOKENS - 8))]


def body(i: int, tokens: int) -> bytes:
    asked = {"model": "fake", "prompt": prompt(i), "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0.0}
    return json.dumps(asked).encode()


async def stream(connections: HttpClient, i: int, tokens: int, take: Callable[[bytes], None]) -> None:
    """`take` gets what comes, as it comes."""
    connection = await connections.send(
        connections.request(b"POST", b"/v1/completions", body(i, tokens), f"X-Request-Id: bench-{i}\r\n".encode())
    )
    assert connection.status == 200, await connection.whole()
    tail = b""

    def ended(read: bytes) -> bool:
        nonlocal tail
        tail = (tail + read)[-20:]
        take(read)
        return False

    await connection.follow(ended)
    assert b"[DONE]" in tail, tail
    connection.leave(True)


async def counted(connections: HttpClient, i: int, tokens: int) -> int:
    found: list[int] = []
    await stream(connections, i, tokens, lambda read: found.append(read.count(b'"text":')))
    return sum(found)


async def requests(url: str, seconds: float, clients: int) -> tuple[int, float]:
    """(requests, seconds): as many as come through."""
    connections, numbers, done = HttpClient(url), iter(range(1 << 30)), 0
    until_s = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < until_s:
            await counted(connections, next(numbers), 2)
            done += 1

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took_s = time.perf_counter() - began_s
    connections.close()
    return done, took_s


async def long_streams(url: str, seconds: float, streams: int) -> tuple[int, float]:
    """(tokens, seconds)."""
    connections, each = HttpClient(url), int(seconds / STEP_S)
    began_s = time.perf_counter()
    await asyncio.gather(*(counted(connections, i, each) for i in range(streams)))
    took_s = time.perf_counter() - began_s
    connections.close()
    return streams * each, took_s


async def latencies(url: str, instance: str, seconds: float, streams: int) -> list[float]:
    """Seconds from each token's send at `instance` to its arrival here."""
    connections, each = HttpClient(url), int(seconds / STEP_S)
    arrivals: dict[str, list[float]] = {}

    async def client(i: int) -> None:
        times, rest = arrivals.setdefault(key_of(prompt(i)), []), b""

        def take(read: bytes) -> None:
            nonlocal rest
            now = time.monotonic()
            *lines, rest = (rest + read).split(b"\n")
            events = [decode(line[6:]) for line in lines if line.startswith(b"data: {")]
            times.extend([now] * sum(len(choice.text) for event in events for choice in event.choices))

        await stream(connections, i, each, take)

    await asyncio.gather(*(client(1_000_000 + i) for i in range(streams)))
    connections.close()
    asked = HttpClient(instance)
    _, raw = await asked.call(b"GET", b"/times")
    asked.close()
    found = []
    for key, sent in json.loads(raw).items():
        if key in arrivals:
            there = arrivals[key][-len(sent) :]
            found += [there_s - sent_s for there_s, sent_s in zip(there, sent, strict=True)]
    return found


# ---------------------------------------------------------------- all together


@contextlib.contextmanager
def process(core: int, *command: str) -> Iterator[tuple[str, int]]:
    """(its URL, its pid), pinned to that core where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    running = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert running.stdout is not None
    try:
        os.sched_setaffinity(running.pid, {cores[core % len(cores)]})
        url = running.stdout.readline().strip()
        assert url, f"{command} did not start"
        yield url, running.pid
    finally:
        running.terminate()
        running.wait()
        running.stdout.close()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(given: argparse.Namespace) -> None:
    fake = "tests.support.fake_instance"
    with process(1, fake) as (prefill, _), process(1, fake) as (instant, _), process(1, fake, "--interval-s", str(STEP_S)) as (steps, _):
        routing = [__spec__.name, "--policy", given.policy, "--route"]
        with process(0, *routing, f"{prefill},{instant}") as (url, pid):
            uvloop.run(requests(url, 0.5, 8))
            before_s = cpu_s(pid)
            done, took_s = uvloop.run(requests(url, given.seconds, given.clients))
            row(f"requests, {given.clients} at a time", done, took_s, cpu_s(pid) - before_s)
        with process(0, *routing, f"{prefill},{steps}") as (url, pid):
            before_s = cpu_s(pid)
            done, took_s = uvloop.run(long_streams(url, given.seconds, given.streams))
            row(f"tokens, {given.streams} streams, {given.streams / STEP_S:,.0f}/s sent", done, took_s, cpu_s(pid) - before_s)
            print("\n| added to a token | p50 ms | p99 ms | through the router, p50, p99 | without, p50, p99 |\n|---|---|---|---|---|")
            for streams in (1, 16, 64):
                through = at(uvloop.run(latencies(url, steps, given.seconds, streams)))
                direct = at(uvloop.run(latencies(steps, steps, given.seconds, streams)))
                added = f"{through[0] - direct[0]:.2f} | {through[1] - direct[1]:.2f}"
                seen = f"{through[0]:.2f}, {through[1]:.2f} | {direct[0]:.2f}, {direct[1]:.2f}"
                print(f"| {streams} streams in one step | {added} | {seen} |", flush=True)


def row(name: str, done: int, took_s: float, used_s: float) -> None:
    busy = f"{100 * used_s / took_s:.0f} %"
    print(f"| {name} | {done / took_s:,.0f} | {busy} | {1e6 * used_s / done:,.1f} | {done / used_s:,.0f} |", flush=True)


def at(found: list[float]) -> tuple[float, float]:
    """p50 and p99, ms."""
    cuts = statistics.quantiles(found, n=100)
    return 1e3 * cuts[49], 1e3 * cuts[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--policy", default="round_robin")
    parser.add_argument("--route", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.route:
        run_until_stopped(route(given.route.split(","), given.policy))  # as pdlab serve does
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[1:]))
    print(f"policy {given.policy}; {len(cores)} cores, shared with whatever else runs here, load {os.getloadavg()[0]:.1f}\n")
    print("| | seen /s | router busy | us CPU each | on one core /s |\n|---|---|---|---|---|", flush=True)
    measure(given)


if __name__ == "__main__":
    main()
