"""A pdlab cluster around servers that run already: a redis, a sidecar for each vLLM server, a router."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tests.support.ports import free_port
from tests.support.vllm_servers import NAME, VllmServer

LEASE_S = 60.0  # vLLM's front answers seconds late while two of them, and others, share two cores


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request: tokens, and seconds since it asked."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def tpot_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / (len(self.tokens) - 1)


class VllmCluster:
    def __init__(self, folder: Path, registry: str, stack: ExitStack) -> None:
        self.folder, self.registry, self._stack = folder, registry, stack
        self.url = ""

    def serve(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """`pdlab serve` in this cluster; its output goes to NAME.log."""
        command = [sys.executable, "-m", "pdlab", "serve", "--registry", self.registry, "--instance-name", name, *options]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        self._stack.callback(self.end, process)
        return process

    def route(self, experiment: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.serve("router", "--role", "router", "--served-model-name", NAME, "--port", str(port), str(experiment))

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Who is registered, as the router has it; nobody while it starts."""
        try:
            answer = httpx.get(f"{self.url}/pdlab/v1/cluster", timeout=10)
        except httpx.TransportError:
            return {}
        return {row["spec"]["name"]: row for row in answer.json().get("rows", [])}

    def until(self, **states: str) -> dict[str, dict[str, Any]]:
        """Wait until these, and no others, are registered, in these states."""
        until_s = time.monotonic() + 90
        while True:
            found = self.rows()
            if {name: row["state"] for name, row in found.items()} == states:
                return found
            assert time.monotonic() < until_s, f"{found}, not {states}: see {self.folder}"
            time.sleep(0.05)

    async def ask(self, prompts: Sequence[list[int]], max_tokens: int, at_once: int) -> list[Outcome]:
        """Greedy and streamed, `at_once` of them at a time."""
        slots = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            return await asyncio.gather(*(self._one(client, slots, prompt, max_tokens) for prompt in prompts))

    async def _one(self, client: httpx.AsyncClient, slots: asyncio.Semaphore, prompt: list[int], max_tokens: int) -> Outcome:
        asked = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        asked |= {"stream": True, "return_token_ids": True}
        found = Outcome()
        async with slots:
            began_s = time.monotonic()
            async with client.stream("POST", "/v1/completions", json=asked) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        found.error += "" if line in ("", "data: [DONE]") or line.startswith(":") else line  # a comment while it waits
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    found.error += str(chunk.get("error") or "")
                    for choice in chunk.get("choices", []):
                        tokens = choice.get("token_ids") or []
                        found.tokens += tokens
                        found.times_s += [time.monotonic() - began_s] * len(tokens)
                        found.finish = choice["finish_reason"] or found.finish
        return found


@contextmanager
def cluster(
    folder: Path, model: Path, policy: dict[str, str], upstreams: dict[str, tuple[str, VllmServer]], lease_s: float = LEASE_S
) -> Iterator[VllmCluster]:
    """`upstreams`: role and server by the name it is to have."""
    experiment = folder / "experiment.json"
    text = {
        "name": "interop",
        "model": str(model),
        "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
        "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]},
        "engine": {"block_tokens": 128},
        "limits": {"lease_s": lease_s},
        "policy": policy,
    }
    experiment.write_text(json.dumps(text))
    port = free_port()
    with ExitStack() as stack:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes"]
        with (folder / "redis.log").open("ab") as log:
            stack.callback(VllmCluster.end, subprocess.Popen(command, stdout=log, stderr=log))
        for _ in range(200):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        made = VllmCluster(folder, f"redis://127.0.0.1:{port}", stack)
        for name, (role, server) in upstreams.items():
            made.serve(name, "--role", role, "--engine", "vllm", "--upstream", server.url, "--served-model-name", NAME, str(experiment))
        made.route(experiment)
        made.until(**dict.fromkeys(upstreams, "ready"))
        yield made


def summary(outcomes: Sequence[Outcome]) -> str:
    ttft, tpot = median(one.ttft_s for one in outcomes), median(one.tpot_s for one in outcomes)
    return f"{len(outcomes)} requests: TTFT p50 {ttft:.2f} s, TPOT p50 {1000 * tpot:.0f} ms"
