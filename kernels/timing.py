"""What the benchmarks share: a quiet stopwatch and a row of results."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_s(step: Callable[[], object], *, budget_s: float = 0.6, device: str = "cpu") -> float:
    """Seconds of the quickest of as many runs as fit in `budget_s` (3 at least), after one to warm up."""
    cuda = device == "cuda"
    best, spent, runs = float("inf"), 0.0, -1
    while spent < budget_s or runs < 3:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        runs += 1
        if runs > 0:
            best, spent = min(best, took), spent + took
    return best


def row(name: str, seconds: float, *columns: str) -> None:
    print(f"{name:<58}{seconds * 1e3:10.3f} ms  " + "  ".join(f"{column:>18}" for column in columns), flush=True)
