"""A run in as many figures as a page can show, however many requests it has: computed once, kept beside its results."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.report.stages import stretches
from pdlab.results.records import FIELDS, Column, Records, Samples, latencies
from pdlab.results.run import REQUESTS, Run

Summary = Mapping[str, Any]
AGGREGATES = "figures.json"
WORST = 50
BINS = 240
MOST_STRETCHES = 300
MOST_LINES = 8  # instances drawn one by one; more are shown as their roles' means
_DIGITS = 7  # after the point: a tenth of a microsecond
_SHARES = np.concatenate([np.linspace(0.0, 0.99, 199, endpoint=False), [0.99, 0.995, 0.999, 1.0]])
_SHOWN = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "transfer_s")
_TOLD = ("request_id", "status", "arrival_s", "prompt_tokens", "output_tokens", "prefill_instance", "decode_instance", "preemptions")


def aggregates(summary: Summary, records: Records, samples: Samples) -> dict[str, Any]:
    """`cdf`: latencies at shares of the requests; `load`: of each instance over time, a mean a bin, of each role where there are many;
    `worst`: the requests furthest from their objectives."""
    derived = latencies(records.columns())
    roles = {use["name"]: use["role"] for use in summary["instances"]}
    return {
        "shares": [round(float(share), 4) for share in _SHARES],
        "cdf": {name: _quantiles(derived[name]) for name in ("ttft_s", "tpot_s", "e2e_s")},
        "load": _load(samples, roles),
        "worst": _worst(summary["slo"], records, derived),
    }


def write_aggregates(run: Run, folder: Path) -> None:
    aside = folder / f".{AGGREGATES}.partial"
    found = aggregates(run.summary, run.records, run.samples)
    aside.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    aside.replace(folder / AGGREGATES)


def timeline(folder: Path, from_s: float, to_s: float | None, limit: int) -> dict[str, Any]:
    """The stages of up to `limit` requests that arrived in a stretch, thinned evenly. Raises UsageError."""
    try:
        table = pq.read_table(folder / REQUESTS)
    except OSError as error:
        raise UsageError(f"its requests cannot be read ({error.strerror or error})") from None
    arrival_s = table["arrival_s"].to_numpy()
    ended_s = np.fmax(table["finish_s"].to_numpy(), arrival_s)
    within = np.flatnonzero((ended_s >= from_s) & (arrival_s <= (math.inf if to_s is None else to_s)))
    within = within[np.argsort(arrival_s[within], kind="stable")]
    count = min(len(within), limit, MOST_STRETCHES)
    some = table.take(within[np.linspace(0, len(within) - 1, count).round().astype(int)] if count else within).to_pandas()
    return {"requests": len(within), **stages(Records.from_frame(some))}


def consecutive(records: Records) -> dict[str, Any]:
    """The stages of MOST_STRETCHES requests that came one after the other, in the middle of the run."""
    order = np.argsort(records.column("arrival_s"), kind="stable")
    first = max(0, (len(order) - MOST_STRETCHES) // 2)
    chosen = order[first : first + MOST_STRETCHES]
    return {"requests": len(records), **stages(_some(records, chosen))}


def stages(records: Records) -> dict[str, Any]:
    """Of every request: where it was from when to when, on which instances, and how it ended."""
    frame = records.frame()
    names = {
        name: [None if value != value else str(value) for value in frame[name].astype(object)]
        for name in ("prefill_instance", "decode_instance", "status")
    }
    found = [
        {"name": one.name, "place": one.place, "start_s": _plain(one.start_s), "end_s": _plain(one.end_s)} for one in stretches(records)
    ]
    return {"request_id": [int(id) for id in frame["request_id"]], "stages": found, **names}


def _quantiles(values: Column) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [_short(value) for value in np.quantile(known, _SHARES)] if len(known) else None


def _load(samples: Samples, roles: Mapping[str, str]) -> dict[str, Any]:
    if not len(samples):
        return {"time_s": [], "instances": {}}
    frame = samples.frame()
    edges = np.linspace(float(frame["t_s"].min()), float(frame["t_s"].max()) + 1e-9, BINS + 1)
    frame["bin"] = np.clip(np.searchsorted(edges, frame["t_s"], side="right") - 1, 0, BINS - 1)
    present = [str(name) for name in frame["instance"].cat.categories if (frame["instance"] == name).any()]
    instances = {}
    for label, names in together(present, roles).items():
        own = frame[frame["instance"].isin(names)]
        means = own.groupby("bin")[["waiting", "running", "kv_use"]].mean().reindex(range(BINS))
        instances[label] = {column: _plain(means[column].to_numpy()) for column in means}
    return {"time_s": [_short(at) for at in edges[:-1]], "instances": instances}


def together(names: Sequence[str], roles: Mapping[str, str]) -> dict[str, list[str]]:
    """Whom a line of a picture stands for: each instance, or where there are many, those of a role. Without roles, one called decode-12
    counts as one of "decode"."""
    if len(names) <= MOST_LINES:
        return {name: [name] for name in names}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(roles.get(name) or name.rsplit("-", 1)[0], []).append(name)
    return {f"{kind}: mean of {len(own)}": own for kind, own in kinds.items()}


def _worst(slo: Mapping[str, float | None], records: Records, derived: dict[str, Column]) -> list[dict[str, Any]]:
    ttft_s, tpot_s = (math.inf if limit is None else limit for limit in (slo["ttft_s"], slo["tpot_s"]))
    columns = records.columns()
    own_ttft = np.where(np.isnan(columns["ttft_slo_s"]), ttft_s, columns["ttft_slo_s"])
    own_tpot = np.where(np.isnan(columns["tpot_slo_s"]), tpot_s, columns["tpot_slo_s"])
    unserved = np.isnan(derived["e2e_s"])
    times = np.fmax(np.nan_to_num(derived["ttft_s"] / own_ttft), np.nan_to_num(derived["tpot_s"] / own_tpot))
    order = np.argsort(np.where(unserved, np.inf, times), kind="stable")[::-1][:WORST]
    frame = _some(records, order).frame((ttft_s, tpot_s))
    found = []
    for k, (_, row) in enumerate(frame.iterrows()):
        told = {name: _value(row[name]) for name in (*_TOLD, *_SHOWN, "reason", "good")}
        place = int(order[k])
        found.append({**told, "times_objective": None if unserved[place] or not math.isfinite(times[place]) else float(times[place])})
    return found


def _some(records: Records, chosen: NDArray[np.int64]) -> Records:
    columns = records.columns()
    rows, first_tokens = array("d"), array("d")
    rows.frombytes(np.column_stack([columns[name][chosen] for name in FIELDS]).tobytes())
    if "first_tokens" in columns:
        first_tokens.frombytes(columns["first_tokens"][chosen].tobytes())
    return Records(rows, records.instances, records.reasons, first_tokens)


def _plain(values: Column) -> list[float | None]:
    return [_short(value) if math.isfinite(value) else None for value in values]


def _short(value: float) -> float:
    return round(float(value), _DIGITS)


def _value(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    return plain
