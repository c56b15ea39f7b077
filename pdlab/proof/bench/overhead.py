"""What the client itself costs and adds: a measurement is worth what its instrument is."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

LATE_S = 0.005  # more at p99, and arrivals are not what the experiment says
_EVERY_S = 0.02


class Overhead:
    """`sent_late_s`: how much later than due each request was sent. The loop is asked every 20 ms how late it comes to what is ready, which
    bounds the error of every timestamp."""

    def __init__(self) -> None:
        self.sent_late_s, self.read_late_s = array("d"), array("d")
        self.chunks = self.tokens = 0
        self._cpu_s, self._began_s = time.thread_time(), time.perf_counter()

    def began(self) -> None:
        """From here on the CPU time counts."""
        self._cpu_s, self._began_s = time.thread_time(), time.perf_counter()

    async def watch(self, tick: Callable[[], None]) -> None:
        """Until cancelled; calls `tick` now and then."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self.read_late_s.append(max(loop.time() - due_s, 0.0))
            tick()

    def summary(self, connections: int) -> dict[str, Any]:
        """Plain values, for summary.json."""
        cpu_s, took_s = time.thread_time() - self._cpu_s, time.perf_counter() - self._began_s
        return {
            "send_late_s": _points(self.sent_late_s),
            "read_late_s": _points(self.read_late_s),
            "cpu_s": cpu_s,
            "cpu_share": cpu_s / took_s if took_s > 0 else None,
            "connections": connections,
            "chunks": self.chunks,
            "tokens_per_chunk": self.tokens / self.chunks if self.chunks else None,
        }


def warnings(client: dict[str, Any]) -> list[str]:
    """What of `Overhead.summary` should worry the reader."""
    said = []
    late_s = client["send_late_s"]["p99"]
    if late_s is not None and late_s > LATE_S:
        said.append(f"the client was too slow: 1 % of the requests were sent over {late_s * 1e3:.1f} ms late; give it a core of its own")
    if (client["cpu_share"] or 0.0) > 0.8:
        said.append(f"the client used {client['cpu_share'] * 100:.0f} % of a core: latencies are partly its own")
    if (client["tokens_per_chunk"] or 0.0) > 1.05:
        said.append(
            f"the server sent {client['tokens_per_chunk']:.1f} tokens a chunk: ITL is the gap between chunks, not tokens; "
            "TPOT is the time from the first chunk to the last over the tokens after the first chunk, as usage or token ids count them "
            "(vllm bench counts all but one, and reads less)"
        )
    return said


def _points(values: array[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.quantile(np.frombuffer(values, np.float64), (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99), "max": max(values)}
