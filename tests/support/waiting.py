"""Waiting for what comes to pass in another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], within_s: float = 120.0) -> None:
    """Raises AssertionError where it does not come to pass."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not come to pass within {within_s:g} s"
        time.sleep(0.01)
