"""Ways between instances that KV does not pass, as the router knows them; and what an instance cannot do is not asked of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.policy import Policy
from pdlab.core.reach import LEAST_PAUSE_S, MOST_PAUSE_S, Reach
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.types import (
    CAPABILITIES,
    PULL,
    RESERVE,
    SWITCH,
    Abort,
    Action,
    Arrived,
    Dispatch,
    End,
    Finished,
    Handoff,
    InstanceSpec,
    Joined,
    Left,
    Migrate,
    Migrated,
    Notice,
    PrefillDone,
    Refused,
    Report,
    Request,
    Role,
    Scale,
    Stage,
    Switch,
    Switched,
    Tick,
    Transferred,
    Unreachable,
)
from pdlab.core.view import Cluster, Instance
from pdlab.policies.freeness import Freeness

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
VLLM = {"engine": "vllm", "capabilities": (PULL,)}


def spec(name: str, **fields: object) -> InstanceSpec:
    return InstanceSpec(name=name, role=ROLES[name[0]], kv_blocks=1000, **fields)  # type: ignore[arg-type]


def router(names: str, policy: Policy | None = None, **options: object) -> Router:
    made = Router(policy or Policy(), **options)  # type: ignore[arg-type]
    for name in names.split():
        made.handle(Joined(spec(name)), 0.0)
    return made


def arrive(r: Router, i: int = 0, now: float = 0.0, **fields: object) -> list[Action]:
    return r.handle(Arrived(Request(i, now, 100, **fields)), now)  # type: ignore[arg-type]


def cut(r: Router, i: int, now: float, src: str = "p0", dst: str = "d0", *, held: bool = True) -> list[Action]:
    """A request is prefilled, handed over, and does not arrive."""
    arrive(r, i, now)
    r.handle(PrefillDone(i, 1, src), now)
    return r.handle(Unreachable(i, 1, src, dst, "no route", held), now)


# ------------------------------------------------------------ ways


def test_a_way_is_closed_for_longer_each_time_and_one_request_at_a_time_tries_it() -> None:
    reach, now, pauses = Reach(), 0.0, []
    for _ in range(6):
        assert reach.open("p", "d", now)
        reach.sends("p", "d", now)
        assert reach.open("p", "d", now) is (not pauses), "one tries"
        pauses.append(reach.failed("p", "d", now))
        assert reach.failed("p", "d", now + 0.1) == 0.0, "those that were under way count once"
        now += pauses[-1]
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert reach.open("d", "p", 0.0)
    assert reach.came("p", "d")
    assert reach.open("p", "d", 0.0)
    assert not reach.came("p", "d")


def test_who_has_gone_takes_what_is_known_of_him_along() -> None:
    reach = Reach()
    for way in (("p", "d"), ("d", "p"), ("p", "e")):
        reach.failed(*way, 0.0)
    reach.forget("d")
    assert list(reach.closed) == [("p", "e")]


@given(st.lists(st.tuples(st.sampled_from(["failed", "came", "sends"]), st.floats(0.0, 30.0)), max_size=40))
def test_a_closed_way_is_tried_again_within_a_minute_whatever_happened(steps: list[tuple[str, float]]) -> None:
    reach, now = Reach(), 0.0
    for step, after_s in steps:
        now += after_s
        if step == "came":
            reach.came("p", "d")
        elif step == "failed":
            pause_s = reach.failed("p", "d", now)
            assert pause_s == 0.0 or LEAST_PAUSE_S <= pause_s <= MOST_PAUSE_S
        elif reach.open("p", "d", now):
            reach.sends("p", "d", now)
    assert reach.open("p", "d", now + MOST_PAUSE_S)


# ------------------------------------------------------------ what the router makes of them


def test_another_decode_instance_reads_what_waits_and_later_requests_go_there_too() -> None:
    r = router("p0 d0 d1")
    actions = cut(r, 0, 1.0)
    assert [type(a) for a in actions] == [Notice, Handoff]
    assert actions[1] == Handoff(0, 1, "p0", "d1"), "nothing is computed again"
    assert "no KV from p0 to d0 for the next 5 s: no route" in str(actions[0])
    arrive(r, 1, 1.1)
    assert r.handle(PrefillDone(1, 1, "p0"), 1.2) == [Handoff(1, 1, "p0", "d1")]
    r.check()


def test_where_there_is_no_other_it_is_decoded_where_it_was_prefilled() -> None:
    r = router("p0 d0")
    assert cut(r, 0, 1.0)[1:] == [Handoff(0, 1, "p0", "p0")]
    assert r.cluster.live[0].stage is Stage.DECODE
    arrive(r, 1, 1.1)
    assert r.handle(PrefillDone(1, 1, "p0"), 1.2) == [Handoff(1, 1, "p0", "p0")]
    r.check()
    assert r.handle(Finished(0, 1, "p0", 5), 2.0) == r.handle(Finished(1, 1, "p0", 5), 2.0) == []
    r.check()


def test_one_that_would_reserve_first_stays_from_the_beginning() -> None:
    r = router("p0 d0", reserve_first=True)
    assert arrive(r, 0, 1.0) == [Dispatch(0, 1, "p0", "d0")]
    r.handle(PrefillDone(0, 1, "p0"), 1.1)
    lost = r.handle(Unreachable(0, 1, "p0", "d0", "no route"), 1.2)
    assert lost[1:] == [Abort(0, 1, "p0"), Abort(0, 1, "d0"), Dispatch(0, 3, "p0", "p0", 1)], "what was pushed is nowhere"
    assert arrive(r, 1, 1.3) == [Dispatch(1, 1, "p0", "p0")]
    r.check()


def test_one_waits_for_a_full_instance_that_it_reaches() -> None:
    r = router("p0 d0 d1")
    arrive(r, 9)
    r.handle(PrefillDone(9, 1, "p0"), 0.1)
    r.handle(Transferred(9, 1, "d0"), 0.1)
    arrive(r, 8)
    r.handle(PrefillDone(8, 1, "p0"), 0.2)
    r.handle(Refused(8, 1, "d1"), 0.3)  # it is full, and 8 goes to d0
    assert cut(r, 0, 1.0)[1:] == []
    assert [x.request.id for x in r.requests.handoffs] == [0]
    assert r.handle(Report("d1", taken_s=1.5, free_blocks=900), 1.5) == [Handoff(0, 1, "p0", "d1")]
    r.check()


def test_who_waits_for_one_way_holds_up_nobody_who_takes_another() -> None:
    class Second(Policy):
        def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
            return cluster.prefill[request.id % 2]

    r = router("p0 p1 d0 d1", Second())
    arrive(r, 8)
    r.handle(PrefillDone(8, 1, "p0"), 0.2)  # to d0
    arrive(r, 6)
    r.handle(PrefillDone(6, 1, "p0"), 0.2)  # to d1
    r.handle(Refused(6, 1, "d1"), 0.3)
    assert cut(r, 0, 1.0)[1:] == [], "p0 reaches d1 alone, which is full"
    arrive(r, 1, 1.1)
    assert r.handle(PrefillDone(1, 1, "p1"), 1.2) == [Handoff(1, 1, "p1", "d0")]
    assert [x.request.id for x in r.requests.handoffs] == [0]
    r.check()


def test_after_a_pause_one_tries_and_a_transfer_that_comes_opens_the_way() -> None:
    r = router("p0 d0")
    cut(r, 0, 1.0)
    for i, now, dst in ((1, 5.9, "p0"), (2, 6.1, "d0"), (3, 6.2, "p0")):
        arrive(r, i, now)
        assert r.handle(PrefillDone(i, 1, "p0"), now) == [Handoff(i, 1, "p0", dst)]
    assert r.handle(Transferred(2, 1, "d0"), 6.3) == [Notice("KV from p0 reaches d0 again")]
    arrive(r, 4, 6.4)
    assert r.handle(PrefillDone(4, 1, "p0"), 6.5) == [Handoff(4, 1, "p0", "d0")]


def test_a_transfer_that_is_late_closes_the_way_and_a_new_incarnation_opens_it() -> None:
    r = router("p0 d0 d1", limits=Limits(transfer_timeout_s=5.0, request_timeout_s=60.0))
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    for name in ("p0", "d0", "d1"):
        r.handle(Report(name, taken_s=5.5, free_blocks=1000), 5.5)
    actions = r.handle(Tick(), 6.1)
    assert "nothing came within 5 s" in str(actions[0])
    assert actions[-1] == Dispatch(0, 3, "p0", None, 1)
    assert r.handle(PrefillDone(0, 3, "p0"), 6.5) == [Handoff(0, 3, "p0", "d1")]
    r.handle(Left("d0", 0), 7.0)
    r.handle(Joined(spec("d0", incarnation=1)), 7.1)
    arrive(r, 1, 7.2)
    assert r.handle(PrefillDone(1, 1, "p0"), 7.3) == [Handoff(1, 1, "p0", "d0")]


def test_a_policy_that_insists_on_a_closed_way_is_overruled() -> None:
    class First(Policy):
        def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
            return next(x for x in cluster.instances if x.name == "d0")

    r = router("p0 d0 d1", First())
    assert cut(r, 0, 1.0)[1:] == [Handoff(0, 1, "p0", "d1")]


# ------------------------------------------------------------ what an instance can do


class Wish(Policy):
    tick_s = 1.0

    def __init__(self, *wishes: tuple[object, object]) -> None:
        self.wishes = wishes

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        names = {x.name: x for x in cluster.instances}
        return [(i, names[name]) for i, name in self.wishes if isinstance(i, int) and isinstance(name, str)]

    def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
        names = {x.name: x for x in cluster.instances}
        return [(names[name], role) for name, role in self.wishes if isinstance(name, str) and isinstance(role, Role)]


def decoding(r: Router, i: int, name: str, **fields: object) -> None:
    arrive(r, i, **fields)
    r.handle(PrefillDone(i, 1, "p0"), 0.2)
    assert r.cluster.live[i].decode is r.by_name[name]
    r.handle(Transferred(i, 1, name), 0.3)


@pytest.mark.parametrize("unable", ["d0", "d1"])
def test_a_migration_that_an_end_of_it_cannot_make_is_left_out_and_told_once(unable: str) -> None:
    r = router("p0", Wish((0, "d1")))
    for name in ("d0", "d1"):
        r.handle(Joined(spec(name, **(VLLM if name == unable else {}))), 0.0)
    decoding(r, 0, "d0")
    assert r.handle(Tick(), 1.0) == [Notice(f"policy Wish.migrate: {unable} (engine vllm) cannot migrate, so nothing is done")]
    assert r.handle(Tick(), 2.0) == []
    assert r.cluster.live[0].migrating is None


def test_of_several_candidates_none_is_moved() -> None:
    r = router("p0 d0 d1", Wish((0, "d1")))
    decoding(r, 0, "d0", best_of=2)
    assert r.handle(Tick(), 1.0) == [Notice("policy Wish.migrate: requests with best_of above 1 cannot be moved, so nothing is done")]


def test_a_migration_that_does_not_get_through_closes_its_way_for_a_while() -> None:
    r = router("p0 d0 d1", Wish((0, "d1")))
    decoding(r, 0, "d0")
    assert r.handle(Tick(), 1.0) == [Migrate(0, 1, "d0", "d1")]
    assert [type(a) for a in r.handle(Unreachable(0, 1, "d0", "d1", "no route", held=True), 1.1)] == [Notice]
    assert r.cluster.live[0].decode is r.by_name["d0"], "it goes on"
    assert r.handle(Tick(), 2.0) == []
    for name in ("p0", "d0", "d1"):
        r.handle(Report(name, taken_s=6.0, free_blocks=1000), 6.0)
    assert r.handle(Tick(), 7.0) == [Migrate(0, 1, "d0", "d1")]
    assert r.handle(Migrated(0, 1, "d0", "d1"), 7.1) == [Notice("KV from d0 reaches d1 again")]


def test_freeness_moves_nothing_to_or_from_one_that_cannot() -> None:
    r = router("p0", Freeness(tick_s=1.0))
    for name, more in (("d0", {}), ("d1", VLLM), ("d2", {})):
        r.handle(Joined(spec(name, **more)), 0.0)
    for i in range(6):
        decoding(r, i, f"d{i % 3}")
    for name, free in (("d0", 1), ("d1", 990), ("d2", 900)):
        r.handle(Report(name, taken_s=0.9, free_blocks=free, running=2), 0.9)
    moves = [a for a in r.handle(Tick(), 1.0) if isinstance(a, Migrate)]
    assert [(a.src, a.dst) for a in moves] == [("d0", "d2")]


def test_a_role_is_not_changed_where_the_engine_cannot() -> None:
    r = router("p0 p1 d0", Wish(("p2", Role.DECODE)))
    r.handle(Joined(spec("p2", capabilities=tuple(c for c in CAPABILITIES if c != SWITCH))), 0.0)
    assert r.handle(Tick(), 1.0) == [Notice("policy Wish.resize: p2 (engine pdlab) cannot switch, so nothing is done")]


def test_who_cannot_reserve_is_chosen_at_once_and_hears_of_it_after_prefill() -> None:
    r = router("p0", reserve_first=True)
    r.handle(Joined(spec("d0", capabilities=tuple(c for c in CAPABILITIES if c != RESERVE))), 0.0)
    assert arrive(r) == [Dispatch(0, 1, "p0")]
    assert r.by_name["d0"].decode_requests == 1, "its place is counted"
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Handoff(0, 1, "p0", "d0")]
    r.check()


def test_the_first_token_is_prefills_only_where_whoever_decodes_goes_on_from_it() -> None:
    r = router("p0 d0")
    assert arrive(r, 0)[0].goes_on  # type: ignore[attr-defined]
    r.handle(Joined(spec("d1", **VLLM)), 0.1)
    assert not arrive(r, 1, 0.2)[0].goes_on  # type: ignore[attr-defined]
    r.handle(PrefillDone(0, 1, "p0"), 0.3)
    r.handle(Transferred(0, 1, "d0"), 0.4)
    assert cut(r, 2, 0.5)[1:] == [Handoff(2, 1, "p0", "d1")]
    assert r.handle(Left("d0", 0), 0.6)[-1] == Dispatch(0, 3, "p0", goes_on=False)


def test_who_has_a_first_token_goes_to_nobody_that_cannot_go_on_from_it() -> None:
    r = router("p0 d0")
    arrive(r, 0)
    r.handle(Joined(spec("d1", **VLLM)), 0.1)
    r.handle(PrefillDone(0, 1, "p0"), 0.3)
    assert r.handle(Unreachable(0, 1, "p0", "d0", "no route", held=True), 0.4)[1:] == [Handoff(0, 1, "p0", "p0")]


# ------------------------------------------------------------ how many, and who


def test_no_more_requests_are_taken_in_than_may_be_in_flight() -> None:
    r = router("p0 d0", limits=Limits(max_in_flight=2))
    arrive(r, 0)
    arrive(r, 1)
    assert r.overloaded
    assert arrive(r, 2) == [End(2, Stage.REJECTED, "2 requests are in flight, and no more may be", overload=True)]
    assert list(r.cluster.live) == [0, 1]
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    r.handle(Finished(0, 1, "d0", 1), 1.1)
    assert isinstance(arrive(r, 3, 1.2)[0], Dispatch)


def test_of_two_mixed_instances_one_comes_to_prefill_and_one_to_decode() -> None:
    r = router("m0 m1", Wish(("m0", Role.DECODE), ("m1", Role.PREFILL)))
    assert r.handle(Tick(), 1.0) == [Switch("m0", Role.DECODE)], "the other serves meanwhile"
    r.handle(Switched("m0", 0, Role.DECODE), 2.0)
    assert r.handle(Tick(), 2.0) == [Switch("m1", Role.PREFILL)]
    assert arrive(r, 0, 2.1) == [Dispatch(0, 1, "m0", "m0")], "meanwhile it does both"
    r.handle(Switched("m1", 0, Role.PREFILL), 3.0)
    assert arrive(r, 1, 3.1) == [Dispatch(1, 1, "m1")]
    assert r.handle(PrefillDone(1, 1, "m1"), 3.2) == [Handoff(1, 1, "m1", "m0")]


def test_the_last_of_a_role_neither_flips_nor_goes() -> None:
    for wish in (("p0", Role.DECODE), ("d0", Role.PREFILL)):  # both at once are a swap
        assert router("p0 d0", Wish(wish)).handle(Tick(), 1.0) == []
    r = router("p0 m0", Wish(("m0", Role.PREFILL)))
    assert r.handle(Tick(), 1.0) == []
    r = router("m0", Wish(("m0", Role.PREFILL)))
    assert r.handle(Tick(), 1.0) == []


def test_an_event_about_another_attempt_says_nothing() -> None:
    r = router("p0 d0")
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 0.1)
    assert r.handle(Unreachable(0, 7, "p0", "d0", "no route", held=True), 0.2) == []
    assert r.handle(Unreachable(5, 1, "p0", "d0", "no route", held=True), 0.2) == []
    assert not r.cluster.reach.closed


def test_notices_and_ways_pass_through_the_log() -> None:
    event = Unreachable(3, 2, "p0", "d0", "no route", held=True)
    assert msgspec.json.decode(msgspec.json.encode(event), type=Unreachable) == event
