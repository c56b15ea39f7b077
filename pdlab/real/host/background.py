"""An asyncio loop in a thread of its own, beside the engine's, which has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """`run` waits for a coroutine's end; `start` does not, and hands its result, or its exception, to `then`, in the loop's thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def start(self, work: Callable[[], Awaitable[T]], then: Callable[[T | BaseException], None]) -> Future[None]:
        """Cancelling what is returned cancels the work; `then` still gets the CancelledError, after whatever it cleans up, also where it
        had not begun."""
        future: Future[None] = Future()

        async def working() -> T:
            return await work()

        def begin() -> None:
            task = self.loop.create_task(working())
            task.add_done_callback(ended)
            future.add_done_callback(lambda _: self.loop.call_soon_threadsafe(task.cancel) if future.cancelled() else None)

        def ended(task: asyncio.Task[T]) -> None:
            then(asyncio.CancelledError() if task.cancelled() else task.exception() or task.result())
            if not future.cancelled():
                future.set_result(None)

        self.loop.call_soon_threadsafe(begin)
        return future

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
