"""The processes below one of ours, as Linux tells of them: which are engines, what they may run on, what they have used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

ENGINES = (b"pdlab.real.engine.process", b"VLLM::", b"vllm serve", b"vllm_serve.py")  # in their command lines
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def descendants(parent: int) -> list[int]:
    """By process number, which is by age."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parents[int(entry)] = _parent(int(entry))
    found = {parent}
    while more := {pid for pid, of in parents.items() if of in found} - found:
        found |= more
    return sorted(found - {parent})


def engines(pids: Sequence[int]) -> list[int]:
    """Those that are engines, by the age of what has started each: instances start in the order of the file, their engines as they come."""
    found = [pid for pid in pids if any(name in _command(pid) for name in ENGINES)]
    return sorted(found, key=lambda pid: (_parent(pid), pid))


def pin(parent: int) -> set[int]:
    """One core for each engine process below `parent`, in their order; the others take what is left, and where nothing is the core of the
    last engine: what they cost is then one engine's, and known. Returns these cores, where a client belongs, too."""
    cores = sorted(os.sched_getaffinity(0))
    below = descendants(parent)
    own = engines(below)
    if len(own) > len(cores):
        return set(cores)  # more engines than cores: whoever pinned them would decide who waits
    for pid, core in zip(own, cores, strict=False):
        run_on(pid, {core})
    rest = set(cores[len(own) :] or cores[-1:])
    for pid in [parent, *(pid for pid in below if pid not in own)]:
        run_on(pid, rest)
    return rest


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
    """0 where it has ended."""
    with contextlib.suppress(OSError, IndexError):
        user, system = _stat(pid)[11:13]
        return (int(user) + int(system)) / TICKS_PER_S
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
