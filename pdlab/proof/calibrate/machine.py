"""What it was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pdlab.cost.profile import Machine


def this_machine(threads: int = 0, device: str = "") -> Machine:
    """Where this process runs. `device`: of an accelerator, its name."""
    return Machine(
        cpu=f"{device}, {_cpu()}" if device else _cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        threads=threads,
        system=platform.platform(),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
