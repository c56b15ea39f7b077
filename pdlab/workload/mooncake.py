"""What is true of Mooncake's published traces, and of no other file in their form: requests are written down in steps of 3 s.

A file is one of them by evidence: many rows, each at a multiple of 3 s, several in a step, as many more or fewer as chance gives, steps
without long gaps between, and an id for each 512 tokens or begun 512. Their arrivals are then spread within the steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEP_S = 3.0
EVIDENCE_ROWS = 500  # read to tell, if the file has so many
NOTE = "Mooncake's published trace, whose times are in steps of 3 s: arrivals are spread within the steps"
_JITTER_S = 0.01
_LEAST_ROWS, _LEAST_STEPS = 200, 20


def in_steps(times_s: Floats) -> bool:
    """Whether arrivals, [n] from 0, are as Mooncake publishes them."""
    steps = np.round(times_s / STEP_S)
    if len(times_s) < _LEAST_ROWS or np.any(np.abs(times_s - steps * STEP_S) > _JITTER_S):
        return False
    occupied, counts = np.unique(steps, return_counts=True)
    span = int(occupied[-1] - occupied[0]) + 1
    return len(occupied) >= _LEAST_STEPS and 2 * len(occupied) >= span and counts.mean() >= 2 and bool(np.ptp(counts))


def spread(times_s: Floats) -> Floats:
    """[n] requests of one step at places drawn uniformly within it, in the order of the file: what a Poisson process looks like once the
    number in each step is known. The draws are the same for every reading, and a file's head gets those of the whole."""
    steps = np.round(times_s / STEP_S)
    _, counts = np.unique(steps, return_counts=True)
    rng = np.random.default_rng(0)
    places: Floats = steps + np.concatenate([np.zeros(0), *(np.sort(rng.random(count)) for count in counts)])
    return places * STEP_S
