"""Our policies beside the routers they are taken from: the same requests, one after the other, before stand-in workers. `make
interop-routers`.

A stand-in keeps a request until it is told to answer, so that both sides see the same loads. PDLAB_ROUTERS names a folder with the wheels
`sglang-router` and `vllm-router` in it (pip install --target).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import httpx
import pytest

from pdlab.core.policy import Policy
from pdlab.core.types import InstanceSpec, Request, Role
from pdlab.core.view import Cluster, Instance
from pdlab.policies.round_robin import RoundRobin
from pdlab.policies.sglang_cache_aware import SglangCacheAware

WORKERS, REQUESTS = 4, 300
UNIT = 8  # characters behind one prefix hash; words are as long
STARTED_S = 60.0


def folder() -> Path:
    given = os.environ.get("PDLAB_ROUTERS", "")
    if not given:
        pytest.skip("PDLAB_ROUTERS does not name a folder with sglang-router and vllm-router: make interop-routers")
    return Path(given).absolute()


class StandIns:
    """Workers that say who got which request, and answer it when told."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.got: asyncio.Queue[tuple[int, int]] = asyncio.Queue()  # (request, worker)
        self.release: dict[int, asyncio.Event] = {}
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        for worker in range(WORKERS):
            server = await asyncio.start_server(lambda r, w, worker=worker: self._serve(worker, r, w), "127.0.0.1", 0)
            self._servers.append(server)
            self.urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for released in self.release.values():
            released.set()
        for writer in list(self._writers):
            writer.close()
        await asyncio.sleep(0.05)

    async def _serve(self, worker: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                lines = request.decode().split("\r\n")
                sizes = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
                body = await reader.readexactly(sizes[0]) if sizes else b""
                answer: object = {"status": "ok", "model_path": "m", "served_model_name": "m", "data": [{"id": "m", "object": "model"}]}
                status = "200 OK"
                if "/v1/completions/render" in lines[0]:
                    status = "404 Not Found"
                elif "/tokenize" in lines[0]:  # vLLM's router asks for a prompt's tokens: here each character is one
                    tokens = list(map(ord, json.loads(body)["prompt"]))
                    answer = {"count": len(tokens), "max_model_len": 1 << 20, "tokens": tokens}
                elif "/v1/completions" in lines[0]:
                    number = int(json.loads(body)["prompt"].split("!")[1])
                    self.release[number] = asyncio.Event()
                    self.got.put_nowait((number, worker))
                    await self.release[number].wait()
                    answer = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice()], "usage": usage()}
                content = json.dumps(answer).encode()
                head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._writers.discard(writer)
            writer.close()


def choice() -> dict[str, object]:
    return {"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}


def usage() -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def texts(seed: int) -> list[str]:
    """Prompts that begin like others, up to some word: six documents, and as many of nobody's."""
    draw = random.Random(seed)
    documents = [[word(draw) for _ in range(60)] for _ in range(6)]
    found = []
    for number in range(REQUESTS):
        words = [*draw.choice(documents)[: draw.randrange(1, 60)], *(word(draw) for _ in range(draw.randrange(1, 40)))]
        found.append("".join(words) + chr(0x4E00 + number) + f"!{number}!")  # what ends one begins no other's end
    return found


def word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=UNIT))


def plan(seed: int, most: int) -> list[tuple[str, int]]:
    """What happens: a request is sent, or one that is under way is answered."""
    draw, under_way, found, sent = random.Random(seed), list[int](), list[tuple[str, int]](), 0
    while sent < REQUESTS:
        if under_way and (len(under_way) >= most or draw.random() < 0.45):
            found.append(("answer", under_way.pop(draw.randrange(len(under_way)))))
        else:
            found.append(("send", sent))
            under_way.append(sent)
            sent += 1
    return found + [("answer", number) for number in under_way]


class Followed(SglangCacheAware):
    """It is told where each prompt went, so that one difference does not lead to others."""

    went: Instance

    def plant(self, x: Instance, request: Request) -> None:
        super().plant(self.went, request)

    def shared(self, x: Instance, hashes: tuple[int, ...]) -> int:
        return next((i for i, block in enumerate(hashes) if block not in self._trees[x]), len(hashes))


