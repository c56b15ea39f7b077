from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pdlab.core.types import Stage
from pdlab.report.result import Result
from pdlab.results.gaps import Gaps
from pdlab.results.metrics import FIELDS, InstanceUse, LinkUse, Records, Samples, summarise

NAN = float("nan")
SLO = (1.0, 0.05)


def record(records: Records, **figures: float) -> None:
    """A request that arrived at 0, had its first token at 0.5 and its 11th and last at 0.9, but for `figures`."""
    usual: dict[str, float] = dict.fromkeys(FIELDS, NAN) | {
        "request_id": len(records),
        "status": Stage.DONE,
        "arrival_s": 0.0,
        "dispatched_s": 0.0,
        "prefill_start_s": 0.1,
        "first_token_s": 0.5,
        "finish_s": 0.9,
        "prompt_tokens": 100,
        "cached_tokens": 20,
        "output_tokens": 11,
        "transfer_bytes": 0,
        "attempts": 1,
        "preemptions": 0,
        "migrations": 0,
        "priority": 0,
        "n": 1,
    }
    assert figures.keys() <= usual.keys()
    records.rows.extend(float(x) for x in (usual | figures).values())


def use(name: str, role: str, **figures: Any) -> InstanceUse:
    usual: dict[str, Any] = {
        "busy_s": 5.0,
        "prefill_busy_s": 5.0 if role == "prefill" else 0.0,
        "decode_busy_s": 0.0 if role == "prefill" else 5.0,
        "up_s": 10.0,
        "kv_blocks": 100,
        "kv_use_mean": 0.2,
        "kv_use_peak": 0.4,
        "requests": 3,
        "prefill_tokens": 10,
        "decode_tokens": 10,
    }
    return InstanceUse(name=name, role=role, **(usual | figures))


def summary_of(records: Records, **figures: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"slo": SLO, "duration_s": 10.0, "run": {"seed": 7}, "partial": False}
    uses = [use("prefill-0", "prefill"), use("decode-0", "decode", accelerators=3)]
    return summarise(records, Gaps(), Samples(), uses, [], **(usual | figures))


def test_attainment_is_over_all_arrivals() -> None:
    records = Records(reasons=["queue full"])
    record(records)
    record(records, first_token_s=1.01, finish_s=1.1)  # TTFT missed
    record(records, finish_s=1.5)  # TPOT 0.1
    record(records, output_tokens=1, finish_s=0.5)  # one token: TTFT is all there is
    record(records, status=Stage.REJECTED, first_token_s=NAN, finish_s=0.0, output_tokens=0, reason=0)
    record(records, status=Stage.FAILED, finish_s=0.7)
    record(records, status=Stage.DECODE, finish_s=NAN)
    record(records, ttft_slo_s=0.4)  # its own objective is tighter
    record(records, finish_s=1.5, tpot_slo_s=0.2)  # its own is looser
    s = summary_of(records)
    assert (s["requests"], s["completed"], s["failed"], s["rejected"], s["unfinished"]) == (9, 6, 1, 1, 1)
    assert s["slo_attainment"] == pytest.approx(3 / 9)
    assert s["goodput_rps"] == pytest.approx(0.3)
    assert s["goodput_rps_per_accelerator"] == pytest.approx(0.3 / 4)
    assert s["throughput_rps"] == pytest.approx(0.6)
    assert s["reasons"] == {"queue full": 1}
    assert records.frame(SLO)["good"].tolist() == [True, False, False, True, False, False, False, False, True]


def test_latencies_are_those_of_completed_requests() -> None:
    records = Records()
    for k in range(1, 101):
        record(records, first_token_s=0.01 * k, finish_s=0.01 * k + 0.4)
    record(records, status=Stage.EXPIRED, first_token_s=50.0, finish_s=90.0)
    s = summary_of(records)
    wanted = {"mean": 0.505, "std": 0.288661, "p50": 0.505, "p90": 0.901, "p95": 0.9505, "p99": 0.9901, "max": 1.0}
    assert s["ttft_s"] == pytest.approx(wanted, rel=1e-5)
    assert s["tpot_s"]["mean"] == pytest.approx(0.04)
    assert s["e2e_s"]["max"] == pytest.approx(1.4)
    assert s["queue_s"]["p50"] == pytest.approx(0.1)
    assert s["prefix_hit_rate"] == pytest.approx(0.2)


