"""Requests as they are read from a file: columns that grow, each row checked when it is added.

So reading stops at the first mistake, which names its line, and at the number of requests asked for.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdlab.core.types import UsageError
from pdlab.workload import mooncake
from pdlab.workload.chains import Chains
from pdlab.workload.columns import LABELS
from pdlab.workload.hash_unit import HashUnit
from pdlab.workload.text import TextFile
from pdlab.workload.times import CENTURY_S

_INT32_MAX = 2**31 - 1
_NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class Optional:
    """An optional column: what an empty cell means, and what it may hold."""

    default: float
    least: float
    most: float
    dtype: type[np.generic]


OPTIONAL = {
    "priority": Optional(0, -(2**15), 2**15 - 1, np.int16),
    "ttft_slo_s": Optional(math.nan, 0.0, math.inf, np.float64),
    "tpot_slo_s": Optional(math.nan, 0.0, math.inf, np.float64),
    "n": Optional(1, 1, 2**15 - 1, np.int16),
    "best_of": Optional(1, 1, 2**15 - 1, np.int16),
    "session": Optional(-1, -1, _INT32_MAX, np.int32),
    "tenant": Optional(-1, -1, _INT32_MAX, np.int32),
    "offline": Optional(0, 0, 1, np.int16),
    "after": Optional(-1, -1, 2**31 - 1, np.int32),
}
assert {*LABELS, "after"} == set(OPTIONAL)


class RequestRows:
    """The rows so far.

    `names`: what the file calls the columns, by role, for messages. `limit`: the number of requests after which `full` is true; `steps`:
    but not before the last one's step of 3 s is whole and there is evidence of whose steps they are (see `mooncake`). A row of zero
    tokens is dropped and counted, or where `strict`, a mistake. `ordered`: a row can't come before the last one.
    """

    def __init__(
        self,
        file: TextFile,
        names: Mapping[str, str],
        limit: int | None,
        *,
        strict: bool = False,
        ordered: bool = True,
        steps: bool = False,
        unit: HashUnit | None = None,
    ) -> None:
        self.arrival_s, self.prompt_tokens, self.output_tokens = array("d"), array("i"), array("i")
        self.hashes = Chains()
        self.unit = unit
        self.dropped = 0
        self._after = array("i")
        self._file, self._names = file, names
        self._limit = math.inf if limit is None else limit
        self._steps, self._ordered = steps, ordered
        self._last_s = 0.0
        self._least = 1 if strict else 0
        self._labels: dict[str, list[float]] = {}
        self._sessions: dict[object, tuple[int, float]] = {}  # the last row that counts, and seconds from its end (-1: from 0) on

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def full(self) -> bool:
        count = len(self.arrival_s)
        if count < self._limit:
            return False
        if not self._steps:
            return True
        last_wanted_s = self.arrival_s[int(self._limit) - 1]
        return count >= mooncake.EVIDENCE_ROWS and round(self.arrival_s[-1] / mooncake.STEP_S) > round(last_wanted_s / mooncake.STEP_S)

    def labels(self, name: str) -> None:
        """There is an optional column, one of `OPTIONAL`."""
        self._labels.setdefault(name, [OPTIONAL[name].default] * len(self))

    def add(
        self, arrival_s: float, prompt_tokens: int, output_tokens: int, ids: tuple[int, ...] = (), labels: Mapping[str, float] = _NOTHING
    ) -> bool:
        """Whether the row counts: it does not if it has no prompt or no output. `labels` has what the row says of optional columns."""
        after = int(labels.get("after", -1))
        least_s = 0.0 if after >= 0 else self._last_s if self._ordered else -math.inf  # dates count from the first row's
        if not least_s <= arrival_s < CENTURY_S:
            raise self._bad_time(arrival_s, self._ordered and after < 0)
        if not (self._least <= prompt_tokens <= _INT32_MAX and self._least <= output_tokens <= _INT32_MAX):
            raise self._bad_length(prompt_tokens, output_tokens)
        if self.unit is not None:
            self.unit.see(prompt_tokens, len(ids))
            if self.unit.stated is not None:
                ids = ids[: prompt_tokens // self.unit.stated]
        if after < 0:
            self._last_s = arrival_s
        if not prompt_tokens or not output_tokens:
            self.dropped += 1
            return False
        if labels or self._labels:
            self._add_labels(labels)
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        self.hashes.append(ids)
        return True

    def add_turn(
        self,
        session: object,
        time_s: float | None,
        delay_s: float | None,
        prompt_tokens: int,
        output_tokens: int,
        ids: tuple[int, ...] = (),
        labels: Mapping[str, float] = _NOTHING,
    ) -> bool:
        """A row of a session: its first turn comes at a time; a later one with a delay so long after the answer before, whatever its time.
        A turn that is dropped passes its delay on to the next."""
        if delay_s is not None and not 0.0 <= delay_s < math.inf:
            raise self._file.wrong(f"{delay_s:g} s is not a delay", self._names["delay_s"])
        earlier, wait_s = self._sessions.get(session, (-1, None))
        if delay_s is None or wait_s is None:
            if time_s is None:
                what = "a first turn needs a time" if wait_s is None else "a turn needs a time or a delay"
                raise self._file.wrong(f"is missing; {what}, or workload.arrival draws them", self._names["arrival_s"])
            earlier, wait_s = -1, time_s + (delay_s or 0.0)
        else:
            wait_s += delay_s
        counts = self.add(wait_s, prompt_tokens, output_tokens, ids, {**labels, "after": earlier} if earlier >= 0 else labels)
        self._sessions[session] = (len(self) - 1, 0.0) if counts else (earlier, wait_s)
        return counts

    def _add_labels(self, labels: Mapping[str, float]) -> None:
        for name in labels:
            self.labels(name)
        for name, kept in self._labels.items():
            column = OPTIONAL[name]
            value = labels.get(name, column.default)
            if not (column.least <= value <= column.most or (math.isnan(column.default) and math.isnan(value))):
                raise self._file.wrong(f"{value:g} is not between {column.least:g} and {column.most:g}", self._names.get(name, name))
            kept.append(value)
        if labels.get("after", -1) >= len(self):
            raise self._file.wrong(f"{labels['after']} is not an earlier row; this one is {len(self)}, counted from 0", "after")

    def _bad_time(self, arrival_s: float, ordered: bool) -> UsageError:
        name = self._names.get("arrival_s") or self._names["gap_s"]
        if not math.isfinite(arrival_s):
            return self._file.wrong(f"{arrival_s} is not a time", name)
        if arrival_s >= CENTURY_S:
            return self._file.wrong(f"{arrival_s:g} s is more than a hundred years", name)
        if ordered and arrival_s < self._last_s and len(self):
            return self._file.wrong(f"{self._last_s - arrival_s:g} s before the row above; sort the file by {name}", name)
        return self._file.wrong(f"{arrival_s:g} s is negative", name)

    def _bad_length(self, prompt_tokens: int, output_tokens: int) -> UsageError:
        lengths = ((prompt_tokens, self._names["prompt_tokens"]), (output_tokens, self._names["output_tokens"]))
        for tokens, name in lengths:
            if tokens < self._least:
                return self._file.wrong(f"{tokens} tokens; must be at least {self._least}", name)
        tokens, name = max(lengths)
        return self._file.wrong(f"{tokens} tokens; must be at most {_INT32_MAX}", name)

    # ------------------------------------------------------------ at the end

    def fields(self, *, shares: bool) -> dict[str, Any]:
        """The Workload's fields, in order of arrival; `hashes` where the file `shares` prefixes."""
        fields: dict[str, Any] = {
            "arrival_s": np.array(self.arrival_s, np.float64),
            "prompt_tokens": np.array(self.prompt_tokens, np.int32),
            "output_tokens": np.array(self.output_tokens, np.int32),
            "dropped": self.dropped,
        }
        fields |= {name: np.array(values, OPTIONAL[name].dtype) for name, values in self._labels.items()}
        if shares:
            fields["hashes"] = self.hashes
        return fields


def by_arrival(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns with the rows in order of arrival, if they are not; a session's turns then go with its first."""
    starts_s, after = fields["arrival_s"], fields.get("after")
    if np.all(np.diff(starts_s if after is None else starts_s[after < 0]) >= 0):
        return fields
    if after is not None:
        starts_s = starts_s.copy()
        for row in np.flatnonzero(after >= 0).tolist():
            starts_s[row] = starts_s[after[row]]
    order = np.argsort(starts_s, kind="stable")
    moved = {name: column[order] for name, column in fields.items() if isinstance(column, np.ndarray)}
    if after is not None:
        place = np.full(len(after) + 1, -1, np.int32)  # the last one is where -1 leads
        place[order] = np.arange(len(order))
        moved["after"] = place[after[order]]
    if "hashes" in fields:
        moved["hashes"] = fields["hashes"].take(order.tolist())
    return {**fields, **moved}
