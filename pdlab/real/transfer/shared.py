"""Memory that other processes of this host can map. A memfd has no name: it is passed over a Unix socket, and the kernel frees it with its
last holder, so kill -9 leaves nothing in /dev/shm. It is sealed, so nobody can shrink it under a reader; readers map it read-only.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

SEGMENT = "pdlab_segment"  # the attribute by which a tensor of `shared_kv` carries its Segment; views of it do not
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """A sealed memfd of `bytes` bytes, mapped at `address`. Its memory is taken, and mapped, at once: a machine without room says so here
    (OSError), and whoever writes to it first waits for no page.
    `close` gives it back once no tensor of it is left."""

    def __init__(self, name: str, bytes: int) -> None:
        self.bytes = bytes
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # what peers get: they cannot map it for writing
            self.memory = mmap.mmap(fd, bytes)
            with contextlib.suppress(OSError):  # an older kernel; then each page costs a fault when it is first written to
                self.memory.madvise(POPULATE_WRITE)
        finally:
            os.close(fd)
        self.address = _address(self.memory)
        self.close = weakref.finalize(self, _close, self.fd)


def _close(fd: int) -> None:
    os.close(fd)


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def shared_kv(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zeroed CPU tensor in memory that an Endpoint over it can share with the processes of its host. It lives as long as the tensor."""
    segment = Segment("pdlab-kv", max(1, prod(shape)) * dtype.itemsize)
    tensor = torch.frombuffer(segment.memory, dtype=torch.uint8)[: prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
    setattr(tensor, SEGMENT, segment)
    return tensor


class Mapping:
    """Another process's segment, mapped read-only from its descriptor `fd`, which is closed here. Raises ValueError where it is none."""

    def __init__(self, fd: int, bytes: int) -> None:
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size < bytes:
                raise ValueError(f"the peer's shared memory has {found.st_size} bytes, not {bytes}")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == 0:
                raise ValueError("the peer's shared memory could shrink while it is read")
            self.memory = mmap.mmap(fd, bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise ValueError(f"the peer's shared memory cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self.bytes = bytes
        self.address = _address(self.memory)


class Mappings:
    """Each peer's memory mapped once, however many connections lead to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: weakref.WeakValueDictionary[tuple[int, int, int], Mapping] = weakref.WeakValueDictionary()

    def map(self, fd: int, bytes: int) -> Mapping:
        """Takes `fd` over. A mapping goes with the last connection that holds it."""
        try:
            found = os.fstat(fd)
        except OSError as error:
            raise ValueError(f"not a file descriptor: {error}") from error
        key = found.st_dev, found.st_ino, bytes
        with self._lock:
            mapping = self._found.get(key)
            if mapping is None:
                mapping = self._found[key] = Mapping(fd, bytes)
            else:
                os.close(fd)
            return mapping
