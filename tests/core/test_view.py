"""What the router puts in a policy's view: links, caches, predictors, and what an instance cannot say of itself."""

from __future__ import annotations

import pytest

from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.types import (
    UNKNOWN,
    Arrived,
    Finished,
    Handoff,
    InstanceSpec,
    Joined,
    Left,
    Migrated,
    PrefillDone,
    Refused,
    Report,
    Request,
    Role,
    StepTime,
    Tick,
    TransferFailed,
    Transferred,
)
from pdlab.policies.xllm_slo_aware import XllmSloAware

MB = 1 << 20


def spec(name: str, **more: object) -> InstanceSpec:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
    return InstanceSpec(**{"name": name, "role": role, "kv_blocks": 1000, "block_bytes": MB, **more})  # type: ignore[arg-type]


def router(*specs: InstanceSpec, policy: Policy | None = None) -> Router:
    made = Router(policy or Policy())
    for one in specs:
        made.handle(Joined(one), 0.0)
    return made


def prefilled(r: Router, i: int, tokens: int = 160, hashes: tuple[int, ...] = ()) -> None:
    r.handle(Arrived(Request(i, 0.0, tokens, hashes)), 0.0)
    [handoff] = r.handle(PrefillDone(i, 1, "p0"), 1.0)
    assert isinstance(handoff, Handoff)
    r.check()


# ---------------------------------------------------------------- links


def test_bytes_in_flight_are_counted_by_pair_from_hand_off_to_arrival() -> None:
    r = router(spec("p0"), spec("d0"), spec("d1"))
    links = r.cluster.links
    for i, tokens in enumerate((160, 170, 32)):
        prefilled(r, i, tokens)
    assert links.in_flight_bytes == {("p0", "d0"): 12 * MB, ("p0", "d1"): 11 * MB}
    r.handle(Transferred(1, 1, "d1"), 1.1)
    r.check()
    assert links.in_flight_bytes == {("p0", "d0"): 12 * MB}
    r.handle(TransferFailed(2, 1, "p0", "d0", "cut"), 1.2)
    r.check()
    assert links.in_flight_bytes == {("p0", "d0"): 10 * MB}
    r.handle(Finished(0, 1, "d0", 1), 1.2)
    r.check()
    assert not links.in_flight_bytes


def test_what_is_refused_or_dies_flies_no_more() -> None:
    r = router(spec("p0"), spec("d0"), spec("d1"))
    prefilled(r, 0)
    r.handle(Refused(0, 1, "d0"), 1.1)
    r.check()
    assert list(r.cluster.links.in_flight_bytes) == [("p0", "d1")]
    r.handle(Left("d1", 0), 1.2)
    r.check()
    assert not r.cluster.links.in_flight_bytes


def test_a_migration_flies_too() -> None:
    class Away(Policy):
        tick_s = 1.0

        def migrate(self, cluster):  # type: ignore[no-untyped-def]
            return [(live.request.id, cluster.decode[1]) for live in cluster.live.values() if live.decode is cluster.decode[0]]

    r = router(spec("p0"), spec("d0"), spec("d1"), policy=Away())
    prefilled(r, 0)
    r.handle(Transferred(0, 1, "d0"), 1.1)
    r.handle(Tick(), 2.0)
    r.check()
    assert r.cluster.links.in_flight_bytes == {("d0", "d1"): 10 * MB}
    r.handle(Migrated(0, 1, "d0", "d1", 10 * MB, 0.5), 2.5)
    r.check()
    assert not r.cluster.links.in_flight_bytes
    assert r.cluster.links.bytes_per_s(r.by_name["d0"], r.by_name["d1"]) == 20 * MB, "it is a transfer that was measured"


def test_a_pairs_bandwidth_is_what_transfers_reached_and_until_then_what_both_ends_say() -> None:
    near = {"host": "a", "host_bytes_per_s": 400e9, "link_bytes_per_s": 50e9}
    r = router(spec("p0", **near), spec("d0", **near), spec("d1", host="b", link_bytes_per_s=25e9))
    links, (p0, d0, d1) = r.cluster.links, (r.by_name[name] for name in ("p0", "d0", "d1"))
    assert (links.bytes_per_s(p0, d0), links.bytes_per_s(p0, d1)) == (400e9, 25e9)
    assert links.transfer_s(p0, d1, 25e9) == 1.0
    prefilled(r, 0)
    r.handle(Transferred(0, 1, "d0", 10 * MB, 10 * MB / 100e9), 1.1)
    assert links.bytes_per_s(p0, d0) == 100e9
    for i in (2, 4):  # others were on the way, too
        prefilled(r, i - 1)
        prefilled(r, i)
        r.handle(Transferred(i, 1, "d0", 10 * MB, 10 * MB / 50e9), 1.1)
    assert 80e9 < links.bytes_per_s(p0, d0) < 100e9
    r.handle(Left("d0", 0), 2.0)
    r.handle(Joined(spec("d0", incarnation=1)), 3.0)
    assert links.bytes_per_s(p0, r.by_name["d0"]) == 0.0


# ---------------------------------------------------------------- caches


def test_what_has_no_cache_is_never_taken_to_hold_anything() -> None:
    r = router(spec("p0", prefix_cache=False), spec("d0", prefix_cache=False))
    request = Request(0, 0.0, 160, tuple(range(10)))
    r.handle(Arrived(request), 0.0)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    assert r.cluster.cached_tokens(Request(1, 1.0, 160, tuple(range(10)))) == {}
    assert not r.cluster.index.holders


