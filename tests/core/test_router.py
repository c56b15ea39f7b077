"""The control plane event by event, without any world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from pdlab.core.policy import Policy, Reject
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.types import (
    Abort,
    Action,
    Arrived,
    Cancelled,
    Dispatch,
    Drained,
    End,
    Evict,
    Finished,
    Handoff,
    InstanceSpec,
    InstanceState,
    Joined,
    Leads,
    Left,
    Lost,
    Migrate,
    Migrated,
    PrefillDone,
    Refused,
    RegistryAway,
    Report,
    Request,
    Role,
    Scale,
    Stage,
    Stop,
    Switch,
    Switched,
    Tick,
    TransferFailed,
    Transferred,
    UsageError,
)
from pdlab.core.view import Cluster, Instance
from pdlab.policies.load import build

PD = (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE))


def spec(name: str, role: Role, incarnation: int = 0) -> InstanceSpec:
    return InstanceSpec(name=name, role=role, kv_blocks=1000, incarnation=incarnation)


def router(policy: Policy | None = None, members: Sequence[tuple[str, Role]] = PD, **options: object) -> Router:
    made = Router(policy or Policy(), **options)  # type: ignore[arg-type]
    for name, role in members:
        made.handle(Joined(spec(name, role)), 0.0)
    return made


def arrive(r: Router, i: int = 0, now: float = 0.0, **fields: object) -> list[Action]:
    return r.handle(Arrived(Request(i, now, 100, **fields)), now)  # type: ignore[arg-type]


def test_a_request_goes_from_prefill_to_decode_and_leaves_no_trace() -> None:
    r = router()
    assert arrive(r) == [Dispatch(0, 1, "p0")]
    assert (r.by_name["p0"].prefill_requests, r.by_name["p0"].prefill_tokens) == (1, 100)
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Handoff(0, 1, "p0", "d0")]
    r.check()
    assert r.handle(Transferred(0, 1, "d0"), 1.1) == []
    assert r.handle(Finished(0, 1, "d0", 10), 2.0) == []
    r.check()
    assert not r.cluster.live
    assert all(x.prefill_tokens == x.decode_tokens == 0 for x in r.cluster.instances)


def test_a_mixed_instance_keeps_what_it_prefilled() -> None:
    r = router(members=(("m0", Role.MIXED), ("m1", Role.MIXED)))
    assert arrive(r) == [Dispatch(0, 1, "m0", "m0")]
    assert r.handle(PrefillDone(0, 1, "m0"), 1.0) == []


def test_pairs_choose_the_decode_instance_at_dispatch() -> None:
    assert arrive(router(reserve_first=True)) == [Dispatch(0, 1, "p0", "d0")]


def test_refused_asks_another_then_waits_for_room_in_order() -> None:
    r = router(reserve_first=True)
    arrive(r)
    assert r.handle(Refused(0, 1, "d0"), 0.1) == [Dispatch(0, 2, "p0", "d1")], "another decode instance has room"
    assert r.handle(Refused(0, 2, "d1"), 0.2) == []
    assert arrive(r, 1, 0.3) == [], "behind the one that waits"
    assert [x.request.id for x in r.requests.queue] == [0, 1]
    answer = r.handle(Report("d1", taken_s=0.5, free_blocks=900), 0.5)
    assert answer == [Dispatch(0, 3, "p0", "d1"), Dispatch(1, 1, "p1", "d1")]


def test_after_prefill_a_full_decode_instance_holds_the_hand_off_back() -> None:
    r = router(members=(("p0", Role.PREFILL), ("d0", Role.DECODE)))
    for i in range(3):
        arrive(r, i)
        r.handle(PrefillDone(i, 1, "p0"), 1.0)
    assert r.handle(Refused(1, 1, "d0"), 1.1) == []
    assert r.handle(Refused(2, 1, "d0"), 1.1) == []
    r.check()
    assert r.handle(Finished(0, 1, "d0", 5), 2.0) == [Handoff(1, 1, "p0", "d0")], "as many tokens as have come free"
    assert r.handle(Report("d0", taken_s=2.5, free_blocks=1000), 2.5) == [Handoff(2, 1, "p0", "d0")]


def test_a_higher_priority_waits_in_front() -> None:
    r = router(reserve_first=True, members=(("p0", Role.PREFILL), ("d0", Role.DECODE)))
    arrive(r, 0)
    r.handle(Refused(0, 1, "d0"), 0.1)
    arrive(r, 1, 0.2)
    arrive(r, 2, 0.3, priority=1)
    assert [x.request.id for x in r.requests.queue] == [2, 0, 1]


def test_when_the_prefill_instance_dies_another_takes_over() -> None:
    r = router()
    arrive(r)
    assert r.handle(Left("p0", 0), 1.0) == [Dispatch(0, 3, "p1")]
    assert r.handle(PrefillDone(0, 1, "p0"), 1.1) == [], "what the dead attempt says changes nothing"
    assert r.handle(PrefillDone(0, 3, "p1"), 1.2) == [Handoff(0, 3, "p1", "d0")]
    r.check()


def test_when_the_decode_instance_dies_the_tokens_already_sent_become_prompt() -> None:
    r = router()
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    r.handle(Transferred(0, 1, "d0"), 1.1)
    assert r.handle(Left("d0", 0, {0: 7}), 2.0) == [Dispatch(0, 3, "p0", None, 7)]
    assert r.by_name["p0"].prefill_tokens == 107


def test_the_first_token_counts_as_sent_when_a_transfer_is_lost() -> None:
    for first, sent in (("prefill", 1), ("decode", 0)):
        r = router(first_token=first)
        arrive(r)
        r.handle(PrefillDone(0, 1, "p0"), 1.0)
        actions = r.handle(TransferFailed(0, 1, "p0", "d0", "link cut"), 2.0)
        assert actions == [Abort(0, 1, "p0"), Abort(0, 1, "d0"), Dispatch(0, 3, "p0", None, sent)]


def test_attempts_are_bounded() -> None:
    r = router(limits=Limits(max_attempts=2))
    arrive(r)
    r.handle(Left("p0", 0), 1.0)
    assert r.handle(Left("p1", 0), 2.0)[-1] == End(0, Stage.FAILED, "p1 died; gave up after 2 attempts")


def test_the_other_role_serves_both_phases_when_one_is_gone() -> None:
    r = router(members=(("p0", Role.PREFILL), ("d0", Role.DECODE)))
    r.handle(Left("d0", 0), 1.0)
    assert arrive(r, 0, 1.1) == [Dispatch(0, 1, "p0", "p0")]
    r = router(members=(("p0", Role.PREFILL), ("d0", Role.DECODE)))
    r.handle(Left("p0", 0), 1.0)
    assert arrive(r, 0, 1.1) == [Dispatch(0, 1, "d0", "d0")]
    r.handle(Left("d0", 0), 2.0)
    assert arrive(r, 1, 2.1) == [End(1, Stage.REJECTED, "no instance is ready")]


def test_an_older_incarnation_changes_nothing() -> None:
    r = router()
    r.handle(Joined(spec("p0", Role.PREFILL, 1)), 1.0)
    before = r.by_name["p0"]
    for event in (Left("p0", 0), Report("p0", 0, 1.0, waiting=99), Joined(spec("p0", Role.PREFILL, 0)), Switched("p0", 0, Role.DECODE)):
        assert r.handle(event, 2.0) == []
        assert r.by_name["p0"] is before
        assert (before.state, before.report.waiting, before.role) == (InstanceState.READY, 0, Role.PREFILL)


def test_a_restart_takes_the_place_of_the_dead_and_loses_its_requests() -> None:
    r = router()
    arrive(r)
    assert r.handle(Joined(spec("p0", Role.PREFILL, 1)), 1.0)[-1] == Dispatch(0, 3, "p0")
    assert [x.name for x in r.cluster.instances] == ["d0", "d1", "p0", "p1"]


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "prefix_aware", "xllm_slo_aware", "llumnix"])
def test_who_came_up_first_decides_nothing(policy: str) -> None:
    names = [f"{role}-{number}" for role in ("prefill", "decode", "mixed") for number in (0, 1, 2, 10)]
    decided = []
    for order in (names, names[::-1], sorted(names)):
        r = router(build(policy, Path()), [(name, Role(name.partition("-")[0])) for name in order])
        r.handle(Joined(spec("decode-2", Role.DECODE, 1)), 0.0)
        assert len({x.bit for x in r.cluster.instances}) == len(names)
        assert [x.index for x in r.cluster.instances] == list(range(len(names)))
        assert [x.name for x in r.cluster.decode[:4]] == ["decode-0", "decode-1", "decode-2", "decode-10"]
        said = [action for i in range(20) for action in arrive(r, i, 0.1 * i, hashes=(i % 3, 7))]
        said += [action for i in range(0, 20, 2) for action in r.handle(PrefillDone(i, 1, r.cluster.live[i].prefill.name), 3.0 + i)]
        decided.append(said)
    assert decided[0] == decided[1] == decided[2]


def test_a_cancelled_request_is_aborted_wherever_it_is() -> None:
    r = router()
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    actions = r.handle(Cancelled(0), 1.05)
    assert actions == [Abort(0, 1, "p0"), Abort(0, 1, "d0"), End(0, Stage.ABORTED, "cancelled by the client")]
    r.check()


def test_every_wait_ends() -> None:
    r = router(limits=Limits(request_timeout_s=60.0, transfer_timeout_s=5.0))
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    for name in ("p0", "p1", "d0", "d1"):
        r.handle(Report(name, taken_s=6.0, free_blocks=1000), 6.0)
    assert r.handle(Tick(), 6.5)[-1] == Dispatch(0, 3, "p0", None, 1)
    for name in ("p0", "p1", "d0", "d1"):
        r.handle(Report(name, taken_s=59.5, free_blocks=1000), 59.5)
    assert r.handle(Tick(), 60.5)[-1] == End(0, Stage.EXPIRED, "not done within 60 s (was in QUEUED_P)")


def test_a_silent_instance_is_suspect_then_fenced_and_a_report_clears_it() -> None:
    r = router()
    for now in (4.0, 5.5):
        for name in ("p1", "d0", "d1"):
            r.handle(Report(name, taken_s=now, free_blocks=1000), now)
        r.handle(Tick(), now)
    assert r.by_name["p0"].state is InstanceState.SUSPECT
    assert arrive(r, 0, 5.6) == [Dispatch(0, 1, "p1")]
    r.handle(Report("p0", taken_s=5.7, free_blocks=1000), 5.7)
    assert r.by_name["p0"].ready
    for now in (10.0, 12.0, 20.0, 26.5):
        for name in ("p1", "d0", "d1"):
            r.handle(Report(name, taken_s=now, free_blocks=1000), now)
        actions = r.handle(Tick(), now)
    assert actions == [Evict("p0", 0)]


class Wish(Policy):
    tick_s = 1.0

    def __init__(self, *wishes: object) -> None:
        self.wishes = list(wishes)

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        names = {x.name: x for x in cluster.instances}
        return [(w[0], names[w[1]]) for w in self.wishes if isinstance(w, tuple) and not isinstance(w[1], Role)]

    def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
        names = {x.name: x for x in cluster.instances}
        found: list[tuple[Instance, Role] | Scale] = [w for w in self.wishes if isinstance(w, Scale)]
        return found + [(names[w[0]], w[1]) for w in self.wishes if isinstance(w, tuple) and isinstance(w[1], Role)]


def test_a_switch_never_empties_a_role() -> None:
    r = router(Wish(("p0", Role.DECODE), ("p1", Role.DECODE)))
    assert r.handle(Tick(), 1.0) == [Switch("p0", Role.DECODE)]
    assert not r.by_name["p0"].ready
    r.handle(Switched("p0", 0, Role.DECODE), 2.0)
    assert (r.by_name["p0"].role, r.by_name["p0"].ready) == (Role.DECODE, True)


def test_an_attempt_that_breaks_off_is_made_again_while_its_instance_stays() -> None:
    r = router()
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    r.handle(Transferred(0, 1, "d0"), 1.1)
    actions = r.handle(Lost(0, 1, "d0", "the connection broke", sent=4), 2.0)
    assert actions == [Abort(0, 1, "d0"), Dispatch(0, 3, "p0", sent_tokens=4)]
    assert r.by_name["d0"].ready
    assert r.handle(Lost(0, 1, "d0", "again"), 2.1) == []  # of an attempt that is over
    r.check()


def test_a_draining_instance_gets_nothing_new_and_keeps_what_it_has() -> None:
    r = router()
    arrive(r)
    assert r.handle(Drained("p0", 0), 0.1) == []
    assert r.by_name["p0"].state is InstanceState.DRAINING
    assert [a.instance for i in (1, 2) for a in arrive(r, i) if isinstance(a, Dispatch)] == ["p1", "p1"]
    assert r.handle(Drained("p0", 5, draining=False), 0.2) == []  # of an incarnation that is not there
    assert not r.by_name["p0"].ready
    r.handle(Drained("p0", 0, draining=False), 0.3)
    assert r.by_name["p0"].ready
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Handoff(0, 1, "p0", "d0")]
    r.check()


def test_a_role_that_an_operator_changed_is_followed() -> None:
    r = router()
    r.handle(Drained("p0", 0), 0.1)
    r.handle(Switched("p0", 0, Role.DECODE), 0.2)
    assert [x.name for x in r.cluster.decode] == ["d0", "d1", "p0"]
    assert [x.name for x in r.cluster.prefill] == ["p1"]


def test_a_swap_of_roles_is_carried_out_in_one_step_and_who_comes_meanwhile_waits() -> None:
    class Swap(Policy):
        tick_s = 1.0

        def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
            a, b = cluster.instances
            return [(a, b.role), (b, a.role)] if a.ready and b.ready and cluster.now < 2.0 else []

    r = router(Swap(), (("a", Role.PREFILL), ("b", Role.DECODE)))
    assert r.handle(Tick(), 1.0) == [Switch("a", Role.DECODE), Switch("b", Role.PREFILL)]
    assert arrive(r, 1, 1.5) == [], "nobody is ready, and somebody soon will be"
    assert r.handle(Switched("a", 0, Role.DECODE), 2.0) == [Dispatch(1, 1, "a", "a")], "it serves both phases as long as it is alone"
    assert r.handle(Switched("b", 0, Role.PREFILL), 2.5) == []
    assert arrive(r, 2, 3.0) == [Dispatch(2, 1, "b", None)]
    r.check()


def test_two_switches_that_leave_a_phase_to_nobody_are_no_swap() -> None:
    class Both(Policy):
        tick_s = 1.0

        def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
            return [(x, Role.DECODE) for x in cluster.instances if x.ready]

    r = router(Both(), (("a", Role.PREFILL), ("b", Role.MIXED)))
    assert r.handle(Tick(), 1.0) == [Switch("a", Role.DECODE)]


def test_only_the_leader_of_several_routers_resizes() -> None:
    class Flips(Policy):
        tick_s = 1.0

        def resize(self, cluster: Cluster) -> list[tuple[Instance, Role] | Scale]:
            return [(cluster.prefill[0], Role.DECODE)]

    r = router(Flips())
    r.handle(Leads(False), 0.0)
    assert r.handle(Tick(), 1.0) == []
    r.handle(Leads(True), 1.5)
    assert r.handle(Tick(), 2.5) == [Switch("p0", Role.DECODE)]


def test_migration_moves_the_books_when_it_is_done() -> None:
    r = router(Wish((0, "d1")))
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 0.2)
    r.handle(Transferred(0, 1, "d0"), 0.3)
    assert r.handle(Tick(), 1.0) == [Migrate(0, 1, "d0", "d1")]
    assert r.handle(Tick(), 2.0) == [], "not twice"
    r.handle(Migrated(0, 1, "d0", "d1"), 2.5)
    r.check()
    assert (r.by_name["d0"].decode_requests, r.by_name["d1"].decode_requests) == (0, 1)


def test_scaling_keeps_to_its_bounds() -> None:
    r = router(Wish(Scale(3, Role.DECODE)), autoscale=(2, 5))
    assert r.handle(Tick(), 1.0) == [Scale(1, Role.DECODE)]
    assert r.handle(Tick(), 2.0) == [], "the fifth is on its way"
    r = router(Wish(Scale(-2, Role.DECODE)), autoscale=(3, 5))
    assert r.handle(Tick(), 1.0) == [Stop("d1")]
    r = router(Wish(Scale(-1, Role.DECODE)), members=(*PD, ("d2", Role.DECODE)), autoscale=(4, 6))
    assert r.handle(Tick(), 1.0) == [Stop("d2")]
    assert r.handle(Tick(), 2.0) == [], "who drains is no longer one of the four"
    with pytest.raises(UsageError, match=r"asks for \+1 decode where cluster.autoscale is off"):
        router(Wish(Scale(1, Role.DECODE))).handle(Tick(), 1.0)


def test_a_policy_that_misbehaves_is_named_with_the_request_and_the_time() -> None:
    class Raises(Policy):
        def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
            raise ZeroDivisionError("oops")

    class Dead(Policy):
        def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
            return cluster.instances[0]

    with pytest.raises(UsageError, match=r"policy Raises.dispatch for request 7 at t=3.000000 s raised ZeroDivisionError: oops"):
        arrive(router(Raises()), 7, 3.0)
    r = router(Dead())
    r.handle(Left("d0", 0), 1.0)
    arrive(r, 1, 1.0)
    with pytest.raises(UsageError, match=r"policy Dead.handoff for request 1 .* returned d0, which is gone"):
        r.handle(PrefillDone(1, 1, "p0"), 2.0)


def test_what_was_sent_since_a_report_was_taken_is_added_to_it() -> None:
    r = router()
    arrive(r, 0, 1.0)
    arrive(r, 1, 2.0)
    x = r.by_name["p0"]
    r.handle(Report("p0", taken_s=1.5, waiting_tokens=40, free_blocks=1000), 2.5)
    assert x.queued_tokens == 40
    assert r.by_name["p1"].queued_tokens == 100
    r.handle(Report("p1", taken_s=1.9, waiting_tokens=0, free_blocks=1000), 2.5)
    assert r.by_name["p1"].queued_tokens == 100, "sent at 2.0, after the report was taken"


def test_the_prefix_index_is_guessed_at_dispatch_and_corrected_by_reports() -> None:
    r = router(hash_tokens=16)
    request = Request(0, 0.0, 100, (1, 2, 3, 4, 5, 6))
    r.handle(Arrived(request), 0.0)
    p0 = r.by_name["p0"]
    assert r.cluster.cached_tokens(request) == {p0: 96}
    r.handle(Report("p0", taken_s=1.0, free_blocks=1000, evicted=(3, 4)), 1.0)
    assert r.cluster.cached_tokens(request) == {p0: 32}, "a hole ends the prefix"
    r.handle(Left("p0", 0), 2.0)
    assert p0 not in r.cluster.cached_tokens(request)


def test_a_request_waits_where_nobody_is_ready_only_since_nobody_was_heard() -> None:
    """Until it is heard again, or is taken for gone; with nobody at all it is refused at once."""
    r = router(members=[("m", Role.MIXED)])
    r.handle(Tick(), 6.0)
    assert r.by_name["m"].state is InstanceState.SUSPECT
    assert arrive(r, 0, 6.0) == [] and arrive(r, 1, 9.0) == []
    assert r.handle(Report("m", taken_s=17.0, free_blocks=1000), 17.0) == [Dispatch(0, 1, "m", "m"), Dispatch(1, 1, "m", "m")]
    r.check()
    r.handle(Left("m", 0), 20.0)
    assert r.handle(RegistryAway(), 20.0) == []
    assert arrive(r, 2, 20.0) == [End(2, Stage.REJECTED, "no instance is ready")]


def test_who_lost_its_place_is_waited_for_though_it_was_the_last() -> None:
    """By those under way; while the registry is away by new ones, too."""
    r = router(members=[("m", Role.MIXED)], limits=Limits(suspect_s=10.0))
    arrive(r)
    assert r.handle(Left("m", 0, {}, died=False), 1.0) == []
    assert arrive(r, 1, 2.0) == [End(1, Stage.REJECTED, "no instance is ready")]
    r.handle(RegistryAway(), 3.0)
    assert arrive(r, 2, 4.0) == []
    assert r.handle(Joined(spec("m", Role.MIXED, 1)), 5.0) == [Dispatch(0, 3, "m", "m"), Dispatch(2, 1, "m", "m")]
    assert r.cluster.live[0].losses == 0
    assert r.handle(Left("m", 1, {}, died=False), 6.0) == []
    assert [action.stage for action in r.handle(Tick(), 16.5) if isinstance(action, End)] == [Stage.REJECTED] * 2


def test_losses_without_evidence_of_a_death_are_no_attempts() -> None:
    r = router(limits=Limits(max_attempts=1))
    assert arrive(r)[0].instance == "p0"
    for n, event in enumerate(
        [
            Left("p0", 0, {}, died=False),
            Lost(0, 3, "p1", "did not answer in time", charged=False),
            Left("p1", 0, {}, died=False),
        ]
    ):
        assert isinstance(r.handle(event, 1.0 + n)[-1], Dispatch), event
    assert r.cluster.live[0].losses == 0
    where = r.cluster.live[0].prefill
    assert where is not None
    assert r.handle(Left(where.name, 0), 9.0)[-1] == End(0, Stage.FAILED, f"{where.name} died; gave up after 1 attempts")
    r.check()


def test_a_router_that_stood_still_blames_nobody_for_it() -> None:
    r = router(limits=Limits(transfer_timeout_s=5.0))
    arrive(r)
    r.handle(PrefillDone(0, 1, "p0"), 1.0)
    assert r.handle(Tick(late_s=20.0), 22.0) == []
    assert all(x.ready for x in r.cluster.instances)
    r.handle(Report("p0", taken_s=24.0, free_blocks=1000), 24.0)
    assert Abort(0, 1, "p0") in r.handle(Tick(), 26.5), "5 s without those"
    r.check()


def test_no_instance_is_given_more_requests_than_it_takes() -> None:
    """They wait here, and go where one has ended."""
    r = router(members=[])
    for name, role in PD[:1] + PD[2:3]:
        r.handle(Joined(msgspec.structs.replace(spec(name, role), max_requests=2)), 0.0)
    assert [len(arrive(r, i, 0.1)) for i in range(4)] == [1, 1, 0, 0]
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0) == [Handoff(0, 1, "p0", "d0"), Dispatch(2, 1, "p0")]
    assert r.handle(PrefillDone(1, 1, "p0"), 1.0) == [Handoff(1, 1, "p0", "d0"), Dispatch(3, 1, "p0")]
    assert r.handle(PrefillDone(2, 1, "p0"), 1.1) == [], "two decode"
    r.handle(Transferred(0, 1, "d0"), 1.2)
    assert r.handle(Finished(0, 1, "d0", 5), 2.0) == [Handoff(2, 1, "p0", "d0")]
    r.check()


def test_one_that_takes_no_more_is_asked_again_when_something_there_has_ended() -> None:
    r = router(members=PD[:1] + PD[2:3])
    arrive(r, 0, 0.1)
    arrive(r, 1, 0.1)
    assert r.handle(Refused(1, 1, "p0"), 0.2) == []
    assert arrive(r, 2, 0.3) == []
    assert r.handle(PrefillDone(0, 1, "p0"), 1.0)[1:] == [Dispatch(1, 2, "p0"), Dispatch(2, 1, "p0")]
    r.check()
