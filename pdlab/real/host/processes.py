"""The processes below one of ours, as Linux tells of them: which are engines, what they may run on, what they have used."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

ENGINES = (b"pdlab.real.instance.engine_process", b"VLLM::", b"vllm serve", b"vllm_serve.py")  # in their command lines
BESIDE = b"pdlab-beside-the-engines"  # in the command lines of what keeps cores awake, or watches them
MODULE = (sys.executable, "-P", "-u", "-m")  # -P: one of the package that runs here, not of a `pdlab` in the working directory
SPIN = """
import os, sys
parent, core, policy = (int(word) for word in sys.argv[2:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, policy, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
_libc = ctypes.CDLL(None)


@contextmanager
def awake() -> Iterator[None]:
    """Every core of a virtual machine computes meanwhile, at the lowest priority that there is. There, cores that sleep and wake are placed
    anew each time, two of them on one physical core for some seconds, and what engines then cost each other is not what it is while they
    compute. Elsewhere nothing is done: a core that is kept busy would slow its own sibling thread.

    Whoever computes must be in this process's session: between sessions Linux shares a core evenly (autogroup)."""
    with _spinning(sorted(os.sched_getaffinity(0)) if wander() else [], os.SCHED_IDLE):
        yield


def computing(cores: Sequence[int]) -> AbstractContextManager[None]:
    """Something computes on each of these meanwhile, at the usual priority, as an engine would."""
    return _spinning(cores, os.SCHED_OTHER)


@contextmanager
def _spinning(cores: Sequence[int], policy: int) -> Iterator[None]:
    command = [sys.executable, "-S", "-c", SPIN, BESIDE.decode(), str(os.getpid())]
    spinning = [subprocess.Popen([*command, str(core), str(policy)], process_group=0) for core in cores]  # Ctrl-C is not for them
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
        for process in spinning:
            process.wait()


def wander() -> bool:
    """Are cores placed anew by a host that does not say where? So with a virtual machine that sees no sibling threads."""
    with contextlib.suppress(OSError):
        siblings = Path("/sys/devices/system/cpu/smt/active").read_text(encoding="utf-8").strip() == "1"
        return not siblings and "hypervisor" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return False


async def ended(process: asyncio.subprocess.Process, within_s: float) -> None:
    """Wait for one that was asked to end; after `within_s` it is killed."""
    try:
        await asyncio.wait_for(process.wait(), within_s)
    except TimeoutError:
        process.kill()
        await process.wait()


def descendants(parent: int) -> list[int]:
    """By process number, which is by age; without those that keep cores awake or watch them."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parents[int(entry)] = _parent(int(entry))
    found = {parent}
    while more := {pid for pid, of in parents.items() if of in found} - found:
        found |= more
    return sorted(pid for pid in found - {parent} if BESIDE not in _command(pid))


def engines(pids: Sequence[int]) -> list[int]:
    """Those that are engines, by the age of what has started each: instances start in the order of the file, their engines as they come."""
    found = [pid for pid in pids if any(name in _command(pid) for name in ENGINES)]
    return sorted(found, key=lambda pid: (_parent(pid), pid))


def pin(parent: int, threads: int = 1) -> set[int]:
    """So many cores for each engine process below `parent`, in their order; the others take what is left, and where nothing is those of the
    last engine: what they cost is then one engine's, and known. Returns these cores, where a client belongs, too."""
    cores = sorted(os.sched_getaffinity(0))
    below = descendants(parent)
    own = engines(below)
    if len(own) * threads > len(cores):
        return set(cores)  # more engines than cores: whoever pinned them would decide who waits
    for number, pid in enumerate(own):
        run_on(pid, set(cores[number * threads :][:threads]))
    rest = set(cores[len(own) * threads :] or cores[-threads:])
    serve_on(parent, rest)
    return rest


def serve_on(parent: int, cores: set[int]) -> None:
    """`parent` and all below it that is no engine."""
    below = descendants(parent)
    for pid in {parent, *below} - set(engines(below)):
        run_on(pid, cores)


def run_on(pid: int, cores: set[int]) -> None:
    """All threads of a process."""
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)


def cpu_s(parent: int) -> tuple[float, float]:
    """CPU seconds so far of the engines below `parent`, and of all else that runs there, `parent` included."""
    below = descendants(parent)
    own = set(engines(below))
    used = {pid: _used_s(pid) for pid in [parent, *below]}
    return sum(used[pid] for pid in own), sum(seconds for pid, seconds in used.items() if pid not in own)


def _used_s(pid: int) -> float:
    """Of all its threads, those that have ended, too; 0 where it has ended."""
    clock = ctypes.c_int()
    if _libc.clock_getcpuclockid(pid, ctypes.byref(clock)) == 0:
        with contextlib.suppress(OSError):
            return time.clock_gettime(clock.value)
    return 0.0


def _parent(pid: int) -> int:
    """0 where it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(_stat(pid)[1])
    return 0


def _stat(pid: int) -> list[str]:
    """From its state on: a name before it may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""