def test_what_does_not_tell_what_it_evicts_is_taken_to_hold_what_fits() -> None:
    r = router(spec("p0", kv_blocks=100, tells_cache=False), spec("d0"))
    p0 = r.by_name["p0"]
    for i in range(50):
        r.handle(Arrived(Request(i, 0.0, 161, tuple(range(10 * i, 10 * i + 10)))), 0.0)
        r.handle(PrefillDone(i, 1, "p0"), 1.0)
    held = [h for h, mask in r.cluster.index.holders.items() if mask & p0.bit]
    assert sorted(held) == list(range(400, 500))
    again = Request(50, 2.0, 161, tuple(range(400, 410)))
    r.handle(Arrived(again), 2.0)  # used once more
    r.handle(Arrived(Request(51, 2.0, 65, (1000, 1001, 1002, 1003))), 2.0)
    assert r.cluster.cached_tokens(again)[p0] == 160
    assert r.cluster.cached_tokens(Request(60, 2.0, 161, tuple(range(410, 420))))[p0] == 96, "a prompt's tail goes before its head"


def test_an_eviction_of_what_was_only_guessed_is_believed() -> None:
    r = router(spec("p0"), spec("d0"))
    r.handle(Arrived(Request(0, 0.0, 161, tuple(range(10)))), 0.0)
    r.handle(Report("p0", taken_s=1.0, stored=(0, 1), evicted=tuple(range(2, 10))), 1.0)
    assert r.cluster.cached_tokens(Request(1, 1.0, 161, tuple(range(10))))[r.by_name["p0"]] == 32


# ---------------------------------------------------------------- reports


def test_what_an_instance_cannot_say_comes_from_the_routers_ledger() -> None:
    r = router(spec("p0"), spec("d0"))
    p0, d0 = r.by_name["p0"], r.by_name["d0"]
    for i in range(4):
        r.handle(Arrived(Request(i, 0.0, 160)), 0.0)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    r.handle(Transferred(0, 1, "d0"), 1.0)
    nothing = dict.fromkeys(("waiting_tokens", "context_tokens", "used_blocks", "free_blocks", "waiting_blocks"), UNKNOWN)
    vague = {"waiting_head_blocks": UNKNOWN, **nothing}
    r.handle(Report("p0", taken_s=2.0, waiting=2, running=1, **vague), 2.0)
    assert (p0.report.waiting_tokens, p0.queued_tokens, p0.report.waiting_blocks, p0.report.waiting_head_blocks) == (480, 480, 30, 15)
    r.handle(Report("d0", taken_s=2.0, running=1, decode_steps=50, decode_s=1.0, **vague), 2.0)
    assert d0.decode_step_s == 0.02
    r.handle(Report("d0", taken_s=3.0, running=1, decode_steps=100, decode_s=2.0, **vague), 3.0)
    assert (d0.report.context_tokens, d0.report.used_blocks, d0.report.free_blocks) == (160 + 100, 17, 983)
    known = Report("d0", taken_s=4.0, context_tokens=7, used_blocks=1, free_blocks=999)
    r.handle(known, 4.0)
    assert d0.report == known


def test_a_decode_step_is_that_between_two_reports_whoever_counts_from_where() -> None:
    r = router(spec("p0"), spec("d0"))
    seen = []
    for steps, seconds in ((10, 0.5), (20, 0.7), (20, 0.7), (5, 0.1)):
        r.handle(Report("d0", taken_s=1.0, decode_steps=steps, decode_s=seconds), 1.0)
        seen.append(round(r.by_name["d0"].decode_step_s, 9))
    assert seen == [0.05, 0.02, 0.02, 0.02]


# ---------------------------------------------------------------- predictors


def test_a_policy_that_asks_for_predictions_of_whom_nothing_is_known_is_said_to_be_blind() -> None:
    r = router(spec("p0"), spec("p1"), spec("d0"), policy=XllmSloAware())
    assert r.blindness == ""
    spread = [r.handle(Arrived(Request(i, 0.0, 100)), 0.0)[0].instance for i in range(4)]  # type: ignore[attr-defined]
    assert spread == ["p0", "p1", "p0", "p1"], "it goes by load then"
    assert r.blindness.startswith("policy XllmSloAware asks how long steps take on d0, p0, p1, and was told 0 s: ")
    assert "hardware: profile.json" in r.blindness


def test_steps_that_are_told_open_its_eyes() -> None:
    r = router(spec("p0"), spec("p1"), spec("d0"), policy=XllmSloAware())
    steps = (StepTime(0, 0, 100, 10_000, 0.5),)
    for name in ("p0", "p1"):
        r.handle(Report(name, taken_s=1.0, steps=steps), 1.0)
    r.handle(Report("d0", taken_s=1.0, steps=(StepTime(2, 300, 0, 0, 0.02),)), 1.0)
    r.handle(Arrived(Request(0, 1.0, 200)), 1.0)
    assert r.blindness == ""
    assert 0.9 < r.by_name["p0"].ttft_s(200) < 1.1
    assert 0.015 < r.by_name["d0"].tpot_s(3, 400) < 0.03


def test_an_instance_that_slows_down_is_predicted_slow() -> None:
    profile = {"prefill_profile": ((100, 0.1), (1000, 1.0), (4000, 4.0), (8000, 8.0))}
    r = router(spec("p0", **profile), spec("p1", **profile), spec("d0"))
    for second in range(1, 11):
        r.handle(Report("p1", taken_s=second, steps=(StepTime(0, 0, 1000, 10**6, 3.0),)), second)
    assert r.by_name["p0"].ttft_s(1000) == pytest.approx(1.0)
    assert r.by_name["p1"].ttft_s(1000) == pytest.approx(3.0, rel=0.2)
