"""What the experiments' heads claim, on shorter runs: orderings and shapes, not figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab import Experiment, simulate
from pdlab.report.result import Result
from pdlab.workload.spec import build

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def run(name: str, *overrides: str) -> Result:
    return simulate(Experiment.load(EXPERIMENTS / f"{name}.yaml", overrides))


def summary(name: str, *overrides: str) -> dict[str, Any]:
    return run(name, *overrides).summary


def test_quickstart_meets_its_objectives() -> None:
    found = summary("quickstart", "workload.requests=500")
    assert found["slo_attainment"] > 0.99
    assert found["leaked_blocks"] == 0


def test_mooncake_orders_dispatch_policies_by_ttft() -> None:
    ttft = {
        policy: summary("mooncake_dispatch", "workload.requests=2500", f"policy.dispatch={policy}")["ttft_s"]["mean"]
        for policy in ("random", "least_loaded", "prefix_aware")
    }
    assert ttft["random"] > 1.5 * ttft["least_loaded"]
    assert ttft["least_loaded"] > ttft["prefix_aware"]


def test_llumnix_migration_spares_preemptions_and_the_tail() -> None:
    on = run("llumnix_migration")
    off = run("llumnix_migration", "policy={dispatch: freeness, handoff: freeness}")
    assert on.requests.migrations.sum() > 20
    assert on.requests.preemptions.sum() < off.requests.preemptions.sum()
    assert on.gaps.max < off.gaps.max / 2


def test_three_of_four_that_prefill_are_the_best_split_and_one_the_worst() -> None:
    splits = {
        "4 mixed": {"mixed": 4},
        "1P3D": {"prefill": 1, "decode": 3},
        "2P2D": {"prefill": 2, "decode": 2},
        "3P1D": {"prefill": 3, "decode": 1},
    }
    attainment = {}
    for name, split in splits.items():
        rows = ", ".join(f"{{role: {role}, count: {count}, hardware: h100-sxm, tp: 4}}" for role, count in split.items())
        attainment[name] = summary("which_split", f"cluster.instances=[{rows}]", "workload.rate=14")["slo_attainment"]
    assert sorted(attainment, key=lambda name: attainment[name]) == ["1P3D", "4 mixed", "2P2D", "3P1D"]


def test_xllm_role_flips_beat_a_fixed_ratio_under_a_shift() -> None:
    flips = summary("xllm_role_flip")["slo_attainment"]
    static = summary("xllm_role_flip", "policy={dispatch: xllm_slo_aware, handoff: xllm_slo_aware}")["slo_attainment"]
    assert flips > static + 0.1


def test_batches_by_deadline_meet_more_objectives_and_make_the_mean_ttft_longer() -> None:
    slide = summary("slide_batching", "workload.requests=1000")
    chunked = summary("slide_batching", "workload.requests=1000", "engine.batching=chunked")
    assert slide["slo_attainment"] > chunked["slo_attainment"] + 0.03
    assert slide["ttft_s"]["mean"] > chunked["ttft_s"]["mean"]


def test_go_routing_serves_important_requests_better_than_the_shortest_queue() -> None:
    met = {}
    for policy in ("go_routing", "least_loaded"):
        rows = run("go_routing", "workload.requests=1500", f"policy.dispatch={policy}").requests
        met[policy] = (rows.good.mean(), rows[rows.priority == 1].good.mean())
    assert met["go_routing"][0] > met["least_loaded"][0]
    assert met["go_routing"][1] > met["least_loaded"][1] + 0.05


def test_roles_that_settle_beat_the_best_fixed_ratio_and_xllms_flips() -> None:
    settled = summary("settled_roles")
    fixed = []
    for prefill in (4, 5):
        rows = f"[{{role: auto, count: 8, prefill: {prefill}, hardware: a100-sxm-80gb}}]"
        policy = "policy={dispatch: prefix_aware, handoff: least_kv, migrate: freeness}"
        fixed.append(summary("settled_roles", f"cluster.instances={rows}", policy)["slo_attainment"])
    assert settled["slo_attainment"] > max(fixed) + 0.3
    assert settled["ttft_s"]["mean"] < 1.0


def test_roles_by_freeness_beat_a_fixed_ratio_where_the_load_shifts() -> None:
    fixed = summary("llumnix_elastic", "policy={dispatch: prefix_aware, handoff: llumnix, migrate: llumnix}")
    settled = summary("llumnix_elastic")
    assert settled["slo_attainment"] > fixed["slo_attainment"] + 0.25
    assert settled["ttft_s"]["mean"] < 1.0


def test_nearness_wins_on_a_slow_network_and_loses_where_the_near_one_is_crowded() -> None:
    uneven = [
        f"{{role: {role}, count: {count}, hardware: h100-sxm, host: {host}}}"
        for host, prefill in (("a", 3), ("b", 1))
        for role, count in (("prefill", prefill), ("decode", 1))
    ]
    long = ["workload.output={lognormal: {median: 400, cv: 0.8, max: 2000}}", f"cluster.instances=[{', '.join(uneven)}]"]
    met = {
        (policy, case): summary("topology", "workload.requests=1500", f"policy.handoff={policy}", *changes)["slo_attainment"]
        for policy in ("topology", "least_kv")
        for case, changes in (("slow", ["cluster.network.gbytes_per_s=1"]), ("uneven", long))
    }
    assert met["topology", "slow"] > met["least_kv", "slow"] + 0.1
    assert met["topology", "uneven"] < met["least_kv", "uneven"]


def test_prefixes_come_to_prompts_on_quick_links_and_not_on_slow_ones() -> None:
    def ttft(policy: str, gbytes_per_s: float) -> tuple[float, float]:
        cut = (f"policy.dispatch={policy}", f"cluster.network.gbytes_per_s={gbytes_per_s}", "workload.requests=400")
        found = summary("p2p_prefix", *cut)["ttft_s"]
        return found["mean"], found["p99"]

    assert ttft("p2p_prefix", 25) < ttft("prefix_aware", 25) < ttft("least_loaded", 25)
    slow = ttft("p2p_prefix", 0.5)
    assert slow == ttft("least_loaded", 0.5), "it reads nothing"
    assert slow > ttft("prefix_aware", 0.5)


def test_offline_work_beside_online_spares_online_requests_under_load_and_takes_longer() -> None:
    def of_classes(policy: str, rate: float) -> tuple[float, float]:
        """Attainment of online requests, mean seconds of an offline one."""
        plan = Experiment.load(EXPERIMENTS / "ooco.yaml", [f"policy={policy}", f"workload.rate={rate}", "workload.requests=400"])
        work = build(plan.workload, plan.seed, plan.base_dir)
        assert work.offline is not None
        rows = simulate(plan, workload=work).requests
        offline = work.offline[rows.request_id.to_numpy()] == 1
        return float(rows[~offline].good.mean()), float(rows[offline].e2e_s.mean())

    ooco, alike = of_classes("ooco", 8), of_classes("least_loaded", 8)
    waits = of_classes("{name: ooco, online_waits: true}", 8)
    assert ooco[0] > waits[0] + 0.2 > alike[0] + 0.3
    assert waits[1] > ooco[1] > alike[1], "offline requests pay for it"
    calm, calm_alike = of_classes("ooco", 4), of_classes("least_loaded", 4)
    assert calm[0] == calm_alike[0], "at light load it gains nothing"
    assert calm[1] > calm_alike[1]


def test_two_instances_of_different_kinds_swap_their_roles() -> None:
    rows = "cluster.instances=[{role: prefill, hardware: l4}, {role: decode, hardware: a100-sxm-80gb}]"
    load = "workload={source: synthetic, requests: 400, rate: 4, prompt: 1500, output: 60}"
    settled = summary("settled_roles", rows, load, "slo.tpot_s=0.15")
    fixed = summary("settled_roles", rows, load, "slo.tpot_s=0.15", "policy={dispatch: prefix_aware, handoff: least_kv}")
    assert settled["completed"] == 400
    assert settled["slo_attainment"] > fixed["slo_attainment"] + 0.5


def test_whoever_weighs_hits_against_queues_wins_where_chats_return() -> None:
    met = {
        policy: summary("production_routers", "workload.requests=1200", "workload.rate=24", f"policy.dispatch={policy}")["slo_attainment"]
        for policy in ("dynamo_kv", "consistent_hash", "length_buckets", "sglang_cache_aware")
    }
    assert met["dynamo_kv"] > met["consistent_hash"] > max(met["length_buckets"], met["sglang_cache_aware"])


def test_distserve_prefers_tensor_parallel_prefill_for_opt_13b() -> None:
    """At 1.5 requests/s per GPU, DistServe's best placement meets its objectives, and the same GPUs without tensor parallelism do not."""
    best = summary("distserve_opt13b", "workload.requests=1500", "workload.rate=4.5")["slo_attainment"]
    three = "cluster.instances=[{role: prefill, count: 2, hardware: a100-sxm-80gb},{role: decode, count: 1, hardware: a100-sxm-80gb}]"
    assert best > 0.9
    assert summary("distserve_opt13b", "workload.requests=1500", "workload.rate=4.5", three)["slo_attainment"] < 0.9


@pytest.mark.parametrize("path", sorted(set(EXPERIMENTS.glob("*.yaml")) - set(EXPERIMENTS.glob("two_worlds*"))), ids=lambda p: p.stem)
def test_every_experiment_says_what_it_asks_and_runs(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    short = [] if path.stem == "xllm_role_flip" else ["workload.requests=100"]
    found = simulate(Experiment.load(path, short)).summary
    assert found["completed"] + (found["rejected"] if path.stem == "flow_control" else 0) >= 100
