"""Three bands: important, online, offline. The TTFT objective is 1 s, instances have 1000 blocks of 16 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab import Experiment, simulate
from pdlab.core.policy import Policy, Reject
from pdlab.core.router import Router
from pdlab.core.types import Arrived, Dispatch, End, Finished, InstanceSpec, Joined, PrefillDone, Request, Role, Stage, Tick, UsageError
from pdlab.policies.compose import Composed
from pdlab.policies.flow_control import FlowControl
from pdlab.policies.least_kv import LeastKv
from pdlab.workload.spec import build


def depth(world, prompts: int) -> None:
    """So many prompts are on each of two prefill instances."""
    for i in (0, 1):
        world[i].prefill_requests, world[i].prefill_tokens = prompts, 100 * prompts


def test_saturation_is_that_of_the_fuller_phase(small):
    world, policy = small("PPD"), FlowControl(queue_depth=10)
    assert policy.saturation(world.cluster) == 0.0
    depth(world, 3)
    assert policy.saturation(world.cluster) == pytest.approx(0.3)
    world.report(2, used_blocks=400)
    assert policy.saturation(world.cluster) == pytest.approx(0.5)
    world.report(2, used_blocks=1000)
    assert policy.saturation(world.cluster) == 1.0


def test_bands_pass_up_to_their_ceilings(small, ask):
    world, policy = small("PPD"), FlowControl(queue_depth=10)
    passes = {}
    for prompts in range(11):
        depth(world, prompts)
        waits = ask(10, request_id=7, offline=True)
        policy._met.add(7)  # it was not turned away as it came
        requests = (ask(10, priority=1), ask(10), waits)
        passes[prompts] = [policy.dispatch(request, world.cluster) is not None for request in requests]
    assert [sum(passed[band] for passed in passes.values()) for band in range(3)] == [10, 7, 5]  # below 1, 2/3 and 1/2


def test_offline_requests_are_turned_away_more_and_more_as_they_come_and_only_then(small, ask):
    turned = {}
    for prompts in (0, 2, 3, 4):
        world, policy = small("PPD"), FlowControl(queue_depth=10)
        depth(world, prompts)
        answers = [policy.dispatch(ask(10, request_id=k, offline=True), world.cluster) for k in range(500)]
        turned[prompts] = sum(isinstance(answer, Reject) for answer in answers) / 500
        again = [
            policy.dispatch(ask(10, request_id=k, offline=True), world.cluster) for k, x in enumerate(answers) if not isinstance(x, Reject)
        ]
        assert not [answer for answer in again if isinstance(answer, Reject)]
    assert turned[0] == 0.0 and turned[4] == 1.0
    assert turned[2] == pytest.approx(300 * 0.2**5, abs=0.04) and turned[3] == pytest.approx(300 * 0.3**5, abs=0.06)


def test_a_request_whose_objective_is_over_is_turned_away_unless_it_is_patient(small, ask):
    world = small("PPD")
    world.cluster.now = 1.5
    assert isinstance(FlowControl().dispatch(ask(10), world.cluster), Reject)
    assert FlowControl(patience=1.0).dispatch(ask(10), world.cluster) is not None
    assert FlowControl().dispatch(ask(10, ttft_slo_s=2.0), world.cluster) is not None
    assert FlowControl().dispatch(ask(10, offline=True), world.cluster) is not None


def test_who_waits_goes_by_band_then_by_service_then_by_deadline(small, ask):
    world, policy = small("PPD"), FlowControl(half_life_s=10.0)
    policy.dispatch(ask(500, request_id=1, tenant="much"), world.cluster)
    policy.dispatch(ask(100, request_id=2, tenant="little"), world.cluster)
    waiting = [
        ask(10, request_id=3, offline=True, tenant="none"),
        ask(10, request_id=4, tenant="much"),
        ask(10, request_id=5, tenant="little"),
        ask(10, request_id=6, tenant="little", ttft_slo_s=0.5),
        ask(10, request_id=7, tenant="much", priority=1),
    ]
    order = []
    while waiting:
        chosen = policy.first(waiting, world.cluster)
        order.append(chosen.id)
        waiting.remove(chosen)
    assert order == [7, 6, 5, 4, 3]
    world.cluster.now = 10.0
    assert policy.service("much", 10.0) == pytest.approx(250)
    policy.observe(Finished(2, 1, "x2", output_tokens=400), world.cluster)
    assert policy.service("little", 10.0) == pytest.approx(450)


def test_offline_requests_that_run_are_given_up_for_those_who_wait_when_all_is_full(small):
    world, policy = small("PPD"), FlowControl()
    for k in range(4):
        live = world.decoding(2, k, 100)
        object.__setattr__(live, "request", Request(k, 0.0, 100, offline=k > 0))
    for k in (10, 11):
        waits = world.decoding(2, k, 100)
        waits.decode = waits.prefill = None
    assert policy.evict(world.cluster) == ()
    world.report(2, used_blocks=900)
    assert policy.evict(world.cluster) == [3, 2]


def test_it_forgets_requests_that_have_ended(small, ask):
    world, policy = small("PPD"), FlowControl()
    for k in range(1000):
        policy.dispatch(ask(10, request_id=k), world.cluster)
        policy.observe(Tick(), world.cluster)
    assert len(policy._met) < 100 and len(policy._passed) < 100


# ---------------------------------------------------------------- the router's side


class Lifo(Policy):
    """Has one place; the last who came goes first, and everything that runs is given up on `stop`."""

    queues = True
    stop = False

    def dispatch(self, request, cluster):
        return cluster.prefill[0] if not cluster.prefill[0].prefill_requests else None

    def first(self, waiting, cluster):
        return waiting[-1]

    def evict(self, cluster):
        return list(cluster.live) if self.stop else ()


def routed(policy: Policy) -> Router:
    router = Router(policy)
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        router.handle(Joined(InstanceSpec(name=name, role=role, kv_blocks=1000)), 0.0)
    return router


def dispatched(actions) -> list[int]:
    return [action.request_id for action in actions if isinstance(action, Dispatch)]


@pytest.mark.parametrize("composed", [False, True])
def test_whose_turn_it_is_is_asked_alone_and_composed(composed: bool) -> None:
    policy = Lifo()
    router = routed(Composed(dispatch=policy, handoff=LeastKv()) if composed else policy)
    sent = [dispatched(router.handle(Arrived(Request(k, 0.1 * k, 10), 5), 0.1 * k)) for k in range(4)]
    assert sent == [[0], [], [], []]
    for now, (done, then) in enumerate(((0, [3]), (3, [2]), (2, [1]), (1, [])), 1):
        assert dispatched(router.handle(PrefillDone(done, 1, "p"), float(now))) == then
    router.check()


def test_what_is_given_up_ends_as_rejected_and_leaves_nothing() -> None:
    policy = Lifo()
    router = routed(policy)
    for k in range(3):
        router.handle(Arrived(Request(k, 0.0, 10), 5), 0.0)
    router.handle(PrefillDone(0, 1, "p"), 0.5)
    policy.stop = True
    ends = [action for action in router.handle(Tick(), 1.0) if isinstance(action, End)]
    assert {end.request_id for end in ends} == {0, 1, 2} and {end.stage for end in ends} == {Stage.REJECTED}
    assert not router.cluster.live
    router.check()


def test_whoever_names_nobody_who_waits_is_blamed() -> None:
    class Wrong(Lifo):
        def first(self, waiting, cluster):
            return Request(99, 0.0, 10)

    router = routed(Wrong())
    for k in (0, 1):
        router.handle(Arrived(Request(k, 0.0, 10), 5), 0.0)
    with pytest.raises(UsageError, match="Wrong"):
        router.handle(Arrived(Request(2, 0.0, 10), 5), 0.0)


@pytest.mark.parametrize(("of", "words"), [("flow_control", "another policy"), ("prefix_awar", "prefix_aware")])
def test_it_stands_before_another_policy(of: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FlowControl(of=of)


def test_under_overload_the_important_are_served_and_every_request_ends() -> None:
    met = {}
    for policy in ("flow_control", "early_reject"):
        path = Path(__file__).parents[2] / "experiments" / "flow_control.yaml"
        experiment = Experiment.load(path, ["workload.requests=600", f"policy.dispatch={policy}"])
        asked = build(experiment.workload, experiment.seed, experiment.base_dir)
        assert asked.offline is not None
        result = simulate(experiment, workload=asked)
        rows = result.requests
        met[policy] = rows[(rows.priority == 1) & (asked.offline[rows.request_id] == 0)].good.mean()
        assert set(rows.status) <= {"done", "rejected"} and result.summary["leaked_blocks"] == 0
    assert met["flow_control"] > met["early_reject"] + 0.05
