"""DESIGN §12 on random workloads, policies and faults: nothing is lost, leaked, repeated, or decided differently the second time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.kv import PLAIN
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.types import InstanceState, Role, Stage
from pdlab.experiment.study import FaultSpec
from pdlab.policies import load as load_policy
from pdlab.replay.log import EventLog, Head, read, replay
from pdlab.sim import faults
from pdlab.sim.moves import TransferMode
from pdlab.sim.world import World
from tests.support.small_world import PD, WINDOWS, small_world, workload

CLUSTERS = (PD, (*PD, ("mixed-0", Role.MIXED)), (("m-0", Role.MIXED), ("m-1", Role.MIXED)), (("p-0", Role.PREFILL), ("d-0", Role.DECODE)))
POLICIES = (
    "round_robin",
    "least_loaded",
    {"dispatch": "prefix_aware", "handoff": "least_kv"},
    {"dispatch": "conditional", "handoff": "least_kv"},
    {"name": "llumnix", "tick_s": 0.2},
    {"name": "xllm_slo_aware", "tick_s": 0.2, "min_flip_interval_s": 0.5},
    "fastdeploy_splitwise",
)
TRANSFERS = (
    TransferMode(),
    TransferMode("push", "layer"),
    TransferMode("push", "chunk"),
    TransferMode("pull", "request", "decode"),
    TransferMode("push", "request"),
)
HEAD = Head(pdlab="test", seed=1, policy="", policy_hash="", hash_tokens=16, experiment={})


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, object]:
    members = draw(st.sampled_from(CLUSTERS))
    n = draw(st.integers(1, 40))
    gaps = draw(st.lists(st.floats(0.0, 0.4), min_size=n, max_size=n))
    prompts = draw(st.lists(st.integers(1, 700), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 150), min_size=n, max_size=n))
    hashes = None
    if draw(st.booleans()):
        families = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
        hashes = [tuple(f << 20 | u for u in range(p // 16)) for f, p in zip(families, prompts, strict=True)]
    best_of = None
    if draw(st.booleans()) and draw(st.booleans()):
        best_of = np.array(draw(st.lists(st.sampled_from([1, 1, 3]), min_size=n, max_size=n)), np.int16)
    priority = np.array(draw(st.lists(st.sampled_from([0, 0, 1, -1]), min_size=n, max_size=n)), np.int16) if draw(st.booleans()) else None
    names = [name for name, _ in members]
    events = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["kill", "kill", "stop", "slow", "slow_link", "cut_link", "cut", "lose_reports", "delay_reports"]))
        named = draw(st.permutations(names))[:2] if kind == "cut" else draw(st.sampled_from(names))
        fault: dict[str, object] = {"at_s": draw(st.floats(0.0, 4.0)), kind: named}
        if kind == "kill":
            fault["restart_after_s"] = draw(st.floats(0.1, 5.0))
        else:
            fault["for_s"] = draw(st.floats(0.1, 8.0))
        if kind in ("slow", "slow_link"):
            fault["factor"] = 0.3 if kind == "slow" else 0.01
        if kind == "delay_reports":
            fault["by_s"] = 2.0
        events.append(FaultSpec(**fault))
    return {
        "members": members,
        "work": workload(np.cumsum(gaps).tolist(), prompts, outputs, hashes=hashes, best_of=best_of, priority=priority),
        "faults": events,
        "policy": draw(st.sampled_from(POLICIES)),
        "transfer": draw(st.sampled_from(TRANSFERS)),
        "layout": draw(st.sampled_from([PLAIN, PLAIN, *WINDOWS])),
        "kv_blocks": draw(st.sampled_from([90, 150, 1000])),
        "batch": draw(st.sampled_from(["chunked", "prefill_first"])),
        "max_seqs": draw(st.sampled_from([4, 64])),
        "reserve_first": draw(st.booleans()),
        "gbytes_per_s": draw(st.sampled_from([0.2, 25.0])),
    }


LIMITS = Limits(request_timeout_s=120.0, transfer_timeout_s=3.0, max_attempts=6)


def run(scenario: dict[str, object], log: EventLog | None = None, *, check: bool = True) -> World:
    rest = {k: v for k, v in scenario.items() if k not in ("work", "faults", "policy")}
    world = small_world(
        scenario["work"],  # type: ignore[arg-type]
        policy=load_policy.build(scenario["policy"], Path()),
        limits=LIMITS,
        switch_s=0.3,
        log=log,
        check=check,
        **rest,  # type: ignore[arg-type]
    )
    faults.plan(world, scenario["faults"])  # type: ignore[arg-type]
    world.run()
    return world


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_every_request_ends_and_nothing_leaks(scenario: dict[str, object]) -> None:
    world = run(scenario)
    work = world.workload
    frame = world.records.frame().set_index("request_id").sort_index()
    assert frame.index.tolist() == list(range(len(work))), "every request has one record"
    assert world.leaked_blocks == 0
    assert not world.jobs
    assert not world.router.cluster.live
    for instance in world.router.cluster.instances:
        assert (instance.prefill_requests, instance.prefill_tokens, instance.decode_requests, instance.decode_tokens) == (0, 0, 0, 0)
    done = frame[frame.status == "done"]
    expected = work.output_tokens[done.index] * (1 if work.best_of is None else work.best_of[done.index])
    assert (done.output_tokens == expected).all(), "each token once"
    assert (frame.finish_s - frame.arrival_s).max() <= LIMITS.request_timeout_s + 1.0 + 1e-9
    moved = done[done.transfer_end_s.notna() & (done.migrations == 0)]
    assert (moved.decode_start_s >= moved.transfer_end_s).all(), "no second token before the transfer is complete"
    if not scenario["faults"]:
        assert len(done) == len(work), frame.reason.dropna().tolist()
    for link in world.network.stats():
        assert link.utilisation <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(scenarios())
def test_same_seed_same_log_and_a_replay_decides_alike(tmp_path_factory: pytest.TempPathFactory, scenario: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("logs")
    for name in ("one", "two"):
        with EventLog(folder / name, HEAD) as log:
            world = run(scenario, log, check=False)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    _, entries = read(folder / "one")
    old = world.router
    fresh = Router(
        load_policy.build(scenario["policy"], Path()),
        seed=1,
        limits=LIMITS,
        reserve_first=old.pairs,
        first_token=old.first_token,
        hash_tokens=16,
    )
    count, difference = replay(entries, fresh)
    assert count > 0
    assert difference is None


@settings(max_examples=40, deadline=None)
@given(scenarios())
def test_a_voluntary_switch_never_empties_a_role(scenario: dict[str, object]) -> None:
    scenario = {**scenario, "faults": [], "policy": {"name": "xllm_slo_aware", "tick_s": 0.1, "min_flip_interval_s": 0.2}}
    world = small_world(
        scenario["work"],  # type: ignore[arg-type]
        policy=load_policy.build(scenario["policy"], Path()),
        members=scenario["members"],  # type: ignore[arg-type]
        switch_s=0.3,
    )

    def both_roles_ready(*_: object) -> None:
        instances = world.router.cluster.instances
        ready = [x.role for x in instances if x.state is InstanceState.READY]
        switching = [x.role for x in instances if x.state is InstanceState.SWITCHING]
        if len(instances) == len(scenario["members"]):  # type: ignore[arg-type]
            assert ready, "somebody serves both meanwhile"
            for does in ("prefills", "decodes"):
                assert any(getattr(r, does) for r in ready) or Role.MIXED in switching

    world.teller.on_event = both_roles_ready
    world.run()


def test_the_stage_that_ended_a_request_is_recorded() -> None:
    world = small_world(workload([0.0, 0.1], 5000, 10), kv_blocks=100)
    world.run()
    assert set(world.records.column("status")) == {float(Stage.FAILED)}
    assert "needs 313 KV blocks, more than the 100 that prefill-0 has" in world.records.reasons[0]
    assert math.isnan(world.records.column("first_token_s")[0])
