from __future__ import annotations

from typing import Any

import pytest

from pdlab import Experiment, simulate
from pdlab.core.types import Stage
from pdlab.results.bottleneck import find_bottleneck
from pdlab.results.metrics import FIELDS, InstanceUse, LinkUse, Records, Samples

NAN = float("nan")
NAMES = ["prefill-0", "decode-0"]


def records_of(
    count: int, *, status: Stage = Stage.DONE, queue: float = 0.1, prefill: float = 0.2, room: float = 0.0, **late: float
) -> Records:
    """`count` requests, one a second, each with these seconds in its stages and 11 output tokens `step` apart."""
    records = Records(instances=NAMES)
    for k in range(count):
        start = k + queue
        first = start + prefill
        moved = first + room
        begun = moved + late.get("transfer", 0.01)
        times = {
            "arrival_s": k,
            "dispatched_s": k,
            "prefill_start_s": start,
            "first_token_s": first,
            "handoff_s": first,
            "transfer_start_s": moved,
            "transfer_end_s": begun,
            "decode_start_s": begun,
            "finish_s": begun + 10 * late.get("step", 0.02),
        }
        row = dict.fromkeys(FIELDS, 0.0) | times | {"request_id": k, "status": status, "output_tokens": 11, "n": 1, "decode_instance": 1}
        row |= {"ttft_slo_s": NAN, "tpot_slo_s": NAN, "reason": NAN}
        records.rows.extend(float(row[name]) for name in FIELDS)
    return records


def uses(*, prefill: float = 0.3, compute_bound: float = 0.0, peak: float = 0.5, **other: Any) -> list[InstanceUse]:
    usual: dict[str, Any] = {"up_s": 100.0, "kv_blocks": 100, "kv_use_mean": peak / 2, "kv_use_peak": peak}
    usual |= {"requests": 100, "prefill_tokens": 1, "decode_tokens": 1}
    return [
        InstanceUse(name="prefill-0", role="prefill", busy_s=prefill * 100, prefill_busy_s=prefill * 100, decode_busy_s=0.0, **usual),
        InstanceUse(
            name="decode-0",
            role="decode",
            busy_s=99.0,
            prefill_busy_s=0.0,
            decode_busy_s=99.0,
            compute_bound_fraction=compute_bound,
            **usual,
            **other,
        ),
    ]


def reports(full: float) -> Samples:
    """100 reports of the decode instance, a share `full` of them with all blocks used and requests waiting."""
    samples = Samples(instances=NAMES)
    for t in range(100):
        samples.rows.extend((t, 1, 5, 0, 8, 0, 100, 100) if t < full * 100 else (t, 1, 0, 0, 8, 0, 50, 100))
    return samples


def steady(running: int) -> Samples:
    """100 reports of the decode instance, which decodes as many all the time, and has blocks free."""
    samples = Samples(instances=NAMES)
    for t in range(100):
        samples.rows.extend((t, 1, 0, 0, running, 0, 2, 100))
    return samples


def link(utilisation: float) -> LinkUse:
    return LinkUse(name="net", bytes=1e9, capacity_bytes_per_s=1e9, busy_fraction=0.9, utilisation=utilisation, peak_flows=7)


def find(records: Records, instances: list[InstanceUse], *, full: float = 0.0, used: float = 0.05) -> dict[str, Any]:
    return find_bottleneck(records, reports(full), instances, [link(used)], slo=(1.0, 0.05), duration_s=100.0)


def test_an_easy_run_has_none_and_says_how_far_it_is() -> None:
    found = find(records_of(100), uses())
    assert found["resource"] == "none"
    assert found["instance"] is None
    assert "30." in found["evidence"]
    assert "50.0 %" in found["evidence"]


def test_busy_prefill_behind_a_queue() -> None:
    found = find(records_of(100, queue=3.0), uses(prefill=0.97))
    assert (found["resource"], found["role"], found["instance"]) == ("prefill compute", "prefill", "prefill-0")
    assert "queued for prefill" in found["evidence"]
    assert "3.00 s" in found["evidence"]


def test_prompts_too_long_for_the_objective_are_prefill_compute_even_when_idle() -> None:
    assert find(records_of(100, queue=0.0, prefill=1.4), uses(prefill=0.2))["resource"] == "prefill compute"


def test_busy_prefill_is_named_while_objectives_are_still_met() -> None:
    found = find(records_of(100), uses(prefill=0.95))
    assert found["resource"] == "prefill compute"


def test_an_idle_tail_does_not_dilute_prefill_use() -> None:
    records = records_of(50)  # prefill was offered work for 50 of 100 s
    assert find(records, uses(prefill=0.48))["resource"] == "prefill compute"


@pytest.mark.parametrize(("compute_bound", "resource"), [(0.1, "decode memory"), (0.8, "decode compute")])
def test_slow_steps(compute_bound: float, resource: str) -> None:
    found = find(records_of(100, step=0.08), uses(compute_bound=compute_bound))
    assert (found["resource"], found["role"]) == (resource, "decode")
    assert "in decode" in found["evidence"]


def test_waiting_for_room_is_decode_memory() -> None:
    found = find(records_of(100, room=2.0), uses(peak=1.0), full=0.6)
    assert found["resource"] == "decode memory"
    assert "60.0 %" in found["evidence"]


def test_full_blocks_are_named_while_objectives_are_still_met() -> None:
    assert find(records_of(100), uses(peak=1.0), full=0.4)["resource"] == "decode memory"


