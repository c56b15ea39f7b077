"""From what a world wrote down to the figures people compare.

A world, simulated or live, keeps three flat columns of numbers: `Records` (one row a request), `Samples` (one row an instance
and report) and `Gaps` (inter-token latencies, counted). `summarise` makes summary.json of them. Every metric is defined once,
in `DEFINITIONS`, and the reports print that text beside the figures.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pdlab.bottleneck import Demand, find_bottleneck
from pdlab.gaps import Gaps
from pdlab.types import Role, Stage

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DEFINITIONS", "FIELDS", "SAMPLE_FIELDS", "Gaps", "InstanceUse", "LinkUse", "Records", "Samples", "summarise"]

Column = NDArray[np.float64]

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
DEFINITIONS: dict[str, str] = {
    "TTFT": "arrival to first token at the client, completed requests",
    "TPOT": "(last - first token) / (output tokens - 1), completed requests with 2 or more",
    "ITL": "gap between consecutive tokens of a sequence, all gaps pooled",
    "E2E": "arrival to last token, completed requests",
    "transfer": "first to last byte of the KV cache from prefill to decode",
    "queue": "arrival to start of prefill",
    "SLO attainment": "share of all arrivals that met their TTFT and TPOT objectives; failed, rejected and unfinished ones count as misses",
    "goodput": "requests that met both objectives, per second of the run",
    "busy": "share of the time it was up that an instance computed; of a link, that something was in transit",
}
_COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "transfer_bytes", "attempts", "preemptions", "migrations", "priority", "n")


class Records:
    """One row a request, in the order they ended. `rows` is flat: the figures of `FIELDS`, request after request; nan is a time that
    never came, an instance never chosen, no reason."""

    __slots__ = ("instances", "reasons", "rows")

    def __init__(self, rows: array[float] | None = None, instances: Sequence[str] = (), reasons: Sequence[str] = ()) -> None:
        self.rows: array[float] = array("d") if rows is None else rows
        self.instances: list[str] = list(instances)
        self.reasons: list[str] = list(reasons)

    def __len__(self) -> int:
        return len(self.rows) // len(FIELDS)

    def column(self, name: str) -> Column:
        """A copy of one column (a view would lock `rows` against growing)."""
        k = FIELDS.index(name)
        return np.frombuffer(self.rows, np.float64)[k :: len(FIELDS)].copy() if self.rows else np.empty(0)

    def frame(self, slo: tuple[float, float] = (math.inf, math.inf)) -> pd.DataFrame:
        """One row a request: `FIELDS` with names in place of indices, and ttft_s, tpot_s, e2e_s, transfer_s, queue_s, good.

        `slo` is the experiment's (ttft_s, tpot_s), for requests that bring none of their own.
        """
        import pandas as pd

        found: dict[str, Any] = {name: self.column(name) for name in FIELDS}
        derived = _latencies(found)
        good = _good(found, derived, slo)
        status = [stage.name.lower() for stage in Stage]
        found["request_id"] = found["request_id"].astype(np.int64)
        found["status"] = pd.Categorical.from_codes(found["status"].astype(np.int8), categories=status)
        for name, names in (("prefill_instance", self.instances), ("decode_instance", self.instances), ("reason", self.reasons)):
            found[name] = pd.Categorical.from_codes(_codes(found[name], len(names)), categories=pd.Index(names, dtype="str"))
        for name in _COUNTS:
            found[name] = np.nan_to_num(found[name]).astype(np.int64)
        return pd.DataFrame({**found, **derived, "good": good}, copy=False)

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
        return cls(rows, instances, reasons)


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
        return np.frombuffer(self.rows, np.float64)[k :: len(SAMPLE_FIELDS)].copy() if self.rows else np.empty(0)

    def frame(self, instances: Sequence[str] = ()) -> pd.DataFrame:
        """One row an instance and report: `SAMPLE_FIELDS` with names (its own, or `instances`), and kv_use between 0 and 1."""
        import pandas as pd

        names = self.instances or list(instances)
        found: dict[str, Any] = {name: self.column(name) for name in SAMPLE_FIELDS}
        kv_use = np.divide(found["used_blocks"], found["kv_blocks"], out=np.zeros(len(self)), where=found["kv_blocks"] > 0)
        codes = _codes(found["instance"], len(names))
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
    share of its decode time in which arithmetic, not memory bandwidth, set the pace."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """What one link carried. `busy_fraction` is the share of the run with anything in transit, `utilisation` is bytes over capacity x time."""

    name: str
    bytes: float
    capacity_bytes_per_s: float
    busy_fraction: float
    utilisation: float
    peak_flows: int = 0


def summarise(
    records: Records,
    gaps: Gaps,
    samples: Samples,
    instances: Sequence[InstanceUse],
    links: Sequence[LinkUse],
    *,
    slo: tuple[float, float],
    duration_s: float,
    run: Mapping[str, Any],
    partial: bool = False,
    leaked_blocks: int = 0,
    warnings: Iterable[str] = (),
) -> dict[str, Any]:
    """The content of summary.json, as plain JSON values: null stands for what does not exist (a percentile of nothing).

    `slo` is the experiment's (ttft_s, tpot_s), inf where there is none; `run` is passed through (seed, version, cpu_s, ...).
    """
    found = {name: records.column(name) for name in FIELDS}
    derived = _latencies(found)
    good = _good(found, derived, slo)
    status = found["status"]
    done = status == Stage.DONE
    ended_badly = (status == Stage.ABORTED) | (status == Stage.EXPIRED) | (status == Stage.FAILED)
    rejected = status == Stage.REJECTED
    prefilled = ~np.isnan(found["first_token_s"])
    seconds = duration_s if duration_s > 0 else math.nan
    accelerators = sum(use.accelerators for use in instances)
    output_tokens = float(np.nansum(found["output_tokens"]))
    goodput = float(good.sum()) / seconds
    demand = Demand(found, derived, good, slo, duration_s)
    summary: dict[str, Any] = {
        "requests": len(records),
        "completed": int(done.sum()),
        "failed": int(ended_badly.sum()),
        "rejected": int(rejected.sum()),
        "unfinished": int((status < Stage.DONE).sum()),
        "partial": partial,
        "duration_s": duration_s,
        "slo": {"ttft_s": slo[0], "tpot_s": slo[1]},
        "ttft_s": _spread(derived["ttft_s"][done]),
        "tpot_s": _spread(derived["tpot_s"][done]),
        "itl_s": {
            "mean": gaps.mean,
            "p50": gaps.quantile(0.5),
            "p90": gaps.quantile(0.9),
            "p99": gaps.quantile(0.99),
            "max": gaps.max,
        },
        "e2e_s": _spread(derived["e2e_s"][done]),
        "transfer_s": _spread(derived["transfer_s"]),
        "queue_s": _spread(derived["queue_s"]),
        "slo_attainment": _share(good),
        "ttft_attainment": _share(_met_ttft(found, derived, slo)),
        "tpot_attainment": _share(_met_tpot(found, derived, slo)),
        "goodput_rps": goodput,
        "goodput_rps_per_accelerator": goodput / accelerators if accelerators else math.nan,
        "throughput_rps": float(done.sum()) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "output_tokens_per_s_per_accelerator": output_tokens / seconds / accelerators if accelerators else math.nan,
        "prompt_tokens": int(np.nansum(found["prompt_tokens"])),
        "output_tokens": int(output_tokens),
        "prefix_hit_rate": _ratio(np.nansum(found["cached_tokens"][prefilled]), np.nansum(found["prompt_tokens"][prefilled])),
        "transfer_bytes": int(np.nansum(found["transfer_bytes"])),
        "retries": int(np.nansum(np.maximum(found["attempts"] - 1, 0))),
        "preemptions": int(np.nansum(found["preemptions"])),
        "migrations": int(np.nansum(found["migrations"])),
        "leaked_blocks": leaked_blocks,
        "reasons": _reasons(records),
        "accelerators": accelerators,
        "instances": [_instance(use) for use in instances],
        "roles": _roles(instances),
        "links": [_link(link) for link in links],
        "bottleneck": find_bottleneck(demand, samples, instances, links),
        "warnings": list(warnings),
        "run": dict(run),
    }
    clean: dict[str, Any] = _clean(summary)
    return clean


def _latencies(found: Mapping[str, Column]) -> dict[str, Column]:
    tokens = found["output_tokens"] / np.maximum(found["n"], 1)
    several = np.where(tokens >= 2, tokens - 1, np.nan)
    return {
        "ttft_s": found["first_token_s"] - found["arrival_s"],
        "tpot_s": (found["finish_s"] - found["first_token_s"]) / several,
        "e2e_s": np.where(found["status"] == Stage.DONE, found["finish_s"] - found["arrival_s"], np.nan),
        "transfer_s": found["transfer_end_s"] - found["transfer_start_s"],
        "queue_s": found["prefill_start_s"] - found["arrival_s"],
    }


def _met_ttft(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    own = found["ttft_slo_s"]
    met: NDArray[np.bool_] = (found["status"] == Stage.DONE) & (derived["ttft_s"] <= np.where(np.isnan(own), slo[0], own))
    return met


def _met_tpot(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    own = found["tpot_slo_s"]
    short = np.isnan(derived["tpot_s"])
    met: NDArray[np.bool_] = (found["status"] == Stage.DONE) & (short | (derived["tpot_s"] <= np.where(np.isnan(own), slo[1], own)))
    return met


def _good(found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> NDArray[np.bool_]:
    return _met_ttft(found, derived, slo) & _met_tpot(found, derived, slo)


def _spread(values: Column) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if not values.size:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), math.nan)
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(values.max())}


def _share(met: NDArray[np.bool_]) -> float:
    return float(met.mean()) if met.size else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _reasons(records: Records) -> dict[str, int]:
    codes = _codes(records.column("reason"), len(records.reasons))
    return {records.reasons[k]: times for k, times in Counter(codes[codes >= 0].tolist()).most_common()}


def _instance(use: InstanceUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "role": str(use.role),
        "hardware": use.hardware,
        "accelerators": use.accelerators,
        "busy_fraction": _ratio(use.busy_s, use.up_s),
        "prefill_busy_fraction": _ratio(use.prefill_busy_s, use.up_s),
        "decode_busy_fraction": _ratio(use.decode_busy_s, use.up_s),
        "up_s": use.up_s,
        "kv_blocks": use.kv_blocks,
        "kv_use_mean": use.kv_use_mean,
        "kv_use_peak": use.kv_use_peak,
        "requests": use.requests,
        "prefill_tokens": use.prefill_tokens,
        "decode_tokens": use.decode_tokens,
        "preemptions": use.preemptions,
        "compute_bound_fraction": use.compute_bound_fraction,
    }


def _roles(instances: Sequence[InstanceUse]) -> dict[str, dict[str, Any]]:
    """The same figures for each role together: fractions are means weighted by time up, KV use by blocks and time up."""
    roles: dict[str, dict[str, Any]] = {}
    for role in Role:
        uses = [use for use in instances if use.role == role]
        if not uses:
            continue
        up = sum(use.up_s for use in uses)
        roles[str(role)] = {
            "instances": len(uses),
            "accelerators": sum(use.accelerators for use in uses),
            "busy_fraction": _ratio(sum(use.busy_s for use in uses), up),
            "kv_use_mean": _ratio(sum(u.kv_use_mean * u.kv_blocks * u.up_s for u in uses), sum(u.kv_blocks * u.up_s for u in uses)),
            "kv_use_peak": max(use.kv_use_peak for use in uses),
            "requests": sum(use.requests for use in uses),
            "prefill_tokens": sum(use.prefill_tokens for use in uses),
            "decode_tokens": sum(use.decode_tokens for use in uses),
            "preemptions": sum(use.preemptions for use in uses),
        }
    return roles


def _link(link: LinkUse) -> dict[str, Any]:
    return {
        "name": link.name,
        "bytes": link.bytes,
        "capacity_bytes_per_s": link.capacity_bytes_per_s,
        "busy_fraction": link.busy_fraction,
        "utilisation": link.utilisation,
        "peak_flows": link.peak_flows,
    }


def _codes(column: Column, known: int) -> NDArray[np.int64]:
    """Categorical codes of a column of indices: -1 for nan and for what has no name."""
    codes = np.nan_to_num(column, nan=-1.0).astype(np.int64)
    return np.where(codes < known, codes, -1)


def _clean(value: Any) -> Any:
    """JSON has no nan and no infinity, and knows no numpy."""
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
