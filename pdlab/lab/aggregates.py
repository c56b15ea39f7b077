"""A run in as many figures as a page can show, however many requests it has: computed once, kept beside its results."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.report.stages import stretches
from pdlab.results.records import FIELDS, Column, Records, Samples, latencies
from pdlab.results.run import REQUESTS, Run

AGGREGATES = "figures.json"
WORST = 50
BINS = 240
MOST_STRETCHES = 300
_SHARES = np.concatenate([np.linspace(0.0, 0.99, 199, endpoint=False), [0.99, 0.995, 0.999, 1.0]])
_SHOWN = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "transfer_s")
_TOLD = ("request_id", "status", "arrival_s", "prompt_tokens", "output_tokens", "prefill_instance", "decode_instance", "preemptions")


def aggregates(run: Run) -> dict[str, Any]:
    """`cdf`: latencies at shares of the requests; `load`: of each instance over time, a mean a bin; `worst`: the requests furthest from
    their objectives."""
    derived = latencies(run.records.columns())
    return {
        "shares": [round(float(share), 4) for share in _SHARES],
        "cdf": {name: _quantiles(derived[name]) for name in ("ttft_s", "tpot_s", "e2e_s")},
        "load": _load(run.samples),
        "worst": _worst(run, derived),
    }


def write_aggregates(run: Run, folder: Path) -> None:
    aside = folder / f".{AGGREGATES}.partial"
    aside.write_text(json.dumps(aggregates(run), allow_nan=False), encoding="utf-8")
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
    found = stretches(Records.from_frame(some))
    stages = [{"name": one.name, "place": one.place, "start_s": _plain(one.start_s), "end_s": _plain(one.end_s)} for one in found]
    requests = {
        name: [None if value != value else str(value) for value in some[name].astype(object)]
        for name in ("prefill_instance", "decode_instance", "status")
    }
    return {"requests": len(within), "request_id": [int(id) for id in some["request_id"]], "stages": stages, **requests}


def _quantiles(values: Column) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [float(value) for value in np.quantile(known, _SHARES)] if len(known) else None


def _load(samples: Samples) -> dict[str, Any]:
    if not len(samples):
        return {"time_s": [], "instances": {}}
    frame = samples.frame()
    edges = np.linspace(float(frame["t_s"].min()), float(frame["t_s"].max()) + 1e-9, BINS + 1)
    frame["bin"] = np.clip(np.searchsorted(edges, frame["t_s"], side="right") - 1, 0, BINS - 1)
    instances = {}
    for name, own in frame.groupby("instance", observed=True):
        means = own.groupby("bin")[["waiting", "running", "kv_use"]].mean().reindex(range(BINS))
        instances[str(name)] = {column: _plain(means[column].to_numpy()) for column in means}
    return {"time_s": [float(at) for at in edges[:-1]], "instances": instances}


def _worst(run: Run, derived: dict[str, Column]) -> list[dict[str, Any]]:
    ttft_s, tpot_s = run.slo
    columns = run.records.columns()
    own_ttft = np.where(np.isnan(columns["ttft_slo_s"]), ttft_s, columns["ttft_slo_s"])
    own_tpot = np.where(np.isnan(columns["tpot_slo_s"]), tpot_s, columns["tpot_slo_s"])
    unserved = np.isnan(derived["e2e_s"])
    times = np.fmax(np.nan_to_num(derived["ttft_s"] / own_ttft), np.nan_to_num(derived["tpot_s"] / own_tpot))
    order = np.argsort(np.where(unserved, np.inf, times), kind="stable")[::-1][:WORST]
    frame = Records(_rows(run.records, order), run.records.instances, run.records.reasons).frame(run.slo)
    found = []
    for k, (_, row) in enumerate(frame.iterrows()):
        told = {name: _value(row[name]) for name in (*_TOLD, *_SHOWN, "reason", "good")}
        place = int(order[k])
        found.append({**told, "times_objective": None if unserved[place] or not math.isfinite(times[place]) else float(times[place])})
    return found


def _rows(records: Records, order: NDArray[np.int64]) -> array[float]:
    columns = records.columns()
    table = np.column_stack([columns[name] for name in FIELDS])
    picked = array("d")
    picked.frombytes(np.ascontiguousarray(table[order]).tobytes())
    return picked


def _plain(values: Column) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _value(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    return plain