def test_tpot_of_several_sequences_is_per_sequence() -> None:
    records = Records()
    record(records, n=4, output_tokens=44)
    assert summary_of(records)["tpot_s"]["mean"] == pytest.approx(0.04)


def test_summary_is_plain_json_even_of_nothing() -> None:
    s = summary_of(Records(), slo=(math.inf, math.inf), duration_s=0.0, run={"seed": np.int64(3), "cpu_s": np.float64("nan")})
    text = json.dumps(s, allow_nan=False)
    assert json.loads(text)["ttft_s"] == dict.fromkeys(("mean", "std", "p50", "p90", "p95", "p99", "max"))
    assert s["slo"] == {"ttft_s": None, "tpot_s": None}
    assert s["run"] == {"seed": 3, "cpu_s": None}
    assert s["slo_attainment"] is None
    assert s["bottleneck"]["resource"] == "none"


def test_summary_holds_what_the_design_promises() -> None:
    records = Records()
    record(records, transfer_start_s=0.5, transfer_end_s=0.6)
    link = LinkUse(name="net", bytes=5e9, capacity_bytes_per_s=1e10, busy_fraction=0.1, utilisation=0.05, peak_flows=2)
    s = summarise(records, Gaps(), Samples(), [use("decode-0", "decode")], [link], slo=SLO, duration_s=10.0, run={}, leaked_blocks=0)
    promised = (
        "requests completed failed rejected duration_s ttft_s tpot_s itl_s e2e_s transfer_s slo_attainment goodput_rps throughput_rps"
    )
    promised += " output_tokens_per_s prefix_hit_rate leaked_blocks instances links bottleneck run"
    assert set(promised.split()) <= s.keys()
    assert s["transfer_s"]["mean"] == pytest.approx(0.1)
    assert s["instances"][0]["busy_fraction"] == 0.5
    assert s["links"][0]["utilisation"] == 0.05


def test_roles_are_weighted_by_time_up() -> None:
    records = Records()
    record(records)
    uses = [use("d0", "decode", busy_s=10.0), use("d1", "decode", busy_s=0.0, up_s=30.0, kv_use_mean=0.6, kv_use_peak=0.9)]
    role = summarise(records, Gaps(), Samples(), uses, [], slo=SLO, duration_s=30.0, run={})["roles"]["decode"]
    assert role["busy_fraction"] == pytest.approx(0.25)
    assert role["kv_use_mean"] == pytest.approx(0.5)
    assert role["kv_use_peak"] == 0.9
    assert role["requests"] == 6


def test_frame_has_names_types_and_round_trips() -> None:
    records = Records(instances=["prefill-0", "decode-0"], reasons=["gone"])
    record(records, prefill_instance=0, decode_instance=1)
    record(records, status=Stage.FAILED, prefill_instance=0, reason=0, finish_s=NAN)
    frame = records.frame()
    assert frame["status"].tolist() == ["done", "failed"]
    assert frame["prefill_instance"].tolist() == ["prefill-0"] * 2
    assert frame["decode_instance"].isna().tolist() == [False, True]
    assert frame["reason"].iloc[1] == "gone"
    assert frame["output_tokens"].dtype == np.int64
    assert frame["ttft_s"].iloc[0] == pytest.approx(0.5)
    back = Records.from_frame(frame)
    assert (back.instances, back.reasons) == (records.instances, records.reasons)
    np.testing.assert_array_equal(np.array(back.rows), np.array(records.rows))
    record(records)  # no view is left behind that would lock the rows
    assert len(records) == 3


def test_samples_round_trip() -> None:
    samples = Samples(instances=["a", "b"])
    samples.rows.extend((0.5, 1, 2, 300, 4, 500, 60, 120))
    frame = samples.frame()
    assert frame["instance"].tolist() == ["b"]
    assert frame["kv_use"].tolist() == [0.5]
    assert Samples.from_frame(frame).rows == samples.rows
    assert len(Samples().frame()) == 0


def test_itl_comes_from_the_gaps(made_run: Callable[..., Result]) -> None:
    result = made_run(100)
    assert result.summary["itl_s"]["max"] == result.gaps.max
    assert result.gaps.count == result.requests["output_tokens"].sum() - 100


def test_importing_metrics_loads_neither_pandas_nor_matplotlib() -> None:
    heavy = "('pandas', 'matplotlib', 'pyarrow', 'rich')"
    code = f"import sys, pdlab.results.metrics, pdlab.report.result; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
