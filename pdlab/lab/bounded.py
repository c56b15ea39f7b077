"""A process of its own for what may take too long, too much memory, or die; and what is known of one from outside.

Linux tells a process's descendants and their memory in /proc; elsewhere there is no bound on memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from pdlab.search.pool import how_it_ended

_PATIENCE_S = 5.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class BoundedProcess:
    """Runs `main(pipe, *arguments)`, and ends with whoever started it."""

    def __init__(self, context: ForkServerContext, main: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self._life, others = context.Pipe()
        self.process = context.Process(target=_live, args=(main, theirs, others, arguments))
        self.process.start()
        theirs.close()
        others.close()

    @property
    def rss_bytes(self) -> int:
        """Of it and all that it has started; 0 where nobody tells."""
        return sum(_rss_bytes(pid) for pid in family(self.process.pid or 0))

    def how_it_ended(self) -> str:
        return how_it_ended(self.process)

    def kill(self) -> None:
        """With all that it has started."""
        if self.process.is_alive():
            _kill(list(family(self.process.pid or 0)))
        self.process.join(_PATIENCE_S)
        self.pipe.close()
        self._life.close()


def forkserver(*preload: str) -> ForkServerContext:
    """Of processes that have these modules from the start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def family(pid: int) -> Iterator[int]:
    """A process and its descendants, itself last."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    yield from family(int(child))
    yield pid


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _kill(pids: list[int]) -> None:
    for pid in reversed(pids):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _live(main: Callable[..., None], pipe: Connection, life: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    with suppress(BrokenPipeError):
        main(pipe, *arguments)


def _end_with(life: Connection) -> None:
    """Nothing is ever said here: it ends when the other side has gone."""
    with suppress(EOFError, OSError):
        life.recv()
    _kill([pid for pid in family(os.getpid()) if pid != os.getpid()])
    os._exit(1)
