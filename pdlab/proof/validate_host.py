"""What a virtual machine's host did to the cores during a run, and the same done to its simulation: an instance is slow while its core is.

The probe that tells of the cores (`pdlab.real.host.core_probe`) knows nothing of engines and requests, and by how much steps take longer on
a slower core is measured while calibrating. So nothing is fitted to what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pdlab.cost.profile import CoreSpeed
from pdlab.real.host.core_probe import Pace

BIN_S = 0.25
SPEEDS = 50  # that are told apart, from none to full


def of_engines(engines: int, cores: Sequence[int]) -> Sequence[int]:
    """The core of each, as `processes.pin` gives them out; none where there are more engines than cores."""
    return cores[:engines] if engines <= len(cores) else []


def seen(pace: Pace, cores: Sequence[int], began_s: float, seconds: float) -> list[list[float]]:
    """For each core, the loop's mean CPU time in each `BIN_S` of a run. Empty where nothing was seen."""
    spans = [(began_s + number * BIN_S, began_s + (number + 1) * BIN_S) for number in range(int(seconds / BIN_S) + 1)]
    found = [list(pace.mean_s([core], spans)) for core in cores]
    return found if all(found) else []


def faults(loops: Sequence[Sequence[float]], instances: Sequence[str], unsteady: CoreSpeed) -> list[dict[str, Any]]:
    """As an experiment's `faults`: when each instance computed at what share of its speed. `loops`: those of each one's core. Which kind of
    step ran is not known, so a core is slow where the loop takes longer than beside either of them."""
    found = []
    for name, loop_s in zip(instances, loops, strict=False):
        slower = [min(unsteady.slower(took_s, prefill=prefill) for prefill in (True, False)) for took_s in loop_s]
        speeds = [tuple(round(SPEEDS / unsteady.longer(r, prefill=prefill)) for prefill in (True, False)) for r in slower]
        for (prefill, decode), bins in groupby(range(len(speeds)), key=speeds.__getitem__):
            held = list(bins)
            if min(prefill, decode) < SPEEDS:
                speed = {"factor": prefill / SPEEDS, "decode_factor": decode / SPEEDS}
                found.append({"at_s": held[0] * BIN_S, "slow": name, **speed, "for_s": len(held) * BIN_S})
    return found
