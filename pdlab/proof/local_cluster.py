"""A cluster of this machine's own: `pdlab serve FILE --role all`, on cores of which it is known who has them."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pdlab.core.types import UsageError
from pdlab.real.host import processes
from pdlab.real.host.processes import MODULE

START_S, STOP_S = 180.0, 40.0


@contextmanager
def local_cluster(file: Path, options: Sequence[str], threads: int = 1) -> Iterator[str]:
    """`pdlab serve FILE --role all`, until it is left; yields its URL. Its engines have `threads` each, and as many cores of their own
    where there are so many; this process, the client, stays on the router's meanwhile."""
    command = [*MODULE, "pdlab", "serve", str(file), "--role", "all", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_listen, args=(process, said), daemon=True)
    reader.start()
    everywhere = os.sched_getaffinity(0)
    try:
        url = _ready(process, said)
        processes.run_on(os.getpid(), processes.pin(process.pid, threads))
        yield url
    finally:
        processes.run_on(os.getpid(), everywhere)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()
        reader.join()


def _listen(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.put(line)
    process.stdout.close()
    said.put("")


def _ready(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> str:
    lines: list[str] = []
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        try:
            line = said.get(timeout=1.0)
        except queue.Empty:
            continue
        lines.append(line)
        if found := re.search(r"ready after .*: (http://\S+)/v1$", line.strip()):
            return found[1]
        if not line:
            break
    raise UsageError(f"the cluster did not start: {''.join(lines).strip()[-2000:] or f'not ready within {START_S:g} s'}")
