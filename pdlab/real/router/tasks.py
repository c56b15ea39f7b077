"""The tasks of a router: each belongs to its owner until it ends, and none outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """Use it inside a running loop. What a task raises is the loop's to tell: nobody awaits it."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, way: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(way)
        self.keep(task)
        return task

    def keep(self, task: asyncio.Task[Any]) -> None:
        """`close` ends it."""
        self._running.add(task)
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """End every one, but who asks for it."""
        tasks = [task for task in self._running if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "the router's world has a bug", "exception": error, "task": task})
