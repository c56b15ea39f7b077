"""An instance in a process of its own, told what to do by JSON lines: `python peer.py`; and the test's end of it, `Peer`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pdlab.real.transfer import wire
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.result import TransferResult
from pdlab.real.transfer.shared import SEGMENT, shared_kv
from tests.real.transfer import gpu

ROOT = Path(__file__).resolve().parents[3]
LAYERS, KV_HEADS, BLOCK_TOKENS, HEAD_DIM = 4, 2, 4, 8
BLOCK_BYTES_F32 = LAYERS * 2 * KV_HEADS * BLOCK_TOKENS * HEAD_DIM * 4


def memory(blocks: int, dtype: torch.dtype = torch.float32, *, seed: int, shared: bool = False, layers: int = LAYERS) -> torch.Tensor:
    """KV memory of random bits, NaNs among them, the same for the same seed."""
    shape = (layers, 2, blocks, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    kv = shared_kv(shape, dtype)
    if not shared:  # for endpoints it is not, except that the fake GPU could export it
        setattr(kv, gpu.ALLOCATION, kv.__dict__.pop(SEGMENT))
    bits = kv.view(torch.uint8)
    bits.copy_(torch.randint(0, 256, bits.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return kv


def endpoint(kv: torch.Tensor, transport: str = "tcp", *, name: str = "here", **more: Any) -> KvEndpoint:
    """`on_gpu`, as it is if the transport is cuda_ipc: the memory is said to be a GPU's."""
    given: dict[str, Any] = {"incarnation": "1", "block_tokens": BLOCK_TOKENS, "model_hash": "tiny", **more}
    if given.pop("on_gpu", transport == "cuda_ipc"):
        given["gpu"] = gpu.driver(kv)
    return KvEndpoint(kv, name=name, transport=transport, **given)


class Peer:
    """The process. `ask` waits for the answer; `tell` does not, and `answer` does."""

    def __init__(self) -> None:
        environment = {**os.environ, "UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._asked = 0
        self._answers: dict[int, Any] = {}

    def tell(self, op: str, **what: Any) -> int:
        assert self.process.stdin is not None
        self._asked += 1
        self.process.stdin.write(json.dumps({"n": self._asked, "op": op, **what}) + "\n")
        self.process.stdin.flush()
        return self._asked

    def answer(self, number: int) -> Any:
        assert self.process.stdout is not None
        while number not in self._answers:
            line = self.process.stdout.readline()
            assert line, "the peer has gone"
            if line.startswith("{"):  # NIXL prints
                found = json.loads(line)
                self._answers[found["n"]] = found
        found = self._answers.pop(number)
        assert "error" not in found, found["error"]
        return found["answer"]

    def ask(self, op: str, **what: Any) -> Any:
        return self.answer(self.tell(op, **what))

    def make(self, name: str, transport: str, **more: Any) -> bytes:
        """An endpoint in it; its descriptor."""
        return base64.b64decode(self.ask("make", name=name, transport=transport, **more))

    def result(self, number: int) -> TransferResult:
        return TransferResult(**self.answer(number))

    def signal(self, number: int) -> None:
        """When this returns from SIGSTOP, every thread of it stands."""
        os.kill(self.process.pid, number)
        while number == signal.SIGSTOP and any(
            stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        ):
            time.sleep(0.001)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class _Served:
    def __init__(self) -> None:
        self.made: dict[str, KvEndpoint] = {}
        self.kv: dict[str, torch.Tensor] = {}
        self.tickets: dict[str, asyncio.Future[TransferResult]] = {}
        self.read: dict[str, list[list[Any]]] = {}
        self.renewed: dict[str, list[list[Any]]] = {}

    async def make(
        self, name: str, transport: str, blocks: int, seed: int, dtype: str, shared: bool, device: str = "cpu", **more: Any
    ) -> str:
        kv = memory(blocks, getattr(torch, dtype), seed=seed, shared=shared)
        self.kv[name] = kv = kv if device == "cpu" else kv.to(device)
        read, renewed = self.read.setdefault(name, []), self.renewed.setdefault(name, [])
        self.made[name] = endpoint(
            kv,
            transport,
            name=name,
            lease_read=lambda *what: read.append(list(what)),
            leases_renewed=lambda *what: renewed.append(list(what)),
            **more,
        )
        await self.made[name].start()
        return base64.b64encode(self.made[name].descriptor()).decode()

    async def offer(self, name: str, lease: str, blocks: list[int]) -> None:
        self.made[name].offer(lease, blocks)

    async def expire(self, name: str, lease: str, after_s: float = 0.0) -> None:
        if after_s:
            asyncio.get_running_loop().call_later(after_s, self.made[name].release, lease, "expired")
        else:
            self.made[name].release(lease, "expired")

    async def read_leases(self, name: str) -> list[list[Any]]:
        return self.read[name]

    async def renewals(self, name: str) -> list[list[Any]]:
        return self.renewed[name]

    async def expect(self, name: str, ticket: str, blocks: list[int], deadline_s: float) -> None:
        self.tickets[ticket] = self.made[name].expect(ticket, blocks, deadline_s=deadline_s)

    async def arrived(self, ticket: str) -> dict[str, Any]:
        return asdict(await self.tickets[ticket])

    async def push(self, name: str, to: str, ticket: str, source: list[int], target: list[int], layers: Any, deadline_s: float) -> Any:
        span = tuple(layers) if layers else None
        result = await self.made[name].push(base64.b64decode(to), ticket, source, target, layers=span, deadline_s=deadline_s)
        return asdict(result)

    async def overwrite(self, name: str, blocks: list[int], byte: int) -> None:
        bits = self.kv[name].view(torch.uint8)
        bits[:, :, blocks] = byte

    async def bits(self, name: str) -> str:
        return base64.b64encode(self.kv[name].cpu().view(torch.uint8).numpy().tobytes()).decode()

    async def refuse(self, code: int) -> None:
        """Whatever GPU memory is opened here from now on; 0: no more."""
        gpu.refuse(code)

    async def stand_still(self, after_chunks: int) -> None:
        """From when it has sent so many chunks of blocks."""
        frame = wire.frame

        def stopping(message: wire.WireMessage) -> bytes:
            nonlocal after_chunks
            if isinstance(message, wire.Chunk):
                if not after_chunks:
                    os.kill(os.getpid(), signal.SIGSTOP)
                after_chunks -= 1
            return frame(message)

        wire.frame = stopping

    async def opened(self) -> int:
        return gpu.opened()

    async def drop(self, name: str) -> None:
        await self.made.pop(name).close()
        del self.kv[name]


async def _serve() -> None:
    served = _Served()
    loop = asyncio.get_running_loop()
    tasks = set()

    async def do(n: int, op: str, **what: Any) -> None:
        try:
            reply = {"n": n, "answer": await getattr(served, op)(**what)}
        except BaseException as error:
            reply = {"n": n, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = asyncio.create_task(do(**json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(_serve())
