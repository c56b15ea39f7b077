"""Time of a hand-off between unequal sides beside one between equal ones, for the same bytes.

    python experiments/bench_unequal.py [--transport shm] [--mib 64] [--rounds 15]

Each rank of a source lives in a process of its own, those of the target in this one. A round is a pull of the same sequence by all ranks of
the target, lease and all, for each pair of sides in turn. Printed are the medians, and the ratio of each pair to that of equal ranks,
blocks and elements that moves the same bytes, with the 95 % interval of the median of the rounds' own ratios (bootstrap, seed 1).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("UCX_NET_DEVICES", "lo")

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pdlab.core.kv_plan import heads_of
from pdlab.real.transfer.descriptor import decode
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.shared import shared_kv

LAYERS, DIM = 8, 128


@dataclass(frozen=True)
class Sides:
    name: str
    source_tp: int
    target_tp: int
    source_block: int = 16
    target_block: int = 16
    target_dtype: str = "bfloat16"
    heads: int = 8
    equal: str = ""  # the pair that it is compared with


PAIRS = [
    Sides("1 to 1", 1, 1),
    Sides("2 to 2", 2, 2),
    Sides("2 to 1", 2, 1, equal="1 to 1"),
    Sides("1 to 2", 1, 2, equal="2 to 2"),
    Sides("2 to 4", 2, 4, equal="2 to 2"),
    Sides("4 to 4", 4, 4, equal="2 to 2"),
    Sides("blocks of 32 to 16", 1, 1, 32, 16, equal="1 to 1"),
    Sides("blocks of 16 to 32", 1, 1, 16, 32, equal="1 to 1"),
    Sides("bfloat16 to float32", 1, 1, target_dtype="float32", equal="1 to 1"),
]


def endpoint(sides: Sides, rank: int, tokens: int, transport: str, *, source: bool) -> KvEndpoint:
    tp, block = (sides.source_tp, sides.source_block) if source else (sides.target_tp, sides.target_block)
    dtype = torch.bfloat16 if source else getattr(torch, sides.target_dtype)
    shape = (LAYERS, 2, tokens // block, len(heads_of(sides.heads, tp, rank)), block, DIM)
    own: dict[str, Any] = {"block_tokens": block, "rank": rank, "tp": tp, "kv_heads": sides.heads, "transport": transport}
    name = f"{'source' if source else 'target'}.{rank}"
    return KvEndpoint(shared_kv(shape, dtype).fill_(0.5), name=name, incarnation="1", model_hash="bench", **own)


async def serve(sides: Sides, rank: int, tokens: int, transport: str) -> None:
    """A rank of a source: offers what it is told to."""
    loop = asyncio.get_running_loop()
    async with endpoint(sides, rank, tokens, transport, source=True) as own:
        print("D" + base64.b64encode(own.descriptor()).decode(), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            own.offer(line.strip(), range(tokens // sides.source_block))
            print("D", flush=True)
            own.release(str(int(line) - 1))


class Pair:
    """One pair of sides, started."""

    def __init__(self, sides: Sides, tokens: int, transport: str) -> None:
        self.sides, self.tokens, self.leases = sides, tokens, 0
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps([sides.name, rank, tokens, transport])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(sides.source_tp)
        ]
        self.targets = [endpoint(sides, rank, tokens, transport, source=False) for rank in range(sides.target_tp)]
        told = [base64.b64decode(self._line(process)) for process in self.processes]
        self.descriptor = msgspec.structs.replace(decode(told[0]), ranks=tuple(told[1:])).encode()
        rng = random.Random(1)
        self.ids = [rng.sample(range(tokens // size), tokens // size) for size in (sides.source_block, sides.target_block)]

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("D"):
            assert line, "a rank of the source has gone"
        return line[1:]

    async def pull(self) -> float:
        self.leases += 1
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{self.leases}\n")
            process.stdin.flush()
            self._line(process)
        began = time.perf_counter()
        results = await asyncio.gather(
            *(one.pull(self.descriptor, str(self.leases), *self.ids, deadline_s=60, release=False) for one in self.targets)
        )
        seconds = time.perf_counter() - began
        assert all(one.status == "done" for one in results), results
        return seconds


async def measure(transport: str, mib: int, rounds: int) -> dict[str, list[float]]:
    tokens = (mib << 20) // (LAYERS * 2 * 8 * DIM * 2)
    found: dict[str, list[float]] = {sides.name: [] for sides in PAIRS}
    async with AsyncExitStack() as stack:
        pairs = []
        for sides in PAIRS:
            pairs.append(Pair(sides, tokens, transport))
            for process in pairs[-1].processes:
                stack.callback(process.wait)
                stack.callback(process.kill)
            for one in pairs[-1].targets:
                await stack.enter_async_context(one)
        for number in range(rounds + 1):  # the first connects
            for pair in pairs:
                seconds = await pair.pull()
                if number:
                    found[pair.sides.name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        name, rank, tokens, transport = json.loads(given.serve)
        asyncio.run(serve(next(sides for sides in PAIRS if sides.name == name), rank, tokens, transport))
        return
    found = asyncio.run(measure(given.transport, given.mib, given.rounds))
    rng = np.random.default_rng(1)
    table = Table(title=f"{given.mib} MiB over {given.transport}, {given.rounds} rounds")
    for column in ("source to target", "median, ms", "of equal sides", "95 %"):
        table.add_column(column)
    for sides in PAIRS:
        seconds = found[sides.name]
        row = [sides.name, f"{statistics.median(seconds) * 1e3:.1f}", "", ""]
        if sides.equal:
            ratios = np.array(seconds) / np.array(found[sides.equal])
            medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
            row[2:] = [f"{np.median(ratios):.2f}", "{:.2f} to {:.2f}".format(*np.quantile(medians, (0.025, 0.975)))]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
