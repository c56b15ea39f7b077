"""From what a world wrote down to the figures people compare: `summarise` makes summary.json of records, gaps and samples.

Every metric is defined once, in `DEFINITIONS`, and the reports print that text beside the figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Role, Stage
from pdlab.results.bottleneck import find_bottleneck
from pdlab.results.gaps import Gaps
from pdlab.results.records import (
    FIELDS,
    SAMPLE_FIELDS,
    Column,
    InstanceUse,
    LinkUse,
    Records,
    Samples,
    latencies,
    met_both,
    met_tpot,
    met_ttft,
    name_codes,
)
from pdlab.results.window import after_warm_up, arrival_window

__all__ = ["DEFINITIONS", "FIELDS", "SAMPLE_FIELDS", "Gaps", "InstanceUse", "LinkUse", "Records", "Samples", "summarise"]

Scalar = bool | int | float | str | None
_NOT_FIGURES = ("reasons", "instances", "links", "warnings")  # lists, and what has other keys in every run
PERCENTILES = (50, 90, 95, 99)
SPREADS = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("E2E", "e2e_s"), ("transfer", "transfer_s"), ("queue", "queue_s"))
DEFINITIONS: dict[str, str] = {
    "TTFT": "arrival to first token at the client, completed requests",
    "TPOT": "(last - first token) / (output tokens - 1), completed requests with 2 or more; "
    "where several come in a chunk, the first chunk's count in place of 1",
    "ITL": "gap between consecutive tokens of a sequence, all gaps pooled",
    "E2E": "arrival to last token, completed requests",
    "transfer": "first to last byte of the KV cache from prefill to decode",
    "queue": "arrival to start of prefill",
    "SLO attainment": "share of all arrivals that met their TTFT and TPOT objectives; failed, rejected and unfinished ones count as misses",
    "goodput": "requests that met both objectives, per second of the arrival window: attainment times the rate of arrivals",
    "throughput": "completed requests (or tokens) per second of the arrival window; of an overloaded run, until its queue is gone",
    "arrival window": "first arrival to last; where all came at once, the run",
    "overloaded": "the queue grew to the end of the arrivals (Mann-Kendall's test, 1 %): attainment depends on the run's length",
    "warm-up": "requests at the begin that count in no figure but ITL, chosen by MSER-5 on TTFT; --no-trim counts them",
    "busy": "share of the time it was up that an instance computed; of a link, that something was in transit",
}


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
    trim: bool = False,
) -> dict[str, Any]:
    """The content of summary.json, as plain JSON values: null stands for what does not exist (a percentile of nothing).

    `slo` is the experiment's (ttft_s, tpot_s), inf where there is none; `run` is passed through (seed, version, cpu_s, ...). With `trim`
    latencies, attainment and rates leave the warm-up out; counts never do.
    """
    found = records.columns()
    status = found["status"]
    prefilled = ~np.isnan(found["first_token_s"])
    ended_badly = (status == Stage.ABORTED) | (status == Stage.EXPIRED) | (status == Stage.FAILED)
    accelerators = sum(use.accelerators for use in instances)
    summary: dict[str, Any] = {
        "requests": len(records),
        "completed": int((status == Stage.DONE).sum()),
        "failed": int(ended_badly.sum()),
        "rejected": int((status == Stage.REJECTED).sum()),
        "unfinished": int((status < Stage.DONE).sum()),
        "partial": partial,
        "overloaded": False,
        "duration_s": duration_s,
        "slo": {"ttft_s": slo[0], "tpot_s": slo[1]},
        **_windowed(found, gaps, slo, accelerators, duration_s, trim),
        "prompt_tokens": int(np.nansum(found["prompt_tokens"])),
        "output_tokens": int(np.nansum(found["output_tokens"])),
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
        "bottleneck": find_bottleneck(records, samples, instances, links, slo=slo, duration_s=duration_s, policy=run.get("policy")),
        "warnings": list(warnings),
        "run": dict(run),
    }
    clean: dict[str, Any] = _clean(summary)
    return clean


def flat_figures(summary: Mapping[str, Any]) -> dict[str, Scalar]:
    """The single figures of a summary, by their paths."""
    flat: dict[str, Scalar] = {}
    for key, value in summary.items():
        if key in _NOT_FIGURES:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{path}": figure for path, figure in flat_figures(value).items()}
        elif not isinstance(value, list):
            flat[key] = value
    return flat


def untrimmed(summary: Mapping[str, Any], records: Records, gaps: Gaps) -> dict[str, Any]:
    """The summary with the warm-up counted."""
    limits = (summary["slo"]["ttft_s"], summary["slo"]["tpot_s"])
    slo = (math.inf if limits[0] is None else limits[0], math.inf if limits[1] is None else limits[1])
    windowed = _windowed(records.columns(), gaps, slo, summary["accelerators"], summary["duration_s"], trim=False)
    return {**summary, **_clean(windowed)}


def _windowed(
    found: Mapping[str, Column], gaps: Gaps, slo: tuple[float, float], accelerators: int, duration_s: float, trim: bool
) -> dict[str, Any]:
    """What is counted over the arrival window, and with `trim` without the warm-up."""
    window = arrival_window(found, trim=trim, duration_s=duration_s)
    counted = after_warm_up(found, window)
    kept = {name: column[counted] for name, column in found.items()}
    derived = latencies(kept)
    done = kept["status"] == Stage.DONE
    good = met_both(kept, derived, slo)
    every = good if isinstance(counted, slice) else met_both(found, latencies(found), slo)
    goodput = _share(good) * window.offered_rps
    tokens_per_s = _ratio(float(np.nansum(kept["output_tokens"])), good.size) * window.served_rps
    return {
        "overloaded": window.overloaded,
        "window": {
            "start_s": window.start_s,
            "end_s": window.end_s,
            "offered_rps": window.offered_rps,
            "served_rps": window.served_rps,
            "warm_up_requests": window.warm_up,
            "warm_up_s": window.warm_up_s,
            "slo_attainment_untrimmed": _share(every),
        },
        "ttft_s": _spread(derived["ttft_s"][done]),
        "tpot_s": _spread(derived["tpot_s"][done]),
        "itl_s": {
            "mean": gaps.mean,
            "std": gaps.std,
            **{f"p{point}": gaps.quantile(point / 100) for point in PERCENTILES},
            "max": gaps.max,
        },
        "e2e_s": _spread(derived["e2e_s"][done]),
        "transfer_s": _spread(derived["transfer_s"]),
        "queue_s": _spread(derived["queue_s"]),
        "slo_attainment": _share(good),
        "ttft_attainment": _share(met_ttft(kept, derived, slo)),
        "tpot_attainment": _share(met_tpot(kept, derived, slo)),
        "goodput_rps": goodput,
        "goodput_rps_per_accelerator": goodput / accelerators if accelerators else math.nan,
        "throughput_rps": _share(done) * window.served_rps,
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_accelerator": tokens_per_s / accelerators if accelerators else math.nan,
    }


def _spread(values: Column) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if not values.size:
        return dict.fromkeys(("mean", "std", *(f"p{point}" for point in PERCENTILES), "max"), math.nan)
    points = np.quantile(values, [point / 100 for point in PERCENTILES])
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        **{f"p{point}": float(value) for point, value in zip(PERCENTILES, points, strict=True)},
        "max": float(values.max()),
    }


def _share(met: NDArray[np.bool_]) -> float:
    return float(met.mean()) if met.size else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _reasons(records: Records) -> dict[str, int]:
    codes = name_codes(records.column("reason"), len(records.reasons))
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
