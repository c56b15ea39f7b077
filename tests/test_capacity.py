"""An instance that can never hold a request is passed over by the router, whatever the policy; only when nobody ever can is it refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.policy import Policy, Reject
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.types import (
    Abort,
    Action,
    Arrived,
    Dispatch,
    Drained,
    End,
    Finished,
    Handoff,
    InstanceSpec,
    Joined,
    Left,
    Migrate,
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
)
from pdlab.core.view import Cluster, Instance
from pdlab.policies.load import names, policy_class

CLASSES = {name: policy_class(name, Path(__file__).parent) for name in names()}
ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}


def spec(name: str, kv_blocks: int, **fields: object) -> InstanceSpec:
    return InstanceSpec(name=name, role=ROLES[name[0].upper()], kv_blocks=kv_blocks, **fields)  # type: ignore[arg-type]


def router(members: dict[str, int], policy: Policy | None = None, **options: object) -> Router:
    """By name, whose first letter is the role: KV blocks of 16 tokens."""
    made = Router(policy or Policy(), **options)  # type: ignore[arg-type]
    for name, blocks in members.items():
        made.handle(Joined(spec(name, blocks)), 0.0)
    return made


def arrive(r: Router, i: int = 0, prompt: int = 700, output: int = 300, now: float = 0.0, **fields: object) -> list[Action]:
    return r.handle(Arrived(Request(i, now, prompt, **fields), output), now)  # type: ignore[arg-type]


class Stubborn(Policy):
    """Answers with the instance of that name, whatever it is shown."""

    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill, self.decode = prefill, decode
        self.names: dict[str, Instance] = {}

    def observe(self, event: object, cluster: Cluster) -> None:
        self.names = {x.name: x for x in cluster.instances}

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        return self.names[self.prefill]

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self.names[self.decode]


def test_a_mixed_instance_that_is_too_small_is_passed_over() -> None:
    r = router({"m0": 50, "m1": 1000})
    assert arrive(r) == [Dispatch(0, 1, "m1", "m1")]
    assert arrive(r, 1, 100, 100) == [Dispatch(1, 1, "m0", "m0")], "which holds this one"


def test_a_prefill_instance_needs_the_prompts_blocks_only() -> None:
    r = router({"p0": 44, "p1": 1000, "d0": 1000})
    assert arrive(r, 0, 704, 9000) == [Dispatch(0, 1, "p0")], "44 blocks of 16"
    assert arrive(r, 1, 705, 9000) == [Dispatch(1, 1, "p1")]


def test_the_decode_instance_holds_all_but_the_last_token() -> None:
    r = router({"p0": 1000, "d0": 50, "d1": 1000})
    for i, (output, name) in enumerate(((101, "d0"), (102, "d1"))):
        arrive(r, i, 700, output)
        assert r.handle(PrefillDone(i, 1, "p0"), 1.0) == [Handoff(i, 1, "p0", name)]
        r.handle(Finished(i, 1, name, output), 2.0)


def test_pairs_are_chosen_among_those_who_can_hold_it() -> None:
    assert arrive(router({"p0": 40, "p1": 1000, "d0": 50, "d1": 1000}, reserve_first=True)) == [Dispatch(0, 1, "p1", "d1")]


def test_the_model_s_context_bounds_a_request_too() -> None:
    r = Router(Policy())
    r.handle(Joined(spec("m0", 10_000, context_tokens=999)), 0.0)
    r.handle(Joined(spec("m1", 10_000, context_tokens=1000)), 0.0)
    assert arrive(r) == [Dispatch(0, 1, "m1", "m1")]
    (end,) = arrive(r, 1, 700, 301)
    assert isinstance(end, End) and end.unfit and end.stage is Stage.FAILED
    assert end.reason == "with 700 tokens of prompt and 301 of output it exceeds the context of 1,000 tokens that m1 has"
    (end,) = arrive(r, 2, 10_000, 10)
    assert isinstance(end, End)
    assert end.reason == "its prompt of 10,000 tokens exceeds the context of 1,000 tokens that m1 has"


def test_blocks_that_admission_keeps_free_are_no_single_request_s() -> None:
    r = Router(Policy())
    r.handle(Joined(spec("m0", 100, spare_blocks=1)), 0.0)
    assert arrive(r, 0, 99 * 16, 1) == [Dispatch(0, 1, "m0", "m0")]
    (end,) = arrive(r, 1, 99 * 16 + 1, 1)
    assert isinstance(end, End) and "needs 100 KV blocks, more than the 99 of 100 that m0 lets one request have" in end.reason


def test_one_that_does_not_tell_its_blocks_is_asked() -> None:
    assert arrive(router({"m0": 0, "m1": 10})) == [Dispatch(0, 1, "m0", "m0")]


def test_nobody_can_is_said_at_once_in_numbers_even_behind_others() -> None:
    r = router({"p0": 100, "d0": 62})
    arrive(r, 0, 100, 10)
    r.handle(Refused(0, 1, "d0"), 0.1)
    (end,) = arrive(r, 1, 1500, 300)
    assert isinstance(end, End) and end.unfit
    assert end.reason == "with 1,500 tokens of prompt and 300 of output it needs 113 KV blocks, more than the 100 that p0 has"
    (end,) = arrive(r, 2, 5000, 10)
    assert isinstance(end, End) and end.reason == "its prompt of 5,000 tokens needs 313 KV blocks, more than the 100 that p0 has"
    r.check()


def test_where_nobody_of_a_role_can_hold_it_the_other_role_serves_both_phases() -> None:
    assert arrive(router({"p0": 1000, "d0": 50})) == [Dispatch(0, 1, "p0", "p0")], "no decode instance can"
    assert arrive(router({"p0": 40, "d0": 1000})) == [Dispatch(0, 1, "d0", "d0")], "no prefill instance can"


@pytest.mark.parametrize("members", [{"p0": 40, "p1": 1000, "d0": 50, "d1": 1000}, {"m0": 50, "m1": 1000}], ids=["PD", "mixed"])
def test_a_policy_that_does_not_look_is_overruled(members: dict[str, int]) -> None:
    small, large = [*members][:2]
    r = router(members, Stubborn(small, "d0" if "d0" in members else small))
    r.handle(Report(small, free_blocks=40), 0.0)
    (dispatch,) = arrive(r)
    assert isinstance(dispatch, Dispatch) and dispatch.instance == large
    if "d0" in members:
        assert r.handle(PrefillDone(0, 1, large), 1.0) == [Handoff(0, 1, large, "d1")]
    assert arrive(r, 1, 100, 10)[0] == Dispatch(1, 1, small, small if small == "m0" else None), "and followed where it may be"


def test_who_joins_later_is_passed_over_or_asked_like_the_others() -> None:
    r = router({"m0": 1000})
    r.handle(Joined(InstanceSpec(name="a", role=Role.MIXED, kv_blocks=10)), 1.0)
    assert arrive(r, 0, now=1.1) == [Dispatch(0, 1, "m0", "m0")]
    r.handle(Joined(InstanceSpec(name="a", role=Role.MIXED, kv_blocks=1000, incarnation=1)), 2.0)
    assert arrive(r, 1, now=2.1) == [Dispatch(1, 1, "a", "a")], "its new incarnation is larger"


def test_after_a_loss_those_who_are_left_and_can_hold_it_serve_it() -> None:
    r = router({"p0": 1000, "d0": 1000, "d1": 50, "d2": 1000})
    arrive(r)
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Handoff(0, 1, "p0", "d0")]
    r.handle(Transferred(0, 1, "d0"), 1.1)
    assert r.handle(Left("d0", 0, {0: 7}), 2.0) == [Dispatch(0, 3, "p0", None, 7)]
    assert r.handle(PrefillDone(0, 3, "p0"), 3.0) == [Handoff(0, 3, "p0", "d2")]
    r.check()


def test_what_a_client_has_is_prompt_when_it_is_tried_again() -> None:
    r = router({"p0": 44, "p1": 1000, "d0": 1000})
    assert arrive(r, 0, 700, 300) == [Dispatch(0, 1, "p0")]
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    r.handle(Transferred(0, 1, "d0"), 1.1)
    assert r.handle(Joined(InstanceSpec(name="d0", role=Role.DECODE, kv_blocks=1000, incarnation=1)), 2.0) == [Dispatch(0, 3, "p0")]
    r.handle(PrefillDone(0, 3, "p0"), 3.0)
    r.handle(Transferred(0, 3, "d0"), 3.1)
    assert r.handle(Left("d0", 1, {0: 50}), 4.0) == [Dispatch(0, 5, "p1", "p1", 50)], "750 tokens, and nobody else decodes"


def test_one_that_could_hold_it_and_is_gone_is_said_to_be_missing() -> None:
    r = router({"m0": 50, "m1": 1000})
    r.handle(Left("m1", 0), 1.0)
    (end,) = arrive(r, now=1.1)
    assert isinstance(end, End) and (end.stage, end.unfit) == (Stage.REJECTED, False), "it may be there again when it is asked again"
    assert end.reason.startswith("no instance that can hold it is ready: with 700 tokens of prompt")
    assert arrive(r, 1, 100, 10, now=1.2) == [Dispatch(1, 1, "m0", "m0")]


def test_one_that_could_hold_it_and_comes_back_is_waited_for() -> None:
    class Flip(Policy):
        tick_s = 1.0

        def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
            return [(x, Role.PREFILL) for x in cluster.instances if x.name == "m1" and cluster.now < 2.0]

    r = router({"m0": 50, "m1": 1000}, Flip())
    assert r.handle(Tick(), 1.0) == [Switch("m1", Role.PREFILL)]
    assert arrive(r, now=1.1) == []
    assert r.handle(Switched("m1", 0, Role.PREFILL), 3.0) == [Dispatch(0, 1, "m1", "m1")]


def test_a_running_request_is_not_moved_to_where_it_would_not_fit() -> None:
    class Move(Policy):
        tick_s = 1.0

        def migrate(self, cluster: Cluster) -> list[tuple[int, Instance]]:
            return [(0, x) for x in cluster.instances if x.name in ("d0", "d2")]

    r = router({"p0": 1000, "d0": 50, "d1": 1000, "d2": 1000}, Move())
    arrive(r)
    assert r.handle(PrefillDone(0, 1, "p0"), 0.1) == [Handoff(0, 1, "p0", "d1")]
    r.handle(Transferred(0, 1, "d1"), 0.2)
    assert r.handle(Tick(), 1.0) == [Migrate(0, 1, "d1", "d2")]


# ---------------------------------------------------------------- everybody gone


def test_the_last_instance_s_requests_end_with_it() -> None:
    r = router({"m0": 1000})
    arrive(r, 0)
    arrive(r, 1)
    assert r.handle(Left("m0", 0, {0: 5}), 1.0) == [
        End(0, Stage.FAILED, "no instance is ready"),
        End(1, Stage.REJECTED, "no instance is ready"),
    ]
    assert not r.cluster.live and not r.requests.queue
    r.check()


def test_a_draining_instance_is_nobody_to_wait_for() -> None:
    r = router({"p0": 1000, "d0": 1000})
    arrive(r)
    r.handle(Drained("p0", 0), 0.5)
    r.handle(Left("d0", 0), 0.6)
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Abort(0, 1, "p0"), End(0, Stage.REJECTED, "no instance is ready")]
    r.check()


def test_with_grace_they_wait_for_one_to_come_back() -> None:
    r = router({"m0": 1000}, limits=Limits(grace_s=5.0))
    arrive(r)
    assert r.handle(Left("m0", 0), 1.0) == []
    assert arrive(r, 1, now=5.0) == [], "and so do those who come now"
    assert r.handle(Tick(), 5.5) == []
    back = InstanceSpec(name="m0", role=Role.MIXED, kv_blocks=1000, incarnation=1)
    assert r.handle(Joined(back), 5.9) == [Dispatch(0, 3, "m0", "m0"), Dispatch(1, 1, "m0", "m0")]
    assert r.handle(Left("m0", 1), 7.0) == []
    assert [type(a) for a in r.handle(Tick(), 12.0)] == [End, End]
    assert arrive(r, 2, now=12.1) == [End(2, Stage.REJECTED, "no instance is ready")]


def test_an_instance_that_is_being_started_is_waited_for() -> None:
    class Grow(Policy):
        tick_s = 1.0

        def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
            return [Scale(1, Role.MIXED)] if len(cluster.instances) == 1 else []

    r = router({"m0": 1000}, Grow(), autoscale=(1, 2))
    arrive(r)
    assert r.handle(Tick(), 1.0) == [Scale(1, Role.MIXED)]
    assert r.handle(Left("m0", 0), 2.0) == []
    assert r.handle(Joined(spec("m1", 1000)), 3.0) == [Dispatch(0, 3, "m1", "m1")]


# ---------------------------------------------------------------- every policy


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, int]:
    roles = draw(st.sampled_from(["MM", "MMM", "PD", "PPD", "PDD", "PPDD", "PDM"]))
    return {f"{role.lower()}{i}": draw(st.sampled_from([0, 10, 40, 44, 63, 200])) for i, role in enumerate(roles)}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
@settings(max_examples=30, deadline=None)
@given(
    members=clusters(),
    lengths=st.lists(st.tuples(st.sampled_from([100, 640, 700, 3000]), st.sampled_from([2, 5, 300, 309])), min_size=1, max_size=8),
    pairs=st.booleans(),
    loses=st.booleans(),
)
def test_whatever_the_policy_nobody_is_asked_for_what_it_cannot_hold(
    cls: type[Policy], members: dict[str, int], lengths: list[tuple[int, int]], pairs: bool, loses: bool
) -> None:
    r = router(members, cls(), reserve_first=pairs)
    total = {i: sum(length) for i, length in enumerate(lengths)}
    room = {name: blocks * 16 + 1 if blocks else 1 << 40 for name, blocks in members.items()}
    gone: set[str] = set()
    placed: dict[int, str] = {}

    def see(actions: list[Action], now: float) -> None:
        for a in actions:
            if isinstance(a, Dispatch):
                alone = a.decode == a.instance
                assert (total[a.request_id] if alone else lengths[a.request_id][0] + a.sent_tokens + 1) <= room[a.instance], a
                if a.decode is not None:
                    assert total[a.request_id] <= room[a.decode], a
                    placed[a.request_id] = a.decode
                see(r.handle(PrefillDone(a.request_id, a.attempt, a.instance), now + 0.1), now + 0.1)
            elif isinstance(a, Handoff):
                assert total[a.request_id] <= room[a.dst], a
                placed[a.request_id] = a.dst
            elif isinstance(a, End) and a.stage is not Stage.REJECTED:
                assert a.unfit and max(room[name] for name in members if name not in gone) < total[a.request_id], a

    for i, (prompt, output) in enumerate(lengths):
        see(arrive(r, i, prompt, output, now=float(i), hashes=tuple(range(prompt // 16))), float(i))
        if loses and i == 1:
            gone.add(next(iter(members)))
            see(r.handle(Left(next(iter(members)), 0), i + 0.5), i + 0.5)
        r.check()
    waiting = [i for i in r.cluster.live if i not in placed]
    assert not waiting or cls is CLASSES["flow_control"], "nobody is full or away, and only a door may hold back"


def test_a_full_instance_that_could_never_hold_the_first_who_waits_is_open_to_the_others() -> None:
    r = router({"p0": 1000, "d0": 50, "d1": 1000}, reserve_first=True)
    arrive(r, 0, 100, 10)
    assert arrive(r, 1) == [Dispatch(1, 1, "p0", "d1")]
    r.handle(Refused(1, 1, "d1"), 0.1)
    r.handle(Refused(0, 1, "d0"), 0.2)
    assert [x.request.id for x in r.requests.queue] == [0, 1]
    arrive(r, 2)
    r.handle(Report("d0", taken_s=0.5, free_blocks=3), 0.5)
    assert r.by_name["d0"].full, "no room for the first who waits"
    r.handle(Report("d0", taken_s=0.6, free_blocks=40), 0.6)
    assert not r.by_name["d0"].full and r.cluster.live[0].decode is r.by_name["d0"]
    r.handle(Refused(0, 2, "d0"), 0.7)
    r.handle(Finished(0, 2, "d0"), 0.8)
    r.by_name["d0"].room = 0
    r.cluster.refresh()
    r.handle(Report("d0", taken_s=0.9, free_blocks=3), 0.9)
    assert not r.by_name["d0"].full, "who waits will never go there"
