"""One policy, two worlds: what the live world decides over stand-ins is what the simulated one decides, event for event."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pdlab.core.instance_spec import MeasuredInstance
from pdlab.core.types import Action, Dispatch, End, Handoff, Migrate, Notice, Refused, Report, Tick, Unreachable
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.real.engine.messages import Ready
from pdlab.real.instance.member import measured_of
from pdlab.replay.log import Entry, read, replay
from pdlab.sim import simulate
from pdlab.workload.spec import build
from tests.support.virtual_cluster import Run, played, small

pytestmark = pytest.mark.usefixtures("no_front_end")

PUSH = {"mode": "push", "granularity": "request", "reserve": "before_prefill"}
SHAPES = {"1P1D": (1, 1, 0), "2P2D": (2, 2, 0), "mixed": (0, 0, 2), "1P1D1M": (1, 1, 1)}


def live(experiment: Experiment, log_path: Path, *, rejects: bool = False) -> Run:
    """Its requests, and instances cut apart as its faults say."""
    work = build(experiment.workload, experiment.seed, experiment.base_dir)

    async def play(made: Run) -> None:
        for fault in experiment.faults:
            assert fault.cut is not None and fault.by_s is not None and fault.for_s is not None
            made.loop.call_at(fault.at_s, made.rack.cut, *fault.cut, fault.by_s)
            made.loop.call_at(fault.at_s + fault.for_s, made.rack.cuts.clear)
        sizes = zip(work.arrival_s.tolist(), work.prompt_tokens.tolist(), work.output_tokens.tolist(), strict=True)
        for i, (at_s, prompt, output) in enumerate(sizes):
            hashes = () if work.hashes is None else work.hashes[i][: prompt // work.hash_tokens]
            made.submit_at(at_s, prompt, output, hashes)
        await made.until(lambda: len(made.clients) == len(work))

    made = played(experiment, play, log_path, work.hash_tokens)
    assert rejects or all(client.done for client in made.clients.values())
    return made


def decisions(log_path: Path, kinds: tuple[type[Action], ...] = (Dispatch, Handoff)) -> list[tuple[float, Action]]:
    _, entries = read(log_path)
    return [(entry.now, action) for entry in entries for action in entry.actions if isinstance(action, kinds)]


def happenings(log_path: Path) -> list[Entry]:
    _, entries = read(log_path)
    return [entry for entry in entries if entry.actions or not isinstance(entry.event, (Report, Tick))]


@pytest.mark.parametrize("transfer", [{}, {"first_token": "decode"}, PUSH], ids=["pull", "pull, first token from decode", "push"])
@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_live_world_decides_as_the_simulated_one(shape: str, policy: str, transfer: dict[str, Any], tmp_path: Path) -> None:
    prefill, decode, mixed = SHAPES[shape]
    experiment = small(policy, prefill=prefill, decode=decode, mixed=mixed, transfer=transfer)
    simulated = simulate(experiment, trace_events=tmp_path / "sim")
    made = live(experiment, tmp_path / "live")
    ours, theirs = decisions(tmp_path / "live"), decisions(tmp_path / "sim")
    assert [action for _, action in ours] == [action for _, action in theirs]
    np.testing.assert_allclose([at_s for at_s, _ in ours], [at_s for at_s, _ in theirs], rtol=0, atol=1e-6)
    for a, b in zip(happenings(tmp_path / "live"), happenings(tmp_path / "sim"), strict=True):
        assert type(a.event) is type(b.event)
    frame = made.world.lines.book.records.frame().set_index("request_id")
    told = simulated.records.frame().set_index("request_id").loc[frame.index]
    for name in (
        "arrival_s",
        "dispatched_s",
        "prefill_start_s",
        "first_token_s",
        "handoff_s",
        "transfer_start_s",
        "transfer_end_s",
        "finish_s",
    ):
        np.testing.assert_allclose(frame[name], told[name], rtol=0, atol=1e-6, err_msg=name)
    for name in ("prefill_instance", "decode_instance", "status", "output_tokens", "cached_tokens", "attempts", "transfer_bytes"):
        assert frame[name].astype(str).tolist() == told[name].astype(str).tolist(), name


@pytest.mark.parametrize(
    "transfer",
    [{**PUSH, "timeout_s": 2.0}, {"mode": "pull", "reserve": "before_prefill"}, {**PUSH, "timeout_s": 5000.0}],
    ids=["push", "pull", "push, patient"],
)
def test_a_prompt_may_wait_longer_than_a_transfer_may_take(transfer: dict[str, Any], tmp_path: Path) -> None:
    members = [{"role": "prefill", "count": 1, "hardware": "l4"}, {"role": "decode", "count": 1, "hardware": "h100-sxm"}]
    workload = {"source": "azure-conv-2023", "requests": 250, "rate": 1000.0}
    engine, limits = {"kv_blocks": 40000}, {"request_timeout_s": 5000.0}
    experiment = small(transfer=transfer, workload=workload, cluster={"instances": members}, engine=engine, limits=limits)
    told = simulate(experiment, trace_events=tmp_path / "sim").records.frame()
    lived = live(experiment, tmp_path / "live").world.lines.book.records.frame()
    for frame in (told, lived):
        assert (frame["handoff_s"] - frame["dispatched_s"]).max() > 40.0
        assert (frame["status"] == "done").all()
        assert (frame["attempts"] == 1).all()
    assert decisions(tmp_path / "live") == [(pytest.approx(at_s, abs=1e-6), action) for at_s, action in decisions(tmp_path / "sim")]


def test_they_decide_alike_where_prompts_share_prefixes(tmp_path: Path) -> None:
    workload = {"source": "mooncake-conversation", "requests": 100, "rate": 3.0}
    experiment = small("prefix_aware", prefill=2, decode=2, workload=workload, engine={"kv_blocks": 30000})
    simulate(experiment, trace_events=tmp_path / "sim")
    made = live(experiment, tmp_path / "live")
    ours, theirs = decisions(tmp_path / "live"), decisions(tmp_path / "sim")
    assert [action for _, action in ours] == [action for _, action in theirs]
    assert made.world.lines.book.records.column("cached_tokens").sum() > 0


def shares(log_path: Path) -> Counter[str]:
    return Counter(action.instance for _, action in decisions(log_path, (Dispatch,)) if isinstance(action, Dispatch))


def alike(experiment: Experiment, folder: Path) -> Counter[str]:
    """Both worlds' runs of it, which must decide alike and be told alike of every load; how many prompts each instance got."""
    simulate(experiment, trace_events=folder / "sim")
    live(experiment, folder / "live", rejects=True)
    kinds = (Dispatch, Handoff, Migrate, End)
    ours, theirs = decisions(folder / "live", kinds), decisions(folder / "sim", kinds)
    assert [action for _, action in ours] == [action for _, action in theirs]
    np.testing.assert_allclose([at_s for at_s, _ in ours], [at_s for at_s, _ in theirs], rtol=0, atol=1e-6)
    for a, b in zip(reports(folder / "live"), reports(folder / "sim"), strict=False):  # the live world reports on
        for field in Report.__struct_fields__:
            mine, other = getattr(a, field), getattr(b, field)
            if field == "steps":
                assert len(mine) == len(other), (a, b)
                for step, twin in zip(mine, other, strict=True):
                    assert msgspec.structs.astuple(step) == pytest.approx(msgspec.structs.astuple(twin), abs=1e-6), (a, b)
            elif field in ("stored", "evicted"):
                assert sorted(mine) == sorted(other), (a, b)
            else:
                assert mine == (pytest.approx(other, abs=1e-6) if isinstance(mine, float) else other), (field, a, b)
    return shares(folder / "live")


