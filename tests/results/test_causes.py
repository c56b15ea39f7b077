"""Each verdict with a cluster that is made to have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab import Cluster, Experiment, Instance, Policy, Request, Result, simulate
from pdlab.core.types import Role
from pdlab.results.headroom import StepLines, decode_headroom

SLO = {"ttft_s": 1.0, "tpot_s": 0.05}


def cluster(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"instances": [{"hardware": "h100-sxm", **row} for row in rows], **more}


def run(
    instances: dict[str, Any], workload: dict[str, Any] | None = None, policy: Any = None, base_dir: Path | None = None, **keys: Any
) -> Result:
    usual = {"source": "synthetic", "requests": 200, "rate": 8, "prompt": 2000, "output": 50}
    given = {
        "model": "llama-3.1-8b",
        "workload": usual | (workload or {}),
        "cluster": instances,
        "slo": SLO,
        "policy": "round_robin",
        **keys,
    }
    return simulate(Experiment.parse(given | ({"base_dir": str(base_dir)} if base_dir else {})), policy=policy)


def causes(result: Result) -> dict[str, str]:
    return {cause["kind"]: cause["evidence"] for cause in result.summary["bottleneck"]["causes"]}


PREFILL, DECODE, MIXED = {"role": "prefill"}, {"role": "decode"}, {"role": "mixed"}


class AllToTheFirst(Policy):
    """Of two alike, one does all. The other idles."""

    def dispatch(self, request: Request, cluster: Cluster) -> Instance:
        return cluster.prefill[0]

    def handoff(self, request: Request, cluster: Cluster) -> Instance:
        return cluster.decode[0]


def test_a_policy_that_lets_a_like_instance_idle_is_named() -> None:
    busy = {"rate": 30, "prompt": 4000}
    uneven = run(cluster({**PREFILL, "count": 2}, DECODE), busy, AllToTheFirst)
    assert uneven.summary["bottleneck"]["misses"]["phase"] == "queued for prefill"
    said = causes(uneven)["imbalance"]
    assert said.startswith("by policy AllToTheFirst: prefill-0 computed prompts 9")
    assert "prefill-1 0 %" in said and "a like instance was idle while 100 % of the misses waited" in said
    even = run(cluster({**PREFILL, "count": 2}, DECODE), busy | {"rate": 60})
    assert even.summary["bottleneck"]["misses"]["phase"] == "queued for prefill"
    assert "imbalance" not in causes(even)


def test_a_decode_instance_with_all_the_sequences_is_named() -> None:
    tight = {"slo": {"ttft_s": 5.0, "tpot_s": 0.0085}}
    long = {"rate": 20, "prompt": 200, "output": 400, "requests": 300}
    two = cluster(PREFILL, {**DECODE, "count": 2})
    uneven = run(two, long, AllToTheFirst, **tight)
    assert uneven.summary["bottleneck"]["misses"]["phase"] == "in decode"
    assert "decode-1 0; 100 % of the misses were decode-0's" in causes(uneven)["imbalance"]
    assert "imbalance" not in causes(run(two, long | {"rate": 60}, "round_robin", **tight))


def trace(folder: Path, prompts: list[int], gap_s: float) -> dict[str, Any]:
    lines = [f"{k * gap_s},{tokens},2" for k, tokens in enumerate(prompts)]
    (folder / "trace.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]) + "\n")
    return {"source": "trace.csv", "requests": None, "rate": None, "prompt": None, "output": None}


def test_short_prompts_behind_a_long_one_wait_at_the_head_of_the_line(tmp_path: Path) -> None:
    prompts = [60_000 if k % 40 == 0 else 200 for k in range(200)]
    blocked = run(cluster(PREFILL, DECODE), trace(tmp_path, prompts, 0.1), base_dir=tmp_path)
    assert blocked.summary["bottleneck"]["misses"]["phase"] == "queued for prefill"
    assert "behind one prompt of 60,000 tokens" in causes(blocked)["head-of-line"]
    alike = run(cluster(PREFILL, DECODE), trace(tmp_path, [4000] * 300, 0.02), base_dir=tmp_path)
    assert alike.summary["bottleneck"]["misses"]["phase"] == "queued for prefill"
    assert "head-of-line" not in causes(alike)


def test_prompts_beside_decodes_interfere_with_them() -> None:
    tight = {"slo": {"ttft_s": 20.0, "tpot_s": 0.02}}
    mixed = run(cluster(MIXED), {"rate": 12, "prompt": 6000, "output": 60}, **tight)
    assert mixed.summary["bottleneck"]["misses"]["phase"] == "in decode"
    said = causes(mixed)["interference"]
    assert "a decode step takes" in said and "by itself" in said
    apart = run(cluster({**PREFILL, "count": 2}, DECODE), {"rate": 12, "prompt": 6000, "output": 60}, **tight)
    assert apart.summary["slo_attainment"] > 0.9 and "interference" not in causes(apart)


def test_room_that_is_kept_for_prompts_not_yet_computed_is_reservation() -> None:
    few = {**DECODE, "engine": {"kv_blocks": 800}}
    slow = cluster({**PREFILL, "count": 2}, few, network={"gbytes_per_s": 0.6})
    kept = run(slow, {"rate": 8, "output": 4}, transfer={"reserve": "before_prefill", "mode": "pull"})
    assert "(transfer.reserve)" in causes(kept)["reservation"]
    decoding = run(cluster({**PREFILL, "count": 2}, few), {"rate": 8, "output": 600}, transfer={"reserve": "before_prefill"})
    assert decoding.summary["bottleneck"]["misses"] is not None
    assert "reservation" not in causes(decoding)


def test_full_kv_and_a_slow_link_are_resources_and_a_single_instance_is_said() -> None:
    full = run(
        cluster(PREFILL, {**DECODE, "engine": {"kv_blocks": 400}}), {"rate": 6, "output": 200}, transfer={"reserve": "after_prefill"}
    )
    assert full.summary["bottleneck"]["resource"] == "decode memory"
    assert "decode-0 had its KV blocks full" in full.summary["bottleneck"]["evidence"]
    assert causes(full)["single instance"] == "decode-0 is the only one that can decode: no spare"
    link = run(cluster(PREFILL, {**DECODE, "count": 2}, network={"gbytes_per_s": 1.0}), {"output": 8})
    assert (link.summary["bottleneck"]["resource"], link.summary["bottleneck"]["misses"]["phase"]) == ("link", "in KV transfer")
    assert "single instance" not in causes(link), "time was lost where there are two"


def test_misses_are_explained_though_nine_of_ten_met_their_objectives() -> None:
    found = run(cluster({**PREFILL, "count": 2}, {**DECODE, "count": 2}), {"rate": 8, "prompt": 4000}, slo={"ttft_s": 0.3, "tpot_s": 0.05})
    assert 0.9 <= found.summary["slo_attainment"] < 1
    misses = found.summary["bottleneck"]["misses"]
    assert misses["phase"] == "in prefill" and 0 < misses["requests"] <= 20
    assert "lost most time in prefill" in found.summary["bottleneck"]["evidence"]


def test_nobody_missed_and_nothing_is_to_explain() -> None:
    found = run(cluster(PREFILL, DECODE), {"rate": 1, "requests": 20}).summary["bottleneck"]
    assert (found["resource"], found["misses"], found["causes"]) == ("none", None, [])


def test_headroom_is_where_a_step_takes_as_long_as_tpot_may() -> None:
    found = run(cluster(PREFILL, DECODE), {"rate": 20, "output": 200}, slo={"ttft_s": 5.0, "tpot_s": 0.012}).summary["bottleneck"][
        "headroom"
    ]
    assert found["instance"] == "decode-0" and 1 < found["batch"] <= found["batch_most"]
    assert found["context_tokens"] == pytest.approx(2100, rel=0.05)
    steps = StepLines.of(profile_of())
    met, missed = (steps.step_s(batch, batch * found["context_tokens"]) for batch in (found["batch_limit"], found["batch_limit"] + 1))
    assert met <= 0.012 < missed and not found["bounded"]
    longest = steps.step_s(found["batch"], found["batch"] * found["context_limit"])
    assert longest == pytest.approx(0.012, rel=1e-6)
    assert f"is met up to {found['batch_limit']}" in found["evidence"]
    tight = run(cluster(PREFILL, DECODE), {"requests": 20}, slo={"ttft_s": 5.0, "tpot_s": 0.001}).summary["bottleneck"]["headroom"]
    assert tight["batch_limit"] == 0 and "is not met with one such sequence" in tight["evidence"]
    loose = run(cluster(PREFILL, DECODE), {"requests": 20}, slo={"ttft_s": 5.0, "tpot_s": 1.0}).summary["bottleneck"]["headroom"]
    assert (loose["batch_limit"], loose["bounded"]) == (256, True)


def profile_of() -> tuple[tuple[int, int, float], ...]:
    from pdlab.sim.plans import plans

    given = {"model": "llama-3.1-8b", "workload": {"source": "synthetic", "requests": 1, "rate": 1, "prompt": 1, "output": 1}}
    members = plans(Experiment.parse({**given, "cluster": cluster(PREFILL, DECODE)}), 16)
    return next(member.decode_profile for member in members if member.placement.role is Role.DECODE)


def test_without_an_objective_or_reports_there_is_no_headroom() -> None:
    result = run(cluster(PREFILL, DECODE), {"requests": 20})
    assert decode_headroom(result.samples, [], 0.05) is None
    assert decode_headroom(result.samples, [], float("inf")) is None
