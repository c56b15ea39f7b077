"""A node of an instance that is spread over several, other than the first: ranks alone, until rank 0 ends or a signal comes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from pdlab.core.types import UsageError
from pdlab.real.engine.options import EngineOptions
from pdlab.real.instance.followers import start_rank
from pdlab.real.instance.rank_meeting import come_to

LOOK_S = 0.1
END_S = 5.0


def run_node(options: EngineOptions, say: Callable[[str], None]) -> None:
    """Raises UsageError when rank 0 or a rank of ours has gone, so that whoever supervises starts this again."""
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as parents, _interrupted_by_sigterm():
        try:
            for rank in options.ranks_here:
                sock = come_to(options.master, rank, options.tp, options.kv_token, say)
                process, parent = start_rank(options, sock)
                parents.callback(parent.close)
                processes.append(process)
                say(f"rank {rank} of {options.tp} has joined rank 0 at {options.master}")
            while all(process.poll() is None for process in processes):
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            return
        finally:
            _end(processes)
        if any(process.returncode not in (0, -signal.SIGKILL) for process in processes):
            raise UsageError("a rank of this node has failed: what it said is above")
        raise UsageError(f"rank 0 at {options.master} has ended, or a rank was killed: so does this node")


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(END_S)
