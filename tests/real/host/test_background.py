"""Work beside an engine's thread tells its end, whatever ends it."""

from __future__ import annotations

import asyncio
import queue

from pdlab.real.host.background import Background


def test_what_is_cancelled_tells_so_also_before_it_has_begun() -> None:
    background = Background("test")
    ends: queue.SimpleQueue[object] = queue.SimpleQueue()
    try:
        for _ in range(50):
            background.start(lambda: asyncio.sleep(60), ends.put).cancel()
        assert all(isinstance(ends.get(timeout=120), asyncio.CancelledError) for _ in range(50))
        background.start(lambda: asyncio.sleep(0, "done"), ends.put)
        assert ends.get(timeout=120) == "done"
    finally:
        background.close()
