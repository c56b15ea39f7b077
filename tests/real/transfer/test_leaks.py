"""What transfers took, they give back: descriptors, threads, shared memory, whether they ended well or not."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path

from tests.real.transfer.peer import endpoint, memory


def held() -> tuple[tuple[int, int, int], set[str]]:
    """Open descriptors, threads, mapped segments; names in /dev/shm."""
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("memfd:pdlab")
    return (len(os.listdir("/proc/self/fd")), threading.active_count(), mapped), set(os.listdir("/dev/shm"))


def more(after: tuple[tuple[int, int, int], set[str]], before: tuple[tuple[int, int, int], set[str]]) -> bool:
    """What others of this machine name or drop in /dev/shm meanwhile, and what the first use let go late, is none of it."""
    return any(a > b for a, b in zip(after[0], before[0], strict=True)) or not after[1] <= before[1]


async def use(way: tuple[str, bool], rounds: int) -> None:
    transport, shared = way
    kv = memory(32, seed=1, shared=shared), memory(32, seed=2, shared=shared)
    async with endpoint(kv[0], transport, name="p") as p, endpoint(kv[1], transport, name="d") as d:
        for k in range(rounds):
            p.offer(f"{k}", [1, 2])
            p.offer(f"{k} short", [1, 2])
            p.release(f"{k} short", "expired")
            pulls = [d.pull(p.descriptor(), f"{k}{suffix}", [1, 2], [3, 4], deadline_s=60) for suffix in ("", " short", " unknown")]
            arriving, late = d.expect(f"{k}", [8, 9], deadline_s=60), d.expect(f"{k} late", [10], deadline_s=0.01)
            pushes = [p.push(d.descriptor(), f"{k}{suffix}", [1, 2], [8, 9], deadline_s=60) for suffix in ("", " unknown")]
            given_up = asyncio.ensure_future(d.pull(p.descriptor(), f"{k}", [1], [5], deadline_s=60, release=False))
            await asyncio.sleep(0)
            given_up.cancel()
            results = await asyncio.gather(*pulls, *pushes, arriving, late, given_up, return_exceptions=True)
            assert results[0].status == results[3].status == results[5].status == "done", results  # type: ignore[union-attr]
        p.offer("never read", [3])
        d.expect("never pushed", [20], deadline_s=60)
        assert len(p._leases) == 1 and len(d._tickets) == 1


def test_nothing_is_left(way: tuple[str, bool]) -> None:
    asyncio.run(use(way, 2))  # what is made once: compiled kernels, NIXL's own
    time.sleep(0.05)
    before = held()
    for _ in range(3):
        asyncio.run(use(way, 6))
    until_s = time.monotonic() + 60
    while more(after := held(), before):
        assert time.monotonic() < until_s, f"{after}, and before {before}"
        time.sleep(0.02)
