"""What a world writes down of a run: flat columns of numbers, cheap to append to and bounded in memory. `pdlab.results.timeline` says what
each time means, and writes the rows.

One row a request (`Records`), one row an instance and report (`Samples`), and what each instance and link did in all. Simulated
and live runs write the same; everything the reports say is derived from these and `pdlab.results.gaps`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Stage

if TYPE_CHECKING:
    import pandas as pd

Column = NDArray[np.float64]

Span = tuple[str | int, float, float, str, int, int]  # instance (its name or index), start_s, end_s, kind, sequences, tokens

FIELDS: tuple[str, ...] = (
    "request_id",
    "status",  # a types.Stage
    "arrival_s",
    "dispatched_s",
    "prefill_start_s",
    "first_token_s",
    "handoff_s",
    "transfer_start_s",
    "transfer_end_s",
    "decode_start_s",
    "finish_s",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",  # that the client received, of all its n sequences
    "prefill_instance",  # index into Records.instances
    "decode_instance",
    "transfer_bytes",
    "attempts",
    "preemptions",
    "migrations",
    "priority",
    "ttft_slo_s",  # nan: the experiment's
    "tpot_slo_s",
    "n",
    "reason",  # index into Records.reasons
)
SAMPLE_FIELDS: tuple[str, ...] = (
    "t_s",
    "instance",
    "waiting",
    "waiting_tokens",
    "running",
    "context_tokens",
    "used_blocks",
    "kv_blocks",
)
_COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "transfer_bytes", "attempts", "preemptions", "migrations", "priority", "n")


class Records:
    """One row a request, in the order they ended. `rows` is flat: the figures of `FIELDS`, request after request; nan is a time that
    never came, an instance never chosen, no reason. `first_tokens`: how many tokens came together at `first_token_s`, a figure
    a request; empty: one each, as wherever a token comes when it is made."""

    __slots__ = ("first_tokens", "instances", "reasons", "rows")

    def __init__(
        self,
        rows: array[float] | None = None,
        instances: Sequence[str] = (),
        reasons: Sequence[str] = (),
        first_tokens: array[float] | None = None,
    ) -> None:
        self.rows: array[float] = array("d") if rows is None else rows
        self.first_tokens: array[float] = array("d") if first_tokens is None else first_tokens
        self.instances: list[str] = list(instances)
        self.reasons: list[str] = list(reasons)

    def __len__(self) -> int:
        return len(self.rows) // len(FIELDS)

    def column(self, name: str) -> Column:
        """A copy of one column."""
        return self.columns()[name].copy()

    def columns(self, part: slice = slice(None)) -> dict[str, Column]:
        """Every column as a view into `rows`, which cannot grow while one is held."""
        table = np.frombuffer(self.rows, np.float64).reshape(-1, len(FIELDS)) if self.rows else np.empty((0, len(FIELDS)))
        found = {name: table[part, k] for k, name in enumerate(FIELDS)}
        if self.first_tokens:
            found["first_tokens"] = np.frombuffer(self.first_tokens, np.float64)[part]
        return found

    def frame(self, slo: tuple[float, float] = (math.inf, math.inf), part: slice = slice(None)) -> pd.DataFrame:
        """One row a request: `FIELDS` with names in place of indices, and ttft_s, tpot_s, e2e_s, transfer_s, queue_s, good.

        `slo` is the experiment's (ttft_s, tpot_s), for requests that bring none of their own; `part` leaves rows out.
        """
        import pandas as pd

        columns = self.columns(part)
        derived = latencies(columns)
        found: dict[str, Any] = {name: column.copy() for name, column in columns.items()}
        found["request_id"] = found["request_id"].astype(np.int64)
        stages = [stage.name.lower() for stage in Stage]
        found["status"] = pd.Categorical.from_codes(found["status"].astype(np.int8), categories=pd.Index(stages, dtype="str"))
        for name, names in (("prefill_instance", self.instances), ("decode_instance", self.instances), ("reason", self.reasons)):
            found[name] = pd.Categorical.from_codes(name_codes(found[name], len(names)), categories=pd.Index(names, dtype="str"))
        for name in (*_COUNTS, *(["first_tokens"] if self.first_tokens else [])):
            found[name] = np.nan_to_num(found[name]).astype(np.int64)
        return pd.DataFrame({**found, **derived, "good": met_both(columns, derived, slo)}, copy=False)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Records:
        """The Records that `frame()` came from. Raises KeyError where a column is missing."""
        stage = {s.name.lower(): float(s) for s in Stage}
        instances = [str(x) for x in frame["prefill_instance"].cat.categories]
        reasons = [str(x) for x in frame["reason"].cat.categories]
        table = np.empty((len(frame), len(FIELDS)))
        for k, name in enumerate(FIELDS):
            if name == "status":
                table[:, k] = [stage[str(s)] for s in frame[name]]
            elif name in ("prefill_instance", "decode_instance", "reason"):
                codes = frame[name].cat.codes.to_numpy().astype(np.float64)
                table[:, k] = np.where(codes < 0, np.nan, codes)
            else:
                table[:, k] = frame[name].to_numpy()
        rows = array("d")
        rows.frombytes(table.tobytes())
        first_tokens = array("d", frame["first_tokens"]) if "first_tokens" in frame else None
        return cls(rows, instances, reasons, first_tokens)


class Samples:
    """The instances' load over time, one row a report: the figures of `SAMPLE_FIELDS`, flat in `rows`."""

    __slots__ = ("instances", "rows")

    def __init__(self, rows: array[float] | None = None, instances: Sequence[str] = ()) -> None:
        self.rows: array[float] = array("d") if rows is None else rows
        self.instances: list[str] = list(instances)

    def __len__(self) -> int:
        return len(self.rows) // len(SAMPLE_FIELDS)

    def column(self, name: str) -> Column:
        """A copy of one column."""
        k = SAMPLE_FIELDS.index(name)
        return np.array(self.rows[k :: len(SAMPLE_FIELDS)])

    @property
    def any_load(self) -> bool:
        """Was there ever any? Some servers report none, whatever they do: a router's own engine is idle."""
        return any(self.column(name).any() for name in ("waiting", "running", "used_blocks"))

    def frame(self, instances: Sequence[str] = ()) -> pd.DataFrame:
        """One row an instance and report: `SAMPLE_FIELDS` with names (its own, or `instances`), and kv_use between 0 and 1."""
        import pandas as pd

        names = self.instances or list(instances)
        found: dict[str, Any] = {name: self.column(name) for name in SAMPLE_FIELDS}
        kv_use = np.divide(found["used_blocks"], found["kv_blocks"], out=np.zeros(len(self)), where=found["kv_blocks"] > 0)
        codes = name_codes(found["instance"], len(names))
        found["instance"] = pd.Categorical.from_codes(codes, categories=pd.Index(names, dtype="str"))
        for name in SAMPLE_FIELDS[2:]:
            found[name] = found[name].astype(np.int64)
        return pd.DataFrame({**found, "kv_use": kv_use}, copy=False)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Samples:
        """The Samples that `frame()` came from."""
        codes = frame["instance"].cat.codes
        table = np.column_stack([(codes if name == "instance" else frame[name]).to_numpy(np.float64) for name in SAMPLE_FIELDS])
        rows = array("d")
        rows.frombytes(np.ascontiguousarray(table).tobytes())
        return cls(rows, [str(x) for x in frame["instance"].cat.categories])


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceUse:
    """What one instance did in a run. `busy_s` counts time once where a batch does both phases; `compute_bound_fraction` is the
    share of its decode time in which arithmetic, not memory bandwidth, set the pace; `max_seqs` bounds the sequences that it decodes
    together (None: not known). `decode_profile` has decode steps as its cost model times them: (batch, context tokens in all, seconds)."""

    name: str
    role: str
    busy_s: float
    prefill_busy_s: float
    decode_busy_s: float
    up_s: float
    kv_blocks: int
    kv_use_mean: float
    kv_use_peak: float
    requests: int
    prefill_tokens: int
    decode_tokens: int
    preemptions: int = 0
    compute_bound_fraction: float = 0.0
    hardware: str = ""
    accelerators: int = 1
    max_seqs: int | None = None
    decode_profile: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """What one link carried. `busy_fraction` is the share of the run with anything in transit, `utilisation` is bytes over
    capacity x time."""

    name: str
    bytes: float
    capacity_bytes_per_s: float
    busy_fraction: float
    utilisation: float
    peak_flows: int = 0


