from __future__ import annotations

import math
from array import array

import numpy as np
import pytest

from pdlab import Experiment, simulate
from pdlab.core.types import Stage
from pdlab.results.gaps import Gaps
from pdlab.results.metrics import summarise, untrimmed
from pdlab.results.records import FIELDS, Column, Records, Samples
from pdlab.results.window import arrival_window, waiting, warm_up_requests, window_figures

NAN = math.nan
SLO = (1.0, 0.05)


def queued(arrival_s: Column, service_s: float, *, servers: int = 1, answer_s: float = 0.4, first_slow: int = 0) -> Records:
    """Requests that are prefilled one after the other by `servers` instances in `service_s` each, the `first_slow` of them a second longer;
    11 tokens later, in `answer_s`, they end."""
    free = [0.0] * servers
    rows = array("d")
    for k, at in enumerate(arrival_s):
        mine = k % servers
        start = max(float(at), free[mine])
        free[mine] = start + service_s
        first = free[mine] + (1.0 if k < first_slow else 0.0)
        row = dict.fromkeys(FIELDS, NAN) | {"request_id": k, "status": Stage.DONE, "arrival_s": at, "prefill_start_s": start}
        row |= {"first_token_s": first, "finish_s": first + answer_s, "output_tokens": 11, "n": 1, "prompt_tokens": 10, "attempts": 1}
        rows.extend(float(row[name]) for name in FIELDS)
    return Records(rows)


def evenly(count: int, rate: float) -> Column:
    return np.arange(count) / rate


def summary_of(records: Records, *, trim: bool = True) -> dict[str, object]:
    duration_s = float(np.nanmax(records.column("finish_s")))
    return summarise(records, Gaps(), Samples(), [], [], slo=SLO, duration_s=duration_s, run={}, trim=trim)


def test_the_drain_tail_is_no_part_of_a_rate() -> None:
    """1,000 requests in 10 s, the last of which end after 60: 100 a second were served within their objectives."""
    records = queued(evenly(1000, 100.0), 0.001)
    late = records.columns()
    late["finish_s"][-1] = 60.0
    late["tpot_slo_s"][-1] = math.inf
    del late
    figures = window_figures(records, SLO)
    assert figures.slo_attainment == 1.0
    assert figures.goodput_rps == pytest.approx(100.0)
    assert figures.throughput_rps == pytest.approx(100.0)
    assert not figures.overloaded


def test_goodput_is_attainment_times_the_rate_of_arrivals() -> None:
    records = queued(evenly(1000, 25.0), 0.001)
    columns = records.columns()
    columns["status"][::16] = Stage.FAILED
    del columns
    figures = window_figures(records, SLO)
    assert figures.slo_attainment == pytest.approx(0.937)
    assert figures.goodput_rps == pytest.approx(25.0 * 0.937)
    assert figures.throughput_rps == pytest.approx(25.0 * 0.937)


def test_a_queue_that_grows_to_the_end_is_overload_and_throughput_is_what_was_served() -> None:
    records = queued(evenly(1000, 100.0), 0.0125)  # 80 a second
    figures = window_figures(records, SLO)
    assert figures.overloaded
    assert figures.throughput_rps == pytest.approx(80.0, rel=0.02)
    assert figures.goodput_rps == pytest.approx(100.0 * figures.slo_attainment)
    assert figures.window.warm_up == 0, "there is no steady state"


@pytest.mark.parametrize("load", [0.5, 0.8, 1.3])
def test_chance_is_no_overload(load: float) -> None:
    """Poisson arrivals at two servers: of 40 runs each, at most one seems overloaded where none is, and all where it is."""
    seen = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        records = queued(np.cumsum(rng.exponential(1 / (2 * load), 500)), 1.0, servers=2)
        seen += window_figures(records, SLO).overloaded
    assert seen == 40 if load > 1 else seen <= 1


def test_a_queue_that_is_gone_by_the_end_is_none_and_so_is_one_that_costs_nothing() -> None:
    burst = np.sort(np.concatenate((evenly(300, 100.0), evenly(700, 10.0))))
    assert not window_figures(queued(burst, 0.02), SLO).overloaded
    creeping = queued(evenly(1000, 1.0), 0.9)
    columns = creeping.columns()
    columns["prefill_start_s"][:] = columns["arrival_s"] + np.linspace(0.0, 0.1, 1000)
    del columns
    assert not window_figures(creeping, SLO).overloaded, "it is shorter than a prefill"


