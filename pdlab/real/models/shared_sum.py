"""Ranks of one host meet for the sum by shared memory: rank 0 makes it, the others open it by rank 0's process, and each watches that the
others live. It has no name, so nothing is left of it when they end."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select

import msgspec
from torch._C._distributed_c10d import Store

from pdlab.kernels.all_reduce import SharedSum, available
from pdlab.real.transfer.descriptor import host_id

KEY = "shared sum"
NONCE_BYTES = 16


class SumMemory(msgspec.Struct, frozen=True):
    """Rank 0's. `nonce` lies behind the memory, so that who opens another sees it."""

    fd: int
    nonce: bytes


class SumRank(msgspec.Struct, frozen=True):
    """Where a rank runs: of one `host` are those who see each other's processes."""

    host: str
    process: int
    memory: SumMemory | None


_read = msgspec.json.Decoder(SumRank).decode


def meet(store: Store, rank: int, size: int) -> SharedSum | None:
    """The sum as this rank has it, or None where this rank cannot: it is used only if all can. Each rank calls it once."""
    own = memory = None
    if rank == 0 and available():
        with contextlib.suppress(OSError):
            own, memory = _make(SharedSum.bytes(size))
    store.set(f"{KEY} {rank}", msgspec.json.encode(SumRank(_host(), os.getpid(), own)).decode())
    ranks = [_read(store.get(f"{KEY} {other}")) for other in range(size)]
    first = ranks[0]
    if not available() or first.memory is None or len({each.host for each in ranks}) > 1 or len({each.process for each in ranks}) < size:
        return None
    try:
        if memory is None:
            memory = _open(first.process, first.memory, SharedSum.bytes(size))
        return SharedSum(memory, rank, size, _OtherRanks([each.process for each in ranks]).missing)
    except (OSError, ValueError):
        return None


def _make(bytes: int) -> tuple[SumMemory, mmap.mmap]:
    fd = os.memfd_create("pdlab-sum", os.MFD_CLOEXEC)  # open as long as the process: ranks come to it by number
    os.posix_fallocate(fd, 0, bytes + NONCE_BYTES)
    memory, nonce = mmap.mmap(fd, bytes + NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    memory[bytes:] = nonce
    return SumMemory(fd, nonce), memory


def _open(process: int, told: SumMemory, bytes: int) -> mmap.mmap:
    fd = os.open(f"/proc/{process}/fd/{told.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(fd, bytes + NONCE_BYTES)
    finally:
        os.close(fd)
    if memory[bytes:] != told.nonce:
        raise ValueError("another memory")
    return memory


class _OtherRanks:
    def __init__(self, processes: list[int]) -> None:
        self._ends = [os.pidfd_open(process) for process in processes]

    def missing(self, rank: int) -> None:
        """Raises RuntimeError, as a broken process group does."""
        end = select.poll()
        end.register(self._ends[rank], select.POLLIN)
        if end.poll(0):
            raise RuntimeError(f"rank {rank} has ended")


def _host() -> str:
    """Equal for processes that see each other under the same numbers."""
    try:
        return f"{host_id()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # nobody's equal
