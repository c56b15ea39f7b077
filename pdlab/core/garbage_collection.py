"""Python's garbage collector, in processes whose requests leave no cycles behind: looking for some costs a tenth of their time, and each
look through everything holds all requests up for tens of milliseconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_EVERY = 100_000  # objects more than there were; Python's own is 700


@contextmanager
def seldom() -> Iterator[None]:
    """What there is at the beginning is not looked at again; the rest, seldom."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(LOOK_EVERY, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