def test_waiting_for_room_to_decode_is_waiting() -> None:
    records = queued(evenly(400, 10.0), 0.01, answer_s=100.0)
    columns = records.columns()
    columns["transfer_start_s"][:] = columns["first_token_s"] + np.linspace(0.0, 20.0, 400)
    columns["transfer_end_s"][:] = columns["transfer_start_s"] + 0.1
    columns["decode_start_s"][:] = columns["transfer_end_s"]
    assert arrival_window(columns).overloaded
    assert waiting(columns, np.array([30.0, 35.0]))[0] == pytest.approx(10 * 20 * 32.5 / 40, rel=0.35)
    columns["transfer_start_s"][:] = columns["first_token_s"]
    columns["transfer_end_s"][:] = columns["first_token_s"] + 0.1
    columns["decode_start_s"][:] = columns["transfer_end_s"] + np.linspace(0.0, 20.0, 400)
    assert arrival_window(columns).overloaded


def test_a_warm_up_is_left_out_of_latencies_and_attainment_but_not_of_counts() -> None:
    records = queued(evenly(1000, 10.0), 0.01, first_slow=53)
    trimmed, whole = summary_of(records), summary_of(records, trim=False)
    assert trimmed["window"]["warm_up_requests"] == 55, "of batches of five"  # type: ignore[index]
    assert trimmed["window"]["warm_up_s"] == pytest.approx(5.5)  # type: ignore[index]
    assert (trimmed["slo_attainment"], whole["slo_attainment"]) == (1.0, 0.947)
    assert trimmed["window"]["slo_attainment_untrimmed"] == 0.947  # type: ignore[index]
    assert trimmed["ttft_s"]["max"] == pytest.approx(0.01)  # type: ignore[index]
    assert trimmed["goodput_rps"] == pytest.approx(10.0)
    assert trimmed["requests"] == trimmed["completed"] == 1000
    assert untrimmed(trimmed, records, Gaps()) == whole


def test_mser_5_by_hand() -> None:
    """The first 50 of 200 are 3, the others alternate between 1 and 2 in batches: leaving out the 50 has the smallest error."""
    ttft_s = np.concatenate((np.full(50, 3.0), np.tile(np.repeat((1.0, 2.0), 5), 15)))
    means = ttft_s.reshape(40, 5).mean(axis=1)
    errors = [means[d:].var() / (40 - d) for d in range(21)]
    assert warm_up_requests(ttft_s) == 5 * int(np.argmin(errors)) == 50
    assert warm_up_requests(np.concatenate((np.full(120, 3.0), np.ones(80)))) == 0, "more than half is no warm-up"
    assert warm_up_requests(ttft_s[40:120]) == 0, "too few to tell"
    assert warm_up_requests(np.insert(ttft_s, 3, NAN)) == 51


def test_who_arrives_at_once_is_counted_by_the_run_and_nobody_by_nothing() -> None:
    at_once = window_figures(queued(np.zeros(200), 0.001), SLO, duration_s=4.0)
    assert (at_once.goodput_rps, at_once.throughput_rps, at_once.overloaded) == (50.0, 50.0, False)
    nobody = window_figures(Records(), SLO)
    assert math.isnan(nobody.goodput_rps) and math.isnan(nobody.slo_attainment)


def test_a_closed_loop_offers_what_it_serves() -> None:
    """Eight at a time, each a second: the first eight arrive at once."""
    arrivals = np.concatenate((np.zeros(8), np.repeat(np.arange(1, 50), 8)))
    figures = window_figures(queued(arrivals, 1.0, servers=8, answer_s=0.0), (2.0, 1.0))
    assert figures.throughput_rps == pytest.approx(8.0)
    assert not figures.overloaded


def small(rate: float, **more: object) -> Experiment:
    return Experiment.parse(
        {
            "model": "llama-3.1-8b",
            "workload": {"source": "synthetic", "requests": 400, "rate": rate, "prompt": 4000, "output": 20},
            "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "hardware": "h100-sxm"}]},
            "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
            **more,
        }
    )


def test_a_simulation_says_that_it_is_overloaded_and_only_then() -> None:
    over, fine = simulate(small(60.0)).summary, simulate(small(4.0)).summary
    assert over["overloaded"] and not fine["overloaded"]
    assert over["throughput_rps"] < 0.5 * over["window"]["offered_rps"]
    assert fine["throughput_rps"] == pytest.approx(fine["window"]["offered_rps"])
    assert fine["goodput_rps"] == pytest.approx(fine["slo_attainment"] * fine["window"]["offered_rps"])


def test_what_a_fault_does_is_no_warm_up() -> None:
    fault = {"at_s": 5.0, "stop": "prefill-0", "for_s": 8.0}
    assert simulate(small(4.0, faults=[fault])).summary["window"]["warm_up_requests"] == 0
    assert simulate(small(4.0), trim=False).summary["window"]["warm_up_requests"] == 0