def latencies(found: Mapping[str, Column]) -> dict[str, Column]:
    tokens = found["output_tokens"] / np.maximum(found["n"], 1)
    later = tokens - found.get("first_tokens", np.ones(1))
    several = np.where(later >= 1, later, np.nan)
    return {
        "ttft_s": found["first_token_s"] - found["arrival_s"],
        "tpot_s": (found["finish_s"] - found["first_token_s"]) / several,
        "e2e_s": np.where(found["status"] == Stage.DONE, found["finish_s"] - found["arrival_s"], np.nan),
        "transfer_s": found["transfer_end_s"] - found["transfer_start_s"],
        "queue_s": found["prefill_start_s"] - found["arrival_s"],
    }


def met_ttft(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    own = found["ttft_slo_s"]
    met: NDArray[np.bool_] = (found["status"] == Stage.DONE) & (derived["ttft_s"] <= np.where(np.isnan(own), slo[0], own))
    return met


def met_tpot(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    own = found["tpot_slo_s"]
    short = np.isnan(derived["tpot_s"])
    met: NDArray[np.bool_] = (found["status"] == Stage.DONE) & (short | (derived["tpot_s"] <= np.where(np.isnan(own), slo[1], own)))
    return met


def met_both(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    return met_ttft(found, derived, slo) & met_tpot(found, derived, slo)


def name_codes(column: Column, known: int) -> NDArray[np.int64]:
    """Categorical codes of a column of indices: -1 for nan and for what has no name."""
    codes = np.nan_to_num(column, nan=-1.0).astype(np.int64)
    return np.where(codes < known, codes, -1)
