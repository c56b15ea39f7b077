"""An engine's own memory: on huge pages, and kept.

A decode step on a CPU reads every weight once. In pages of 4 KiB each one needs its own look-up, through two tables on a virtual machine,
and how long that takes depends on which pages the process happened to get: on one machine, steps of the same model took 22 to 31 ms from
one engine to the next. In pages of 2 MiB all took 20 to 22. Linux gives them to who asks, unless it is told `never`.

What one step has used for its intermediate results is kept for the next, or prefills spend 1 % of their time on taking pages from the
kernel that the last one gave back.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

HUGE = 2 << 20
LEAST_BYTES = 4 * HUGE  # smaller regions are not worth a call
WANT, NOW = 14, 25  # MADV_HUGEPAGE, for what is touched later; MADV_COLLAPSE (Linux 6.1), for what is there
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt
KEPT_BYTES = (1 << 30, 32 << 20)  # an allocation of less comes from the heap; the first that the C library takes
_libc = ctypes.CDLL(None)


def use_huge_pages() -> int:
    """Ask for this process's writable memory to be put on huge pages; how many bytes were asked for. What the kernel refuses stays as it
    is: memory is as right in small pages, only slower."""
    try:
        regions = list(_regions())
    except OSError:
        return 0  # not Linux
    for start, size in regions:
        _advise(start, size, WANT, NOW)
    return sum(size for _, size in regions)


def keep_memory() -> None:
    """Let the C library keep what this process frees, instead of giving it back to the kernel and asking again."""
    with contextlib.suppress(AttributeError):  # not glibc
        any(_libc.mallopt(MMAP_THRESHOLD, bytes) for bytes in KEPT_BYTES)
        _libc.mallopt(TRIM_THRESHOLD, 0x7FFFFFFF)


def _advise(address: int, bytes: int, *advice: int) -> None:
    """What is refused shows in the return value, and is of no account."""
    for one in advice:
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(bytes), one)


def _regions() -> Iterator[tuple[int, int]]:
    """(address, bytes) of the large regions that are writable and its own, in whole huge pages."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, rights, *_ = line.split(maxsplit=2)
        first, last = (int(part, 16) for part in addresses.split("-"))
        start, end = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if rights.startswith("rw") and rights.endswith("p") and end - start >= LEAST_BYTES:
            yield start, end - start
