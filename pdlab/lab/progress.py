"""What is told of a job while it runs: how much of it is done, and of an experiment its latencies so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pdlab.results.records import Column, Records, latencies

News = Mapping[str, Any]
EACH_S = 0.5
_SHARE = 0.05  # of the time that telling may take
_POINTS = 200  # of a history


class LiveProgress:
    """For `simulate`: `watch` is given the records, `at` is told how far it is."""

    def __init__(self, tell: Callable[[News], None]) -> None:
        self.tell = tell
        self.records: Records | None = None
        self.next_s = 0.0
        self.history: list[dict[str, float | None]] = []
        self.step, self.skipped = 1, 0

    def watch(self, records: Records) -> None:
        self.records = records

    def at(self, simulated_s: float, ended: int, requests: int) -> None:
        began_s = time.monotonic()
        if began_s < self.next_s:
            return
        figures = self._figures()
        self._keep({"done": ended, "simulated_s": simulated_s, **figures})
        self.tell({"done": ended, "total": requests, "simulated_s": simulated_s, "figures": figures, "history": self.history})
        took_s = time.monotonic() - began_s
        self.next_s = began_s + max(EACH_S, took_s / _SHARE)

    def _figures(self) -> dict[str, float | None]:
        assert self.records is not None, "watched before it runs"
        found = {name: column.copy() for name, column in self.records.columns().items()}  # a view would keep the records from growing
        derived = latencies(found)
        return {f"{name}_{point}_s": value for name in ("ttft", "tpot") for point, value in _points(derived[f"{name}_s"]).items()}

    def _keep(self, row: dict[str, float | None]) -> None:
        """Every `step`th, which doubles whenever there are too many."""
        self.skipped += 1
        if self.skipped < self.step:
            return
        self.skipped = 0
        self.history.append(row)
        if len(self.history) > _POINTS:
            self.history = self.history[::2]
            self.step *= 2


def _points(values: Column) -> dict[str, float | None]:
    known = values[np.isfinite(values)]
    if not len(known):
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(known, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}


class CountedProgress:
    """For what is many runs: how many have ended."""

    def __init__(self, tell: Callable[[News], None], total: int, phase: str = "") -> None:
        self.tell, self.total, self.phase = tell, total, phase
        self.done = 0

    def ended(self) -> None:
        self.done += 1
        self.at(self.done, self.total)

    def at(self, done: int, total: int) -> None:
        self.tell({"done": done, "total": total, "phase": self.phase})