def test_an_idle_prefill_queue_is_blamed_on_what_holds_it_back() -> None:
    waiting = records_of(100, queue=4.0)
    assert find(waiting, uses(prefill=0.4, peak=1.0), full=0.7)["resource"] == "decode memory"
    assert find(waiting, uses(prefill=0.4), used=0.95)["resource"] == "link"
    assert find(waiting, uses(prefill=0.97, peak=1.0), full=0.7)["resource"] == "prefill compute"


@pytest.mark.parametrize("stages", [{"queue": 4.0}, {"room": 2.0}])
def test_decode_that_may_run_no_more_sequences_is_named_and_not_its_memory_or_prefill(stages: dict[str, float]) -> None:
    found = find_bottleneck(
        records_of(100, **stages), steady(8), uses(prefill=0.12, peak=0.02), [link(0.05)], slo=(1.0, 0.05), duration_s=100.0
    )
    assert (found["resource"], found["role"], found["instance"]) == ("decode slots", "decode", "decode-0")
    assert "decoded 8 sequences at most" in found["evidence"]
    assert "max_seqs" in found["evidence"]


@pytest.mark.parametrize(("max_seqs", "resource"), [(8, "decode slots"), (256, "decode memory")])
def test_a_bound_that_is_known_is_met_or_not(max_seqs: int, resource: str) -> None:
    """Requests wait for room while 8 sequences decode all the time."""
    instances = uses(prefill=0.12, peak=0.02, max_seqs=max_seqs)
    found = find_bottleneck(records_of(100, room=2.0), steady(8), instances, [link(0.05)], slo=(1.0, 0.05), duration_s=100.0)
    assert found["resource"] == resource
    assert ("the 8 sequences that engine.max_seqs lets it" in found["evidence"]) == (max_seqs == 8)


def test_a_known_bound_that_is_met_at_times_is_enough() -> None:
    samples = Samples(instances=NAMES)
    for t in range(100):
        samples.rows.extend((t, 1, 0, 0, 8 if t % 3 == 0 else 5, 0, 2, 100))
    given = {"slo": (1.0, 0.05), "duration_s": 100.0}
    for max_seqs, resource in ((8, "decode slots"), (9, "decode memory"), (None, "decode memory")):
        instances = uses(prefill=0.12, peak=0.02, max_seqs=max_seqs)
        found = find_bottleneck(records_of(100, room=2.0), samples, instances, [link(0.05)], **given)  # type: ignore[arg-type]
        assert found["resource"] == resource, max_seqs


def test_a_queue_in_bursts_is_blamed_on_prefill_which_was_busy_throughout_it() -> None:
    burst = records_of(20, queue=2.0).rows + records_of(80, queue=0.0).rows
    slow = find_bottleneck(Records(burst, NAMES), steady(8), uses(prefill=0.2), [link(0.05)], slo=(1.0, 0.05), duration_s=100.0)
    assert slow["resource"] == "prefill compute"
    assert "queued for prefill" in slow["evidence"]


def test_a_simulated_cluster_of_eight_slots() -> None:
    few = {"role": "decode", "hardware": "h100-sxm", "engine": {"max_seqs": 8}}
    experiment = {
        "model": "llama-3.1-8b",
        "workload": {"source": "synthetic", "requests": 150, "rate": 20, "prompt": 1000, "output": 100},
        "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, few]},
    }
    for reserve in ("before_prefill", "after_prefill"):
        found = simulate(Experiment.parse({**experiment, "transfer": {"reserve": reserve}})).summary["bottleneck"]
        assert (found["resource"], found["instance"]) == ("decode slots", "decode-0"), found["evidence"]
        assert "the 8 sequences that engine.max_seqs lets it" in found["evidence"]


def test_slow_transfers_are_the_link_though_decoding_takes_longer() -> None:
    found = find(records_of(100, transfer=0.5, step=0.04), uses(), used=0.6)
    assert (found["resource"], found["instance"]) == ("link", "net")
    assert "in KV transfer" in found["evidence"]


def test_a_full_link_is_named_while_objectives_are_still_met() -> None:
    assert find(records_of(100), uses(), used=0.93)["resource"] == "link"


def test_rejections_without_load_have_no_bottleneck() -> None:
    found = find(records_of(100, status=Stage.REJECTED), uses())
    assert found["resource"] == "none"
    assert "100 % of the requests were rejected or failed" in found["evidence"]
    assert find(records_of(100, status=Stage.REJECTED), uses(prefill=1.0))["resource"] == "prefill compute"


def test_requests_that_never_ended_vote_for_where_they_stuck() -> None:
    records = records_of(40)
    stuck = records_of(60, status=Stage.QUEUED_D)
    columns = stuck.columns()
    for name in ("transfer_start_s", "transfer_end_s", "decode_start_s", "finish_s"):
        columns[name][:] = NAN
    del columns
    records.rows.extend(stuck.rows)
    assert find(records, uses(peak=1.0), full=0.8)["resource"] == "decode memory"


def test_mixed_instances_stalled_by_prefill() -> None:
    usual = {
        "up_s": 100.0,
        "kv_blocks": 100,
        "kv_use_mean": 0.1,
        "kv_use_peak": 0.2,
        "requests": 1,
        "prefill_tokens": 1,
        "decode_tokens": 1,
    }
    mixed = InstanceUse(name="mixed-0", role="mixed", busy_s=95.0, prefill_busy_s=60.0, decode_busy_s=35.0, **usual)  # type: ignore[arg-type]
    found = find(records_of(100, step=0.09), [mixed])
    assert (found["resource"], found["instance"]) == ("prefill compute", "mixed-0")


def test_nothing_at_all() -> None:
    found = find_bottleneck(Records(), Samples(), [], [], slo=(1.0, 0.05), duration_s=0.0)
    assert found["resource"] == "none"
    assert found["evidence"] == "nothing ran"
