"""How long KV takes from one process of this host to another, over the number of blocks.

Between CPUs each end is on a core on which something computes meanwhile, as engines do. Who copies has to wait for it, a time slice (3.6 ms
under Linux 6.18) or not at all: 8 MB take 1.4 ms or 5, so it is the mean that counts.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import torch

from pdlab.core.types import UsageError
from pdlab.cost.profile import Moved, TransferFit
from pdlab.proof.calibrate.fit import slope
from pdlab.real.host import processes
from pdlab.real.host.processes import MODULE
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.shared import shared_kv

REPEATS = 15
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_BYTES = 256 << 20


class Kv(msgspec.Struct, frozen=True):
    """The KV memory of either end."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    device: str
    transport: str
    blocks: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layers, 2, self.blocks, self.kv_heads, self.block_tokens, self.head_dim

    @property
    def block_bytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * self.block_tokens * itemsize

    def sizes(self) -> list[int]:
        """Numbers of blocks to move."""
        return [size for size in SIZES if size <= self.blocks]


def memory(layers: int, kv_heads: int, head_dim: int, block_tokens: int, *, dtype: str, device: str = "cpu", transport: str = "auto") -> Kv:
    """Like an engine's, with as many blocks as are moved at most."""
    one = Kv(layers, kv_heads, head_dim, block_tokens, dtype, device, transport, 1)
    return msgspec.structs.replace(one, blocks=max(1, min(SIZES[-1], MOST_BYTES // one.block_bytes)))


def endpoint(kv: Kv, name: str) -> KvEndpoint:
    """Over new memory, shared as an engine's is."""
    dtype = getattr(torch, kv.dtype)
    tensor = shared_kv(kv.shape, dtype) if kv.device == "cpu" else torch.zeros(kv.shape, dtype=dtype, device=kv.device)
    tensor.fill_(0.5)
    return KvEndpoint(tensor, name=name, incarnation="1", block_tokens=kv.block_tokens, model_hash="calibrate", transport=kv.transport)


async def measure(kv: Kv, repeats: int = REPEATS, seed: int = 0) -> tuple[float, TransferFit]:
    """(set-up seconds, the rest). Raises UsageError when the two do not meet."""
    raw = msgspec.json.encode(kv).decode()
    process = await asyncio.create_subprocess_exec(
        *MODULE, "pdlab.proof.calibrate.peer", raw, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 24
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = await process.stdout.readline()
        if not said:
            raise UsageError("the other end of the transfers did not start")
        descriptor = base64.b64decode(said)
        found: dict[int, list[float]] = {size: [] for size in kv.sizes()}
        rng, transport = random.Random(seed), ""
        async with endpoint(kv, "calibrate-destination") as here:
            with _computing(kv, process.pid):
                for round_number in range(repeats + 1):  # the first connects
                    for size in rng.sample(list(found), len(found)):
                        lease = f"{round_number}-{size}"
                        process.stdin.write(f"{lease} {size}\n".encode())
                        await process.stdout.readline()
                        result = await here.pull(descriptor, lease, range(size), range(size), deadline_s=30.0)
                        if result.status != "done":
                            raise UsageError(f"a transfer over {kv.transport} failed: {result.reason}")
                        if round_number:
                            found[size].append(result.seconds)
                        transport = result.transport
        return fitted(kv, transport, found)
    finally:
        process.stdin.close()
        await processes.ended(process, 5.0)


@contextmanager
def _computing(kv: Kv, source: int) -> Iterator[None]:
    """Of CPUs: the process `source` on the first core, this one on the last, and on each something that computes."""
    if kv.device != "cpu":
        yield
        return
    everywhere = sorted(os.sched_getaffinity(0))
    first, last = everywhere[0], everywhere[-1]
    try:
        processes.run_on(source, {first})
        processes.run_on(os.getpid(), {last})
        with processes.computing(sorted({first, last})):
            yield
    finally:
        processes.run_on(os.getpid(), set(everywhere))


def fitted(kv: Kv, transport: str, found: dict[int, list[float]]) -> tuple[float, TransferFit]:
    """Of seconds by the number of blocks."""
    moved = tuple(Moved(bytes=size * kv.block_bytes, seconds=tuple(times)) for size, times in found.items())
    line = [(float(m.bytes), float(np.mean(m.seconds))) for m in moved]
    setup_s, s_per_byte = slope(line)
    return setup_s, TransferFit(
        transport=transport, bytes_per_s=1.0 / max(s_per_byte, 1e-12), mean_error=_error(line, setup_s, s_per_byte), moved=moved
    )


def _error(line: Sequence[tuple[float, float]], setup_s: float, s_per_byte: float) -> float:
    return float(np.mean([abs((setup_s + size * s_per_byte) / seconds - 1.0) for size, seconds in line]))
