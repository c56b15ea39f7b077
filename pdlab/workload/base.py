"""A workload: requests as columns, so that a million of them are a few arrays.

Hashes name prefixes: a unit of `hash_tokens` tokens of a request's context is an integer that stands for everything from the first token
to the unit's end, so two requests share a prefix exactly as far as their chains agree. Only full units have one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.workload.chains import Chains

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Shorts = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Workload:
    """`n` requests in order of arrival.

    arrival_s      [n] seconds from 0, ascending; for a request with `after` >= 0 the think time after that one has ended
    prompt_tokens  [n], output_tokens [n]: at least 1 each
    hashes         [n] chains over prompt and output (so a chain may be longer than the prompt's); None: nothing is shared
    priority, ttft_slo_s, tpot_slo_s (nan: the experiment's), n, best_of: [n] or None
    session, tenant [n] numbers of what requests belong to (-1: nothing), or None; offline [n] 1 for those in no hurry, else 0, or None
    after          [n] index of the request that must end first, -1 none; after[i] < i
    concurrency    closed loop: that many at once, and arrival_s is not looked at
    reading        how the file it comes from was understood, in one line
    """

    name: str
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    hashes: Sequence[tuple[int, ...]] | None = None
    hash_tokens: int = 16
    priority: Shorts | None = None
    ttft_slo_s: Floats | None = None
    tpot_slo_s: Floats | None = None
    n: Shorts | None = None
    best_of: Shorts | None = None
    session: Ints | None = None
    tenant: Ints | None = None
    offline: Shorts | None = None
    after: Ints | None = None
    concurrency: int | None = None
    dropped: int = 0
    notes: tuple[str, ...] = ()
    reading: str = ""

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        for name in ("prompt_tokens", "output_tokens", "hashes", *_COLUMNS):
            column = getattr(self, name)
            if column is not None and len(column) != count:
                raise UsageError(f"workload {self.name}: {name} has {len(column)} rows, arrival_s {count}")
        if not count:
            raise UsageError(f"workload {self.name} has no requests")
        for name in ("prompt_tokens", "output_tokens"):
            column = getattr(self, name)
            if column.min() < 1:
                row = int(column.argmin())
                raise UsageError(f"workload {self.name}: {name} of request {row} is {column[row]}; every request needs at least 1")
        opening = self.opening_s
        if not np.all(np.isfinite(self.arrival_s)) or np.any(np.diff(opening) < 0) or self.arrival_s.min() < 0:
            raise UsageError(f"workload {self.name}: arrival_s must ascend from 0")
        if self.after is not None and np.any(self.after >= np.arange(count)):
            raise UsageError(f"workload {self.name}: a request can only come after an earlier one")
        if self.after is not None and self.concurrency is not None:
            raise UsageError(
                f"workload {self.name}: in a closed loop (concurrency) requests come one after another anyway; leave out after"
            )

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        """Requests per second over the span of the arrivals; nan where it has none."""
        opening = self.opening_s
        span = float(opening[-1] - opening[0])
        return (len(self) - 1) / span if span > 0 and self.concurrency is None else float("nan")

    def prompt_hashes(self, i: int) -> tuple[int, ...]:
        """The chain of request `i`'s full prompt units."""
        return () if self.hashes is None else self.hashes[i][: int(self.prompt_tokens[i]) // self.hash_tokens]

    def sessions(self) -> list[int] | None:
        """[n] number of each request's session, -1 for none: as the workload says, else the first of the turns it comes after. None: there
        are no sessions."""
        if self.session is not None or self.after is None:
            return None if self.session is None else self.session.tolist()
        first: list[int] = []
        for row, earlier in enumerate(self.after.tolist()):
            first.append(row if earlier < 0 else first[earlier])
        return first

    def labels(self, row: int, sessions: list[int] | None) -> dict[str, Any]:
        """The fields of a Request that say what it belongs to; `sessions` as above."""
        found: dict[str, Any] = {}
        if sessions is not None and sessions[row] >= 0:
            found["session"] = str(sessions[row])
        if self.tenant is not None and self.tenant[row] >= 0:
            found["tenant"] = str(self.tenant[row])
        if self.offline is not None and self.offline[row]:
            found["offline"] = True
        return found

    def head(self, count: int) -> Workload:
        """The first `count` requests."""
        columns = {name: column[:count] for name in _ALL if (column := getattr(self, name)) is not None}
        return dataclasses.replace(self, **columns)

    def where(self, keep: NDArray[np.bool_]) -> Workload:
        """The requests that `keep`, [n], marks. A turn goes with the one it comes after."""
        if self.after is not None:
            keep = keep.copy()
            for row in np.flatnonzero(self.after >= 0).tolist():
                keep[row] &= keep[self.after[row]]
        rows = np.flatnonzero(keep)
        columns: dict[str, Any] = {}
        for name in _ALL:
            column = getattr(self, name)
            if column is not None and name != "hashes":
                columns[name] = column[rows]
        if self.hashes is not None:
            kept = rows.tolist()
            columns["hashes"] = self.hashes.take(kept) if isinstance(self.hashes, Chains) else [self.hashes[row] for row in kept]
        if self.after is not None:
            place = np.full(len(self) + 1, -1, np.int32)  # the last one is where -1 leads
            place[rows] = np.arange(len(rows))
            columns["after"] = place[self.after[rows]]
        return dataclasses.replace(self, **columns)

    def without(self, drop: NDArray[np.bool_], reason: str) -> Workload:
        """The others than those that `drop`, [n], marks; these, and the turns that come after them, count as dropped."""
        kept = self.where(~drop)
        lost = len(self) - len(kept)
        return dataclasses.replace(kept, dropped=self.dropped + lost, notes=(*self.notes, f"{lost} dropped: {reason}"))

    def until(self, duration_s: float) -> Workload:
        """What arrives before `duration_s`, with all turns that follow."""
        opens = np.ones(len(self), bool) if self.after is None else self.after < 0
        return self.where(~opens | (self.arrival_s < duration_s))

    def part(self, low: float, high: float) -> Workload:
        """From the share `low` to the share `high` of the requests that come after no other, in order, with all turns that follow them.
        The first of them arrives at 0. Raises UsageError where there are none."""
        opens = np.ones(len(self), bool) if self.after is None else self.after < 0
        rows = np.flatnonzero(opens)
        first, end = round(low * len(rows)), round(high * len(rows))
        if first >= end:
            raise UsageError(
                f"workload {self.name}: its {len(rows):,} requests are too few for a part between {100 * low:.0f} % and {100 * high:.0f} %"
            )
        keep = ~opens
        keep[rows[first:end]] = True
        made = self.where(keep)
        opens = np.ones(len(made), bool) if made.after is None else made.after < 0
        arrival_s = np.where(opens, made.arrival_s - self.arrival_s[rows[first]], made.arrival_s)
        return dataclasses.replace(made, arrival_s=arrival_s)

    @property
    def opening_s(self) -> Floats:
        """[k] arrival times of the requests that come after no other."""
        return self.arrival_s if self.after is None else self.arrival_s[self.after < 0]

    def rescaled(self, rate_rps: float) -> Workload:
        """The same at another mean rate: every gap, and so every burst, is stretched alike. Think times stay; one request has no gap.

        Raises UsageError."""
        if len(self.opening_s) == 1:
            return self
        if not self.rate_rps > 0:
            raise UsageError(f"workload {self.name} cannot be stretched to a rate: it has no times (closed loop, or all requests at once)")
        factor = self.rate_rps / rate_rps
        arrival_s = self.arrival_s * factor
        if self.after is not None:
            arrival_s = np.where(self.after < 0, arrival_s, self.arrival_s)
        return dataclasses.replace(self, arrival_s=arrival_s)


_COLUMNS = ("priority", "ttft_slo_s", "tpot_slo_s", "n", "best_of", "session", "tenant", "offline", "after")
_ALL = ("arrival_s", "prompt_tokens", "output_tokens", "hashes", *_COLUMNS)
