"""An asyncio event loop whose time is virtual: when nothing is ready it jumps to the next timer. Equal programs run equally, and timers of
the same time go off in the order in which they were set, however many others there are.

`VirtualLoop.when_quiet(call)` runs `call` when all that follows from what has happened by now has happened, at the same time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappush
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.BaseSelector):
    """Never waits: in place of the wait the loop's clock moves on."""

    def __init__(self) -> None:
        self.loop: VirtualLoop
        self.keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self.keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self.keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.loop.jump(timeout)
        return []

    def get_map(self) -> dict[Any, selectors.SelectorKey]:
        return self.keys


class _Timer(asyncio.TimerHandle):
    order = 0

    def __lt__(self, other: object) -> bool:
        assert isinstance(other, _Timer)
        return (self.when(), self.order) < (other.when(), other.order)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)
        self._now = 0.0
        self._quiet: deque[Callable[[], None]] = deque()
        self._clock_resolution = 1e-12
        self._orders = count()

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        timer.order = next(self._orders)
        timer._scheduled = True  # type: ignore[attr-defined]
        heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        return timer

    def when_quiet(self, call: Callable[[], None]) -> None:
        self._quiet.append(call)

    def jump(self, timeout: float | None) -> None:
        if timeout == 0:
            return
        if self._quiet:
            self.call_soon(self._quiet.popleft())
        elif timeout is None:
            raise AssertionError("everybody waits for something that never comes")
        else:
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """`main(loop)` to its end; no task may be left."""
    loop = VirtualLoop()
    troubles: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: troubles.append(context))
    try:
        found = loop.run_until_complete(main(loop))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        assert not left, f"tasks are left: {left}"
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    for context in troubles:
        raise AssertionError(context["message"]) from context.get("exception")
    return found
