"""Measured runs made of simulated ones: the same requests, every latency longer by a known factor."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.results.metrics import summarise
from pdlab.results.records import FIELDS, Records
from pdlab.sim import simulate

TIMES = (
    "dispatched_s",
    "prefill_start_s",
    "first_token_s",
    "handoff_s",
    "transfer_start_s",
    "transfer_end_s",
    "decode_start_s",
    "finish_s",
)


def experiment(policy: str = "least_loaded", **workload: Any) -> Experiment:
    return Experiment.parse(
        {
            "name": "small",
            "model": "llama-3.1-8b",
            "workload": {
                "source": "synthetic",
                "requests": 120,
                "rate": 8,
                "prompt": {"uniform": [100, 3000]},
                "output": {"uniform": [2, 60]},
                **workload,
            },
            "cluster": {"instances": [{"role": "prefill", "count": 2, "hardware": "h100-sxm"}, {"role": "decode", "hardware": "h100-sxm"}]},
            "policy": policy,
        }
    )


def simulated(policy: str = "least_loaded", **workload: Any) -> Result:
    return simulate(experiment(policy, **workload))


def measured(result: Result, factor: float, *, run: dict[str, Any] | None = None, partial: bool = False) -> Result:
    """`result` as if a server had done it, `factor` times slower; it says nothing of its instances' KV."""
    table = np.array(result.records.rows).reshape(-1, len(FIELDS))
    arrival = table[:, FIELDS.index("arrival_s")]
    for name in TIMES:
        column = table[:, FIELDS.index(name)]
        column[:] = arrival + (column - arrival) * factor
    rows = array("d")
    rows.frombytes(np.ascontiguousarray(table).tobytes())
    records = Records(rows, result.records.instances, result.records.reasons)
    summary = summarise(
        records,
        result.gaps,
        result.samples,
        [],
        [],
        slo=result.slo,
        duration_s=result.summary["duration_s"],
        run={**result.summary["run"], "world": "real", "url": "http://x", **(run or {})},
        partial=partial,
    )
    return Result({**summary, "instances": result.summary["instances"]}, records, result.gaps, result.samples, result.experiment)
