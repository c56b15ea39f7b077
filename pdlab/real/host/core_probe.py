"""How fast each core is, from moment to moment. A virtual machine's cores are threads of somebody's processor: while another guest computes
on the sibling thread, all that runs here takes a fifth to a third longer, and nothing in the guest says so, no steal and no load.

A small process on each core looks a hundred times a second how much CPU time the same short loop takes. The loop needs no memory, and has
just run, so that the engine's data in the caches do not show, only the core itself does; and its variables are a function's, since what a
dictionary takes differs by a tenth from one process to the next. That costs the core 0.5 %, and an engine on it 1.5 to 2 %, by what it
throws out of the caches (10 times on and off by turns, steps of 130 million weights); in calibrations and in runs alike.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdlab.cost.profile import CoreSpeed
from pdlab.real.host.processes import BESIDE

PERIOD_S = 0.01
LOOK = struct.Struct("=dd")  # monotonic seconds, CPU seconds of the loop
LOOKS = """
import os, struct, sys, time
parent, core, period_s = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[5])
clock_ns = time.thread_time_ns


def look():
    for _ in range(1000):
        pass
    clock_ns()
    began_ns = clock_ns()
    for _ in range(2000):
        pass
    return clock_ns() - began_ns


os.sched_setaffinity(0, {core})
with open(sys.argv[4], "wb", buffering=0) as file:
    while os.getppid() == parent:
        time.sleep(period_s)
        file.write(struct.pack("=dd", time.monotonic(), look() * 1e-9))
"""


@dataclass(frozen=True, slots=True)
class Pace:
    """What was seen so far, in a file for each core."""

    files: dict[int, Path]

    def mean_s(self, cores: Sequence[int], spans: Sequence[tuple[float, float]]) -> tuple[float, ...]:
        """For each span of monotonic seconds, the mean of the looks on `cores` in it; of the one next to it where none fell into it. Empty
        where nothing was seen."""
        rows = np.concatenate([self._looks(core) for core in cores])
        if not rows.size:
            return ()
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        sums = np.concatenate([[0.0], np.cumsum(rows[:, 1])])
        first, last = (np.searchsorted(rows[:, 0], ends) for ends in zip(*spans, strict=True))
        first = np.minimum(first, len(rows) - 1)
        last = np.maximum(last, first + 1)
        return tuple(float(mean_s) for mean_s in (sums[last] - sums[first]) / (last - first))

    def _looks(self, core: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """(looks, 2): monotonic seconds, CPU seconds of the loop."""
        known = self.files[core].read_bytes()
        return np.frombuffer(known[: len(known) // LOOK.size * LOOK.size], dtype=np.float64).reshape(-1, 2)


# In a span of monotonic seconds, beside steps with prompts or not: by what the loop takes longer than undisturbed; 1 at least.
Slower = Callable[[float, float, bool], float]

STEADY = CoreSpeed()


def never(began_s: float, ended_s: float, prefill: bool) -> float:
    """A `Slower` where nobody looks."""
    return 1.0


def slower_on(pace: Pace | None, cores: Sequence[int], unsteady: CoreSpeed) -> Slower:
    """The loop on `cores`, against what it takes undisturbed."""

    def slower(began_s: float, ended_s: float, prefill: bool) -> float:
        looks = pace.mean_s(cores, [(began_s, ended_s)]) if pace is not None else ()
        return unsteady.slower(looks[0], prefill=prefill) if looks else 1.0

    return slower


@contextmanager
def watched(cores: Sequence[int]) -> Iterator[Pace]:
    """Looks at `cores` meanwhile. Raises OSError where a core is not this process's."""
    with tempfile.TemporaryDirectory(prefix="pdlab-pace-") as folder:
        files = {core: Path(folder, str(core)) for core in cores}
        for file in files.values():
            file.touch()
        command = [sys.executable, "-S", "-c", LOOKS, BESIDE.decode(), str(os.getpid())]
        looking = [subprocess.Popen([*command, str(core), str(file), str(PERIOD_S)], process_group=0) for core, file in files.items()]
        try:
            yield Pace(files)
        finally:
            for process in looking:
                process.kill()
            for process in looking:
                process.wait()