def compared(policy: Policy, prompts: list[str], events: list[tuple[str, int]], real: list[int]) -> tuple[int, int]:
    """(decisions alike, others that are ties: both instances share as much of the prompt), where `real` names our instances."""
    cluster = Cluster(random.Random(0), hash_tokens=UNIT)
    for i in range(WORKERS):
        cluster.admit(InstanceSpec(name=f"x{i}", role=Role.MIXED, kv_blocks=0))
    cluster.refresh()
    alike = ties = 0
    for what, number in events:
        went = cluster.instances[real[number]]
        if what == "answer":
            went.decode_requests -= 1
            continue
        prompt = prompts[number]
        hashes = tuple(hash(prompt[:end]) for end in range(UNIT, len(prompt) + 1, UNIT))
        if isinstance(policy, Followed):
            policy.went = went
            before = [policy.shared(x, hashes) if x in policy._trees else 0 for x in cluster.instances]
        x = policy.dispatch(Request(number, 0.0, len(prompt), hashes), cluster)
        assert isinstance(x, Instance)
        alike += x is went
        if isinstance(policy, Followed):
            ties += x is not went and before[x.index] == before[went.index] > 0
        went.decode_requests += 1
    return alike, ties


async def theirs(module: str, policy: str, options: list[str], prompts: list[str], events: list[tuple[str, int]]) -> list[int]:
    stand_ins = StandIns()
    await stand_ins.start()
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics = free.getsockname()[1], other.getsockname()[1]
    command = [sys.executable, "-m", f"{module}.launch_router", "--policy", policy, "--port", str(port), "--host", "127.0.0.1"]
    command += [
        "--prometheus-port",
        str(metrics),
        "--worker-startup-check-interval",
        "1",
        "--disable-retries",
        *options,
        "--worker-urls",
        *stand_ins.urls,
    ]
    router = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(folder())}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            await up(client)
            return await drive(client, stand_ins, prompts, events)
    finally:
        router.kill()
        router.wait()
        await stand_ins.stop()


async def up(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(STARTED_S):
        while True:
            try:
                if (await client.get("/readiness")).status_code in (200, 404) and (await client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


async def drive(client: httpx.AsyncClient, stand_ins: StandIns, prompts: list[str], events: list[tuple[str, int]]) -> list[int]:
    chosen: dict[int, int] = {}
    asked: dict[int, asyncio.Task[httpx.Response]] = {}
    for what, number in events:
        if what == "answer":
            stand_ins.release[number].set()
            assert (await asked.pop(number)).status_code == 200
            continue
        body = {"model": "m", "prompt": prompts[number], "max_tokens": 4}
        asked[number] = asyncio.create_task(client.post("/v1/completions", json=body))
        async with asyncio.timeout(30):
            found, worker = await stand_ins.got.get()
        assert found == number
        chosen[number] = worker
    return [chosen[number] for number in range(REQUESTS)]


THRESHOLDS = ["--balance-abs-threshold", "2", "--balance-rel-threshold", "1.2", "--cache-threshold", "0.5"]
CASES: dict[str, tuple[str, str, list[str], Callable[[], Policy], int]] = {
    "sglang round_robin": ("sglang_router", "round_robin", [], RoundRobin, 12),
    "vllm round_robin": ("vllm_router", "round_robin", [], RoundRobin, 12),
    "sglang cache_aware": ("sglang_router", "cache_aware", [], Followed, 12),
    "sglang cache_aware, thresholds passed": (
        "sglang_router",
        "cache_aware",
        THRESHOLDS,
        lambda: Followed(balance_abs_threshold=2, balance_rel_threshold=1.2, cache_threshold=0.5),
        24,
    ),
    "vllm cache_aware": ("vllm_router", "cache_aware", [], lambda: Followed(ties="fewest_requests"), 12),
    "vllm cache_aware, thresholds passed": (
        "vllm_router",
        "cache_aware",
        THRESHOLDS,
        lambda: Followed(balance_abs_threshold=2, balance_rel_threshold=1.2, cache_threshold=0.5, ties="fewest_requests"),
        24,
    ),
}


@pytest.mark.interop
@pytest.mark.parametrize("case", CASES)
def test_decisions_are_the_originals(case: str) -> None:
    module, name, options, make, most = CASES[case]
    prompts, events = texts(1), plan(2, most)
    folder()
    real = asyncio.run(theirs(module, name, options, prompts, events))
    orders = permutations(range(WORKERS))  # a router numbers its workers as they come up
    alike, ties = max(compared(make(), prompts, events, [order[worker] for worker in real]) for order in orders)
    print(f"{case}: of {REQUESTS} decisions {alike} alike, {ties} others between instances that share as much of the prompt")
    assert alike + ties == REQUESTS
    assert alike >= 0.98 * REQUESTS
