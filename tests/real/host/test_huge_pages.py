"""Memory that is put on huge pages, there before it is used, and kept: each by a process of its own, of which Linux tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLAYED = """
import hashlib, re
from pathlib import Path
import torch
from pdlab.real.host.huge_pages import use_huge_pages

def huge():
    return sum(int(kib) for kib in re.findall(r"AnonHugePages:\\s+(\\d+)", Path("/proc/self/smaps").read_text()))

weights = [torch.rand(1 << 18) for _ in range(64)]  # 1 MiB each, as matrices of a small model lie in the heap
before, digest = huge(), hashlib.sha256(torch.cat(weights).numpy()).hexdigest()
asked = use_huge_pages()
assert hashlib.sha256(torch.cat(weights).numpy()).hexdigest() == digest
print(asked >> 20, (huge() - before) >> 10)
"""


def test_large_memory_moves_to_huge_pages_and_keeps_what_is_in_it() -> None:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text():
        pytest.skip("this kernel gives no huge pages")
    played = subprocess.run([sys.executable, "-c", PLAYED], capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stderr
    asked_mib, moved_mib = map(int, played.stdout.split())
    assert asked_mib >= 48
    if moved_mib < 16:
        pytest.skip(f"this kernel moved {moved_mib} MiB: none on demand (MADV_COLLAPSE came with Linux 6.1), or few pages are free")


SHARED = """
import gc, resource
from pathlib import Path
import torch
from pdlab.real.transfer.shared import SEGMENT, shared_kv

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def mapped():
    return Path("/proc/self/maps").read_text().count("pdlab-kv")

kv = shared_kv((2, 2, 100, 4, 16, 64), torch.float32)
segment = getattr(kv, SEGMENT)
assert kv.data_ptr() == segment.address and not kv.any()
before = faults()
kv.fill_(1.5)
print(faults() - before)
view = kv[0, 0]
del kv, segment
gc.collect()
assert mapped() == 1 and view[0, 0, 0, 0] == 1.5
del view
gc.collect()
assert mapped() == 0
"""

KEPT = """
import resource, sys
import torch
from pdlab.real.host.huge_pages import keep_memory

if sys.argv[1] == "keep":
    keep_memory()
for _ in range(6):  # the heap needs a few rounds to be as large as it must be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(1 << 20) for _ in range(12)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def play(program: str, *arguments: str) -> list[int]:
    played = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stderr
    return [int(line) for line in played.stdout.split()]


def test_shared_memory_is_there_before_it_is_used_and_goes_with_its_last_view() -> None:
    pages = (2 * 2 * 100 * 4 * 16 * 64 * 4) // 4096
    (faults,) = play(SHARED)
    assert faults < pages / 8


def test_what_is_freed_is_kept_for_the_next() -> None:
    (taken,), (kept,) = play(KEPT, "let go"), play(KEPT, "keep")
    if taken < 1000:
        pytest.skip("this C library keeps it anyway")
    assert kept < taken / 10
