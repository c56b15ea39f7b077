"""Figures of workloads whose figures are known: small ones by hand, Poisson by theory, the published ones by others' computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab.workload.base import Workload
from pdlab.workload.readers import load
from pdlab.workload.stats import correlation, ranks, stats, unit_hits

TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"


def workload(times: Any, prompt: Any = 100, output: Any = 10, **others: Any) -> Workload:
    arrival_s = np.asarray(times, np.float64)
    lengths = [np.broadcast_to(np.asarray(tokens, np.int32), len(arrival_s)) for tokens in (prompt, output)]
    return Workload("made", arrival_s, *lengths, **others)


def test_a_steady_stream_has_no_dispersion_and_a_poisson_stream_has_one() -> None:
    steady = stats(workload(np.arange(1200) / 10 + 0.05))["arrivals"]
    assert steady["interarrival_cv"] == pytest.approx(0, abs=1e-9)
    assert (steady["dispersion_1s"], steady["dispersion_10s"]) == pytest.approx((0, 0), abs=0.02)
    assert (steady["rate_rps"], steady["peak_minute_rps"]) == pytest.approx((10, 10), rel=0.01)
    poisson = stats(workload(np.cumsum(np.random.default_rng(3).exponential(0.1, 40_000))))["arrivals"]
    assert (poisson["interarrival_cv"], poisson["dispersion_1s"]) == pytest.approx((1, 1), rel=0.05)
    assert poisson["dispersion_10s"] == pytest.approx(1, rel=0.2)


def test_empty_bins_count() -> None:
    found = stats(workload([0.0, 0.1, 0.2, 0.3, 3.5]))["arrivals"]
    counts = np.array([4, 0, 0, 1])
    assert found["dispersion_1s"] == pytest.approx(counts.var() / counts.mean())
    assert (found["dispersion_10s"], found["peak_minute_rps"]) == (None, None)


def test_closed_loop_has_no_arrivals_and_follow_ups_are_not_arrivals() -> None:
    assert stats(workload([0.0] * 5, concurrency=2))["arrivals"] is None
    chat = stats(workload([0.0, 7.0, 10.0], after=np.array([-1, 0, -1], np.int32)))
    assert (chat["arrivals"]["span_s"], chat["arrivals"]["rate_rps"], chat["sessions"]) == (10, 0.1, 2)
    assert stats(workload([0.0]))["arrivals"]["rate_rps"] is None


def test_lengths_and_their_correlation() -> None:
    found = stats(workload(np.arange(4.0), prompt=[1, 2, 3, 4], output=[10, 20, 30, 4000]))
    wanted = {"mean": 2.5, "p50": 2.5, "p90": 3.7, "p99": 3.97, "max": 4, "cv": 0.44721}
    assert found["prompt_tokens"] == pytest.approx(wanted, rel=1e-4)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["correlation"] < 0.9
    assert ranks(np.array([5, 1, 5, 9], np.int32)).tolist() == [2.5, 1, 2.5, 4]
    assert correlation(np.ones(3), np.arange(3.0)) is None


def test_prefix_hits_are_contiguous_and_of_the_prompt_only() -> None:
    chains = [(1, 2, 3), (1, 2, 4), (9, 2), (1, 2, 3)]  # the first's third unit is its output
    made = workload(np.arange(4.0), prompt=[32, 50, 40, 48], hashes=chains)
    assert unit_hits(made).tolist() == [0, 2, 0, 3]
    found = stats(made, capacities_units=[1, 2, 100, 200])["prefix"]
    assert (found["units"], found["unique_units"], found["requests_with_hit"]) == (10, 5, 0.5)
    assert (found["unit_hit_ratio"], found["token_hit_ratio"]) == pytest.approx((0.5, 80 / 170))
    assert found["lru_hit_ratio"] == pytest.approx({"1": 0.1, "2": 0.2, "100": 0.5}), "200 is no more than 100: all fits"
    assert stats(workload([0.0]))["prefix"] is None


def test_the_figures_are_json() -> None:
    assert json.loads(json.dumps(stats(workload(np.arange(3.0), hashes=[(1,), (1,), ()]))))["requests"] == 3


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("azure2023_conv.csv.zst", "azure2023_conv"),
        ("azure2023_code.csv.zst", "azure2023_code"),
        ("mooncake_conversation_trace.jsonl.zst", "mooncake_conversation_trace"),
    ],
)
def test_published_traces_have_the_figures_computed_elsewhere(file: str, key: str) -> None:
    if not TRACES.exists():
        pytest.skip(f"{TRACES} is absent")
    wanted = json.loads((TRACES / "trace_stats.json").read_text(encoding="utf-8"))[key]
    found = stats(load(TRACES / file))
    for column, name in (("prompt_tokens", "inp"), ("output_tokens", "outp")):
        for figure in ("mean", "p50", "p90", "p99", "max", "cv"):
            assert found[column][figure] == pytest.approx(wanted[name][figure], rel=1e-3), (column, figure)
    assert found["correlation"] == pytest.approx(wanted["corr"], abs=1e-3)
    arrivals = found["arrivals"]
    assert arrivals["rate_rps"] == pytest.approx(wanted["arr"]["rate_rps"], rel=2e-3)
    assert arrivals["peak_minute_rps"] == pytest.approx(wanted["arr"]["peak_1min_rps"], rel=0.03)
    if "prefix" not in wanted:
        ours = [arrivals[name] for name in ("interarrival_cv", "dispersion_1s", "dispersion_10s")]
        assert ours == pytest.approx([wanted["arr"][name] for name in ("ia_cv", "idx_disp_1s", "idx_disp_10s")], rel=5e-3)
        return
    # Theirs are of the raw 3 s steps, and of partial units too; ours are spread, and of full units.
    assert arrivals["interarrival_cv"] == pytest.approx(1, abs=0.1)
    assert found["prefix"]["token_hit_ratio"] == pytest.approx(wanted["prefix"]["inf_token_hit"], abs=0.002)
    assert found["prefix"]["unit_hit_ratio"] == pytest.approx(wanted["prefix"]["inf_block_hit"], abs=0.02)
    assert found["prefix"]["lru_hit_ratio"] == pytest.approx(wanted["prefix"]["lru_hit_by_capacity_blocks"], abs=0.02)