def reports(log_path: Path) -> list[Report]:
    _, entries = read(log_path)
    found = [entry.event for entry in entries if isinstance(entry.event, Report) and entry.event.taken_s > 0]  # not the one on joining
    return sorted(found, key=lambda report: (report.taken_s, report.instance))


def test_predicted_times_are_the_same_so_that_prompts_are_spread_alike(tmp_path: Path) -> None:
    """An instance that says nothing of its steps gets all of them from xLLM's policy, or none."""
    workload = {"source": "azure-conv-2023", "requests": 400, "rate": 40.0}
    spread = alike(small("xllm_slo_aware", prefill=3, decode=2, workload=workload), tmp_path)
    assert len(spread) == 3 and max(spread.values()) < 300, spread


def test_that_the_policy_goes_blind_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a profile nor, before the first reports, a step is known; then the steps are told, and nothing more is to be said."""

    def unmeasured(ready: Ready) -> MeasuredInstance:
        return replace(measured_of(ready), prefill_profile=(), decode_profile=())

    monkeypatch.setattr("tests.support.virtual_cluster.measured_of", unmeasured)
    made = live(small("xllm_slo_aware", prefill=2, decode=1), tmp_path / "log")
    (said,) = [record.getMessage() for record in caplog.records if "was told 0 s" in record.getMessage()]
    assert said.startswith("policy XllmSloAware asks how long steps take on decode-0, prefill-0")
    known = made.world.router.by_name
    assert known["prefill-0"].ttft_s(1000) > 0.0 and known["decode-0"].tpot_s(4, 4000) > 0.0
    assert min(shares(tmp_path / "log").values()) > 10


def test_the_same_requests_are_turned_away(tmp_path: Path) -> None:
    workload = {"source": "azure-conv-2023", "requests": 400, "rate": 40.0}
    spread = alike(small({"dispatch": "early_reject"}, prefill=1, decode=2, workload=workload, slo={"ttft_s": 0.3}), tmp_path)
    assert 0 < 400 - spread.total() < 100, spread


def test_a_slow_instance_gets_as_few(tmp_path: Path) -> None:
    rows = [{"role": role, "hardware": name} for role, name in (("prefill", "h100-sxm"), ("prefill", "l4"), ("decode", "h100-sxm"))]
    workload = {"source": "azure-conv-2023", "requests": 400, "rate": 10.0}
    cluster = {"instances": rows, "network": {"gbytes_per_s": 25, "latency_us": 10}}
    spread = alike(small("prefix_aware", workload=workload, cluster=cluster), tmp_path)
    assert 0 < spread["prefill-1"] < 40, spread


@pytest.mark.parametrize("policy", ["prefix_aware", "conditional"])
def test_where_nothing_is_cached_no_prompt_is_taken_for_cached(policy: str, tmp_path: Path) -> None:
    """All prompts begin alike: who counts on a cache that is off sends them all to one instance, or to those that decode."""
    sessions = {"turns": 1, "system_prompt_tokens": 700, "groups": 1}
    session = {"source": "synthetic", "requests": 300, "rate": 25.0, "prompt": 100, "output": 30, "sessions": sessions}
    experiment = small(policy, prefill=3, decode=2, workload=session, engine={"prefix_cache": False})
    spread = alike(experiment, tmp_path)
    assert spread.keys() == {"prefill-0", "prefill-1", "prefill-2"}, spread


SCARCE = {"kv_blocks": 1000, "max_model_len": 8192}


def alike_in_all(experiment: Experiment, folder: Path) -> list[Entry]:
    """What happens in the live world, which is what happens in the simulated one."""
    simulate(experiment, trace_events=folder / "sim")
    live(experiment, folder / "live")
    ours, theirs = happenings(folder / "live"), happenings(folder / "sim")
    for a, b in zip(ours, theirs, strict=False):
        assert (type(a.event), a.actions) == (type(b.event), b.actions), f"{a} live, {b} simulated"
        assert a.now == pytest.approx(b.now, abs=1e-6), f"{a} live, {b} simulated"
    assert len(ours) == len(theirs)
    return ours


@pytest.mark.parametrize("reserve", ["after_prefill", "before_prefill"])
def test_they_decide_alike_where_a_full_decode_instance_refuses_and_is_asked_no_quicker(reserve: str, tmp_path: Path) -> None:
    network = {"gbytes_per_s": 25, "latency_us": 2000}
    few = {"requests": 50}
    experiment = small(
        "least_loaded", prefill=2, decode=2, workload=few, transfer={"reserve": reserve}, engine=SCARCE, cluster={"network": network}
    )
    entries = alike_in_all(experiment, tmp_path)
    refused = 0
    asked_s: dict[int, float] = {}
    for entry in entries:
        if isinstance(entry.event, Refused):
            refused += 1
            assert entry.now - asked_s[entry.event.request_id] == pytest.approx(0.004, abs=1e-6), "there and back"
        asked_s |= {a.request_id: entry.now for a in entry.actions if isinstance(a, (Dispatch, Handoff))}
    assert refused > 10


CUT = {"at_s": 0.5, "cut": ["prefill-0", "decode-0"], "for_s": 9.0}
RESERVED = {"reserve": "before_prefill"}


@pytest.mark.parametrize("fails_s", [0.05, 100.0], ids=["refused", "in vain"])
@pytest.mark.parametrize("transfer", [{}, {"first_token": "decode"}, RESERVED, PUSH], ids=["pull", "D samples", "reserved", "push"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2)], ids=["1P1D", "2P1D", "2P2D"])
def test_they_decide_alike_where_two_do_not_reach_each_other(
    shape: tuple[int, int], transfer: dict[str, Any], fails_s: float, tmp_path: Path
) -> None:
    workload = {"requests": 100, "rate": 7.0}
    experiment = small(
        "least_loaded",
        prefill=shape[0],
        decode=shape[1],
        workload=workload,
        transfer={**transfer, "timeout_s": 2.0},
        faults=[{**CUT, "by_s": fails_s}],
    )
    entries = alike_in_all(experiment, tmp_path)
    assert [a for entry in entries for a in entry.actions if isinstance(a, Notice)]
    unreached = [entry for entry in entries if isinstance(entry.event, Unreachable)]
    assert bool(unreached) is (fails_s < 2.0 and transfer is not PUSH)
    there = {a.dst for entry in entries for a in entry.actions if isinstance(a, Handoff) and a.src == "prefill-0"}
    assert ("prefill-0" in there) is (shape[1] == 1 and transfer not in (RESERVED, PUSH)) or unreached, "it stays where it is"


def test_a_push_is_pushed_though_the_file_does_not_say_when_blocks_are_set_aside(tmp_path: Path) -> None:
    experiment = small("least_loaded", transfer={"mode": "push"}, workload={"requests": 20})
    alike_in_all(experiment, tmp_path)
    asked = [ask.params for ask in live(experiment, tmp_path / "again").rack.asked if ask.params is not None]
    pushed = [params for params in asked if params.do_remote_decode]
    assert len(pushed) == 20
    assert all(params.pdlab is not None and params.pdlab.push is not None for params in pushed), "or it is pulled"


def test_two_mixed_instances_are_given_a_role_each_in_both_worlds(tmp_path: Path) -> None:
    experiment = small("xllm_slo_aware", prefill=0, decode=0, mixed=2, workload={"requests": 200, "rate": 20.0})
    summary = simulate(experiment).summary
    made = live(experiment, tmp_path / "live")
    for roles in ({x["role"] for x in summary["instances"]}, {str(x.role) for x in made.world.router.cluster.instances}):
        assert roles == {"prefill", "decode"}
    assert min(x["requests"] for x in summary["instances"]) >= 80


def test_equal_runs_write_equal_logs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        live(small("prefix_aware", prefill=2, decode=2, transfer=PUSH), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_live_log_replays_to_the_same_actions(tmp_path: Path) -> None:
    experiment = small("prefix_aware", prefill=2, decode=2)
    live(experiment, tmp_path / "log")
    head, entries = read(tmp_path / "log")
    count, difference = replay(entries, router(experiment, hash_tokens=head.hash_tokens))
    assert count > 400
    assert difference is None
