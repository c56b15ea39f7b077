"""Memory that is put on huge pages, by a process of its own: what is in it stays, and Linux tells that it has moved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLAYED = """
import hashlib, re
from pathlib import Path
import torch
from pdlab.real.pages import use_huge_pages

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
