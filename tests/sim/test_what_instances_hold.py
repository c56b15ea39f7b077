"""Unequal instances in a whole simulation: each request goes to one that can hold it, and what nobody can hold says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab import cost
from pdlab.core.types import Role, UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.policies.load import names
from pdlab.policies.round_robin import RoundRobin
from pdlab.report.result import Result
from pdlab.sim import simulate
from pdlab.sim.moves import TransferMode
from tests.support.small_world import small_world, workload

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "sim"


def experiment(rows: list[dict[str, Any]], prompt: int = 700, output: int = 300, requests: int = 30, **rest: Any) -> Experiment:
    instances = [{"hardware": "h100-sxm", **row} for row in rows]
    work = {"source": "synthetic", "requests": requests, "rate": 50, "prompt": prompt, "output": output}
    return Experiment.parse({"model": "llama-3.1-8b", "workload": work, "cluster": {"instances": instances}, **rest})


SMALL = {"engine": {"kv_blocks": 50}}
PREFILL, DECODE, MIXED = {"role": "prefill"}, {"role": "decode"}, {"role": "mixed"}


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize(
    "rows",
    [
        [PREFILL, {**DECODE, **SMALL}, DECODE],
        [{**PREFILL, "engine": {"kv_blocks": 40}}, PREFILL, DECODE],
        [{**MIXED, **SMALL}, MIXED],
        [MIXED, {**MIXED, **SMALL}],
    ],
    ids=["decode", "prefill", "mixed", "mixed, the large one first"],
)
def test_an_instance_that_can_never_hold_a_request_is_passed_over(rows: list[dict[str, Any]], policy: str) -> None:
    result = simulate(experiment(rows, policy=policy))
    assert result.summary["completed"] + result.summary["rejected"] == 30, result.records.reasons
    assert result.summary["failed"] == result.summary["leaked_blocks"] == 0
    if policy != "early_reject":
        assert result.summary["completed"] == 30


@pytest.mark.parametrize("mode", [{"mode": "push", "granularity": "layer"}, {"mode": "push"}, {"first_token": "decode"}], ids=str)
def test_however_kv_is_moved(mode: dict[str, str]) -> None:
    result = simulate(experiment([PREFILL, {**DECODE, **SMALL}, DECODE], transfer=mode, policy="round_robin"))
    assert result.summary["completed"] == 30


def reasons(result: Result) -> set[str]:
    return set(result.records.frame().reason.dropna())


def test_what_nobody_can_hold_says_why_in_numbers() -> None:
    result = simulate(experiment([{**PREFILL, **SMALL}, {**DECODE, **SMALL}], requests=3, engine={"watermark": 0.0}))
    assert result.summary["failed"] == 3
    assert reasons(result) == {"with 700 tokens of prompt and 300 of output it needs 63 KV blocks, more than the 50 that decode-0 has"}


def test_a_prompt_beyond_the_model_s_context_is_refused_as_live() -> None:
    result = simulate(experiment([MIXED], prompt=10_000, output=10, requests=3, model="llama-2-7b"))
    assert result.summary["failed"] == 3
    assert reasons(result) == {"its prompt of 10,000 tokens exceeds the context of 4,096 tokens that mixed-0 has"}


@pytest.mark.parametrize(("prompt", "output", "done"), [(4000, 96, 3), (4000, 97, 0), (4095, 1, 3), (4096, 1, 0)])
def test_prompt_and_output_share_the_context(prompt: int, output: int, done: int) -> None:
    assert simulate(experiment([MIXED], prompt, output, 3, model="llama-2-7b")).summary["completed"] == done


def test_max_model_len_bounds_it_further_and_for_a_row_alone() -> None:
    assert simulate(experiment([MIXED], engine={"max_model_len": 999}, requests=3)).summary["completed"] == 0
    assert simulate(experiment([MIXED], engine={"max_model_len": 1000}, requests=3)).summary["completed"] == 3
    rows = [{**MIXED, "engine": {"max_model_len": 999}}, MIXED]
    result = simulate(experiment(rows, policy="round_robin"))
    assert set(result.records.frame().prefill_instance) == {"mixed-1"}


def test_max_model_len_beyond_the_model_is_a_mistake_that_names_both() -> None:
    with pytest.raises(UsageError, match=r"engine.max_model_len: 5000 exceeds the 4096 positions of llama-2-7b"):
        experiment([MIXED], model="llama-2-7b", engine={"max_model_len": 5000})
    with pytest.raises(UsageError, match=r"cluster.instances.0.engine.max_model_len: 5000 exceeds the 4096 positions"):
        experiment([{**MIXED, "engine": {"max_model_len": 5000}}], model="llama-2-7b")


@pytest.mark.parametrize("rows", [[MIXED], [PREFILL, DECODE]], ids=["mixed", "PD"])
@pytest.mark.parametrize(("output", "done"), [(101, 5), (102, 0)])
def test_the_last_token_needs_no_kv(rows: list[dict[str, Any]], output: int, done: int) -> None:
    result = simulate(experiment(rows, 700, output, 5, engine={"kv_blocks": 50, "watermark": 0.0}))
    assert (result.summary["completed"], result.summary["leaked_blocks"]) == (done, 0)


def test_with_the_first_token_from_the_decode_instance_nothing_gets_stuck_at_the_brim() -> None:
    for output in (100, 101, 102):
        done = simulate(
            experiment([PREFILL, DECODE], 700, output, 5, engine={"kv_blocks": 50, "watermark": 0.0}, transfer={"first_token": "decode"})
        ).summary
        assert done["completed"] + done["failed"] == 5, output


def test_a_decode_instance_that_dies_leaves_its_requests_to_those_who_can_hold_them() -> None:
    rows = [PREFILL, {**DECODE, **SMALL}, {**DECODE, "count": 2}]
    result = simulate(experiment(rows, output=500, policy="round_robin", faults=[{"at_s": 1.0, "kill": "decode-1"}]))
    assert result.summary["completed"] == 30
    frame = result.records.frame()
    assert (frame.attempts > 1).any()
    assert set(frame.decode_instance) <= {"decode-1", "decode-2"}


def test_candidates_need_no_prefix_cache_as_live() -> None:
    work = workload(np.arange(4) * 0.1, 300, 40, best_of=np.full(4, 3, np.int16))
    for members in ((("m-0", Role.MIXED),), (("p-0", Role.PREFILL), ("d-0", Role.DECODE))):
        world = small_world(work, members=members, prefix_cache=False, policy=RoundRobin(), transfer=TransferMode())
        world.run()
        assert (world.records.frame().status == "done").all(), world.records.reasons
        assert world.leaked_blocks == 0


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize(
    ("case", "done"),
    [
        ("sim_decode_one_of_two_small", 30),
        ("sim_mixed_one_of_two_small", 30),
        ("sim_het_prefill", 30),
        ("sim_beyond_context", 0),
        ("sim_kv_exact1", 5),
    ],
)
@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "random"])
def test_the_cases_hold(case: str, done: int, policy: str) -> None:
    summary = simulate(Experiment.load(CASES / f"{case}.yaml", [f"policy={policy}"])).summary
    assert summary["completed"] == done


# ------------------------------------------------------------ layers with windows

HYBRID, ALL = {"hybrid_kv": True}, {"hybrid_kv": False}


def windowed(rows: list[dict[str, Any]], engine: dict[str, Any], prompt: int, output: int = 20, **rest: Any) -> Result:
    asked = experiment(rows, prompt, output, requests=4, engine=engine, **rest)
    return simulate(asked.with_(model="gpt-oss-20b"))


@pytest.mark.parametrize("transfer", [{}, {"mode": "push", "granularity": "chunk"}, {"mode": "push", "granularity": "layer"}])
def test_a_hand_off_takes_the_window_of_the_layers_that_have_one(transfer: dict[str, Any]) -> None:
    moved = [windowed([PREFILL, DECODE], engine, 3000, transfer=transfer).records.column("transfer_bytes") for engine in (HYBRID, ALL)]
    assert set(moved[0]) == {24_576.0 * (3000 + 128)}
    assert set(moved[1]) == {2 * 24_576.0 * 3000}


def test_it_holds_a_request_that_does_not_fit_with_all_of_its_kv() -> None:
    small = {"kv_blocks": 200, "watermark": 0, "max_batch_tokens": 1024}
    for prompt, engine, ends in ((3100, ALL, 4), (3300, ALL, 0), (3300, HYBRID, 4), (5100, HYBRID, 4), (5300, HYBRID, 0)):
        result = windowed([MIXED], {**small, **engine}, prompt)
        assert result.summary["completed"] == ends, (prompt, engine)
        assert result.summary["leaked_blocks"] == 0
    assert "exceeds the 5,233 tokens that the KV memory of mixed-0 can hold of one request" in result.records.reasons[0]


def test_half_the_layers_having_short_windows_nearly_twice_as_many_long_requests_run_at_once() -> None:
    peaks = [windowed([MIXED], engine, 20_000, 200).summary["instances"][0]["kv_use_peak"] for engine in (HYBRID, ALL)]
    assert peaks[0] == pytest.approx(peaks[1] / 2, rel=0.25)


def test_a_measured_instance_counts_as_it_was_measured() -> None:
    assert cost.kv_windows(cost.model("gpt-oss-20b"), cost.hardware("h100")) == ((24_576, 128),)
    assert cost.kv_windows(cost.model("llama-3.1-8b"), cost.hardware("h100")) == ()
    assert cost.kv_windows(cost.model("glm-5"), cost.hardware("h100")) == (), "a sparse attention may look at any token"
