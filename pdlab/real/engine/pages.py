"""Huge pages under an engine's weights.

A decode step on a CPU reads every weight once. In pages of 4 KiB each one needs its own look-up, through two tables on a virtual machine,
and how long that takes depends on which pages the process happened to get: on one machine, steps of the same model took 22 to 31 ms from
one engine to the next. In pages of 2 MiB all took 20 to 22. Linux gives them to who asks, unless it is told `never`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

HUGE = 2 << 20
LEAST_BYTES = 4 * HUGE  # smaller regions are not worth a call
WANT, NOW = 14, 25  # MADV_HUGEPAGE, for what is touched later; MADV_COLLAPSE (Linux 6.1), for what is there


def use_huge_pages() -> int:
    """Ask for this process's writable memory to be put on huge pages; how many bytes were asked for. What the kernel refuses stays as it
    is: memory is as right in small pages, only slower."""
    try:
        advise = ctypes.CDLL(None, use_errno=True).madvise
        regions = list(_regions())
    except (OSError, AttributeError):
        return 0  # not Linux
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, size in regions:
        for advice in (WANT, NOW):
            advise(start, size, advice)  # what is refused shows in the return value, and is of no account
    return sum(size for _, size in regions)


def _regions() -> Iterator[tuple[int, int]]:
    """(address, bytes) of the large regions that are writable and its own, in whole huge pages."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, rights, *_ = line.split(maxsplit=2)
        first, last = (int(part, 16) for part in addresses.split("-"))
        start, end = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if rights.startswith("rw") and rights.endswith("p") and end - start >= LEAST_BYTES:
            yield start, end - start
