"""Inter-token latencies of a whole run, in a bounded space.

A run makes hundreds of millions of gaps, so they are counted in a histogram of geometrically growing bins: count, sum, smallest and
largest are exact, a quantile is off by less than half a percent. Inside a macro-step the gaps grow linearly with the context, so a
whole macro-step is one row, buffered and spread over the bins in bulk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOW_S = 1e-7  # everything below falls into bin 0
_GROWTH = 1.005
_BINS = 5800  # up to 3.6e5 s
_LOG_GROWTH = float(np.log(_GROWTH))
_BUFFER = 4 * 16384  # four figures a row
_SLICE = 1 << 20  # bins touched at once while spreading


class Gaps:
    """Pooled inter-token latencies: `add` what was seen, ask for `count`, `mean`, `std`, `min`, `max`, `quantile`."""

    __slots__ = ("_buffer", "_count", "_counts", "_max", "_min", "_squares", "_sum")

    def __init__(self) -> None:
        self._buffer: list[float] = []
        self._counts = np.zeros(_BINS)
        self._count = 0.0
        self._sum = 0.0
        self._squares = 0.0
        self._min = float("inf")
        self._max = 0.0

    def add(self, gap_s: float, count: int = 1) -> None:
        """Take in one gap that `count` sequences saw."""
        self.add_run(count, gap_s, 0.0, 1)

    def add_run(self, count: int, first_s: float, slope_s: float, steps: int) -> None:
        """Take in `steps` consecutive gaps, `first_s`, `first_s + slope_s`, ..., each seen by `count` sequences."""
        buffer = self._buffer
        buffer.extend((count, first_s, slope_s, steps))
        if len(buffer) >= _BUFFER:
            self._flush()

    @property
    def count(self) -> int:
        self._flush()
        return round(self._count)

    @property
    def sum_s(self) -> float:
        self._flush()
        return self._sum

    @property
    def mean(self) -> float:
        """Seconds; nan where no gap was seen. So are `min`, `max` and `quantile`."""
        self._flush()
        return self._sum / self._count if self._count else float("nan")

    @property
    def std(self) -> float:
        """Seconds, of all gaps as the population."""
        self._flush()
        if not self._count:
            return float("nan")
        return math.sqrt(max(self._squares / self._count - (self._sum / self._count) ** 2, 0.0))

    @property
    def min(self) -> float:
        self._flush()
        return self._min if self._count else float("nan")

    @property
    def max(self) -> float:
        self._flush()
        return self._max if self._count else float("nan")

    def quantile(self, q: float) -> float:
        """The gap in seconds that a share `q` of all gaps does not exceed, within 0.5 %."""
        self._flush()
        if not self._count:
            return float("nan")
        cumulative = np.cumsum(self._counts)
        rank = q * cumulative[-1]
        k = min(int(np.searchsorted(cumulative, rank)), _BINS - 1)
        inside = (rank - (cumulative[k] - self._counts[k])) / self._counts[k] if self._counts[k] else 0.5
        return float(np.clip(_LOW_S * _GROWTH ** (k + inside), self._min, self._max))

    def histogram(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(lower edges in seconds, counts) of the bins that hold anything; bin k ends at 1.005 times its lower edge."""
        self._flush()
        held = np.nonzero(self._counts)[0]
        edges: NDArray[np.float64] = _LOW_S * _GROWTH ** held.astype(np.float64)
        return edges, self._counts[held]

    def state(self) -> dict[str, Any]:
        """Everything as JSON-able values, for `restore`."""
        self._flush()
        held = np.nonzero(self._counts)[0]
        return {
            "bins": held.tolist(),
            "counts": self._counts[held].tolist(),
            "sum_s": self._sum,
            "squares_s2": self._squares,
            "min_s": self._min if self._count else None,
            "max_s": self._max,
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Gaps:
        """The Gaps that `state()` described."""
        gaps = cls()
        gaps._counts[state["bins"]] = state["counts"]
        gaps._count = float(gaps._counts.sum())
        gaps._sum = state["sum_s"]
        middle = _LOW_S * _GROWTH ** (np.arange(_BINS) + 0.5)  # what was stored before had no squares
        gaps._squares = state["squares_s2"] if "squares_s2" in state else float((gaps._counts * middle**2).sum())
        gaps._min = float("inf") if state["min_s"] is None else state["min_s"]
        gaps._max = state["max_s"]
        return gaps

    def _flush(self) -> None:
        if not self._buffer:
            return
        count, first, slope, steps = np.array(self._buffer, dtype=np.float64).reshape(-1, 4).T
        self._buffer.clear()
        last = first + slope * (steps - 1)
        self._count += float((count * steps).sum())
        self._sum += float((count * steps * (first + last) / 2).sum())
        squares = steps * first * last + slope**2 * steps * (steps - 1) * (2 * steps - 1) / 6  # of a run, around n f (f + (n - 1) s)
        self._squares += float((count * squares).sum())
        low, high = np.minimum(first, last), np.maximum(first, last)
        self._min = min(self._min, float(low.min()))
        self._max = max(self._max, float(high.max()))
        from_bin, to_bin = _bin(low), _bin(high)
        one = from_bin == to_bin
        self._counts += np.bincount(from_bin[one], (count * steps)[one], _BINS)
        many = np.nonzero(~one)[0]
        if many.size:
            self._spread(count[many], low[many], np.abs(slope[many]), steps[many], from_bin[many], to_bin[many])

    def _spread(
        self,
        count: NDArray[np.float64],
        low: NDArray[np.float64],
        slope: NDArray[np.float64],
        steps: NDArray[np.float64],
        from_bin: NDArray[np.int64],
        to_bin: NDArray[np.int64],
    ) -> None:
        """Share runs out over the bins they cross: of low, low + slope, ... those below an edge are counted, not listed."""
        width = to_bin - from_bin + 1
        cuts = np.concatenate(([0], np.cumsum(width)))
        start = 0
        while start < len(width):
            stop = max(start + 1, int(np.searchsorted(cuts, cuts[start] + _SLICE, side="right")) - 1)
            run = np.repeat(np.arange(start, stop), width[start:stop])
            place = np.arange(run.size) - (cuts[run] - cuts[start])  # 0, 1, ... within each run
            bins = from_bin[run] + place
            edge = _LOW_S * _GROWTH ** (bins + 1.0)
            below = np.clip(np.ceil((edge - low[run]) / slope[run]), 0, steps[run])
            below[np.cumsum(width[start:stop]) - 1] = steps[start:stop]
            inside = np.diff(below, prepend=0.0)
            inside[place == 0] = below[place == 0]
            self._counts += np.bincount(bins, inside * count[run], _BINS)
            start = stop


def _bin(gap_s: NDArray[np.float64]) -> NDArray[np.int64]:
    k = np.floor(np.log(np.maximum(gap_s, _LOW_S) / _LOW_S) / _LOG_GROWTH)
    return np.clip(k, 0, _BINS - 1).astype(np.int64)
