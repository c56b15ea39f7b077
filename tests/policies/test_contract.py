"""What every policy in `pdlab/policies/` has to keep to, whatever the cluster looks like."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.core.policy import HOOKS, Borrow, Policy, Reject
from pdlab.core.router import Router
from pdlab.core.types import (
    Abort,
    Arrived,
    Cancelled,
    Dispatch,
    End,
    Fetch,
    Finished,
    Handoff,
    InstanceSpec,
    InstanceState,
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
    StepTime,
    Switch,
    Switched,
    Tick,
    Transferred,
)
from pdlab.core.view import Cluster, Instance
from pdlab.policies.least_kv import LeastKv
from pdlab.policies.load import names, policy_class

HERE = Path(__file__).parent
CLASSES = {name: policy_class(name, HERE) for name in names()}
every_policy = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
PROFILES = {  # slow enough for the default objectives to be missed now and then
    "prefill_profile": tuple((tokens, 1e-3 * tokens) for tokens in (100, 1000, 4000)),
    "decode_profile": tuple((b, t, 0.01 + 1e-2 * b + 1e-6 * t) for b in (1, 8, 32) for t in (1000, 10_000, 100_000)),
}
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, list[str], int, bool]:
    """(roles, states, seed, profiled) of a cluster."""
    roles = draw(st.text("PDM", min_size=0, max_size=6))
    states = draw(st.lists(st.sampled_from(["ready"] * 4 + ["suspect", "draining", "switching", "gone"]), min_size=6, max_size=6))
    return roles, states, draw(st.integers(0, 2**31)), draw(st.booleans())


def made(small, plan: tuple[str, list[str], int, bool]) -> Cluster:
    """A cluster under random load; equal plans make equal clusters."""
    roles, states, seed, profiled = plan
    world = small(roles, profiled=profiled, seed=seed)
    draw = random.Random(seed)
    world.cluster.now = 100.0
    for i, state in zip(range(len(roles)), states, strict=False):
        x = world[i]
        x.state = InstanceState(state)
        x.room = 0.0 if draw.random() < 0.1 else inf
        used, waiting = draw.randrange(1001), draw.randrange(4)
        world.report(
            i,
            taken_s=draw.uniform(99, 100),
            used_blocks=used,
            free_blocks=1000 - used,
            running=draw.randrange(50),
            waiting=waiting,
            waiting_head_blocks=10 * bool(waiting),
            waiting_blocks=10 * waiting,
            context_tokens=used * 16,
            preempted=draw.randrange(3),
        )
        world[i].decode_step_s = draw.choice([0.0, 0.02])
        world.queue(i, *(draw.randrange(1, 4000) for _ in range(draw.randrange(4))))
        for k in range(draw.randrange(5)):
            world.decoding(i, 100 * i + k, draw.randrange(1, 4000), priority=draw.randrange(2))
        world.hold(i, tuple(range(draw.randrange(20))))
    world.cluster.refresh()
    return world.cluster


def requests(cluster: Cluster, seed: int) -> list[Request]:
    draw = random.Random(seed + 1)
    return [
        Request(9000 + k, 100.0, tokens := draw.randrange(1, 6000), tuple(range(min(20, tokens // 16))), priority=draw.randrange(2))
        for k in range(8)
    ]


def answers(policy: Policy, cluster: Cluster, seed: int) -> Iterator[object]:
    """All four hooks, comparable between two equal clusters."""
    for request in requests(cluster, seed):
        prefill = policy.dispatch(request, cluster)
        if isinstance(prefill, Borrow):
            yield prefill.holder.index
            prefill = prefill.instance
        yield prefill if not isinstance(prefill, Instance) else prefill.index
        decode = policy.handoff(request, cluster)
        yield None if decode is None else decode.index
    yield [(request_id, x.index) for request_id, x in policy.migrate(cluster)]
    yield [want if isinstance(want, Scale) else (want[0].index, want[1]) for want in policy.resize(cluster)]


@every_policy
@quick
@given(plan=plans())
def test_answers_are_ready_instances_that_may_be_chosen(small, cls, plan):
    cluster, policy = made(small, plan), cls()
    for request in requests(cluster, plan[2]):
        prefill = policy.dispatch(request, cluster)
        if isinstance(prefill, Borrow):
            assert cluster.can_fetch(prefill.holder, prefill.instance)
            prefill = prefill.instance
        assert prefill is None or isinstance(prefill, Reject) or (prefill.ready and prefill in [*cluster.prefill, *cluster.decode])
        decode = policy.handoff(request, cluster)
        assert decode is None or decode in cluster.decode
    for request_id, target in policy.migrate(cluster):
        assert target in cluster.decode
        assert cluster.live[request_id].decode is not target
    switched = dict(policy.resize(cluster))
    assert all(x.ready for x in switched)
    if switched:
        roles = [switched.get(x, x.role) for x in cluster.instances if x.ready]
        assert any(r.prefills for r in roles)
        assert any(r.decodes for r in roles)


@every_policy
@quick
@given(plan=plans())
def test_equal_clusters_and_seeds_give_equal_answers(small, cls, plan):
    first, second = (list(answers(cls(), made(small, plan), plan[2])) for _ in range(2))
    assert first == second


@every_policy
@quick
@given(plan=plans())
def test_two_of_a_class_share_nothing(small, cls, plan):
    alone = list(answers(cls(), made(small, plan), plan[2]))
    other, policy = cls(), cls()
    list(answers(other, made(small, plan), plan[2] + 1))
    assert list(answers(policy, made(small, plan), plan[2])) == alone


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans())
def test_least_kv_takes_whom_min_takes_ties_by_index(small, plan):
    cluster = made(small, plan)
    for request in requests(cluster, plan[2]):
        ranked = min(cluster.decode, key=lambda x: ((x.used_tokens + request.prompt_tokens) / x.kv_tokens, x.index), default=None)
        assert LeastKv().handoff(request, cluster) is ranked


@every_policy
def test_nobody_there_is_no_error(small, ask, cls):
    cluster, policy = small("").cluster, cls()
    assert policy.dispatch(ask(100), cluster) is None
    assert policy.handoff(ask(100), cluster) is None
    assert list(policy.migrate(cluster)) == []
    assert list(policy.resize(cluster)) == []


@every_policy
def test_it_decides_something_and_says_what_it_is(cls):
    assert dataclasses.is_dataclass(cls)
    assert any(getattr(cls, hook) is not getattr(Policy, hook) for hook in HOOKS)
    module = __import__(cls.__module__, fromlist=["__doc__"])
    assert module.__doc__
    assert cls.__name__ == "".join(word.capitalize() for word in Path(module.__file__).stem.split("_"))


class Stage:
    """The least a world can be: instances that take one random step at a time, and answer every action sooner or later."""

    def __init__(self, policy: Policy, roles: str, seed: int) -> None:
        self.draw = random.Random(seed)
        self.router = Router(policy, seed=seed)
        self.now = 0.0
        self.todo: list[object] = []
        self.specs = {f"x{i}": InstanceSpec(name=f"x{i}", role=Role[r], kv_blocks=200, **PROFILES) for i, r in enumerate(roles.split())}
        self.decoding: dict[int, tuple[int, str]] = {}  # request id: (attempt, instance)
        self.ended: list[int] = []
        for spec in self.specs.values():
            self.tell(Joined(spec))

    def tell(self, event: object) -> None:
        self.now += 0.01
        for action in self.router.handle(event, self.now):
            self.perform(action)
        self.router.check()

    def perform(self, action: object) -> None:
        if isinstance(action, Dispatch):
            if action.decode == action.instance:
                self.decoding[action.request_id] = (action.attempt, action.instance)
            self.todo.append(PrefillDone(action.request_id, action.attempt, action.instance))
        elif isinstance(action, Handoff):
            self.decoding[action.request_id] = (action.attempt, action.dst)
            if action.dst != action.src:
                refused = self.draw.random() < 0.1
                self.todo.append((Refused if refused else Transferred)(action.request_id, action.attempt, action.dst))
        elif isinstance(action, Migrate):
            self.todo.append(Migrated(action.request_id, action.attempt, action.src, action.dst))
        elif isinstance(action, Switch):
            self.todo.append(Switched(action.instance, self.specs[action.instance].incarnation, action.role))
        elif isinstance(action, End):
            self.ended.append(action.request_id)
        else:
            assert isinstance(action, Abort | Fetch | Notice), action

    def report(self, name: str) -> None:
        x = self.router.by_name[name]
        used = min(200, sum(r.request.prompt_tokens // 16 + 2 for r in x.decoding.values()))
        waiting = self.draw.randrange(2)
        self.tell(
            Report(
                name,
                x.spec.incarnation,
                self.now,
                waiting=waiting,
                running=len(x.decoding),
                used_blocks=used,
                free_blocks=200 - used,
                waiting_head_blocks=5 * waiting,
                preempted=self.draw.randrange(3),
                decode_steps=(steps := 1 + int(50 * self.now)),
                decode_s=0.02 * steps,
                steps=(StepTime(len(x.decoding), 16 * used, self.draw.choice([0, 100]), 10_000, self.draw.uniform(0.01, 1.0)),),
            )
        )

    def settle(self) -> None:
        """One of the things that are due happens."""
        if self.todo and self.draw.random() < 0.8:
            self.tell(self.todo.pop(self.draw.randrange(len(self.todo))))
            return
        done = [i for i, live in self.router.cluster.live.items() if live.stage.name == "DECODE" and live.migrating is None]
        if done:
            live = self.router.cluster.live[request_id := self.draw.choice(done)]
            assert live.decode is not None
            self.tell(Finished(request_id, live.attempt, live.decode.name, 5))
            self.ended.append(request_id)


@every_policy
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    roles=st.sampled_from(
        ["PREFILL PREFILL DECODE DECODE", "PREFILL DECODE", "MIXED MIXED MIXED", "PREFILL MIXED DECODE DECODE", "MIXED DECODE PREFILL"]
    ),
)
def test_under_a_router_every_request_ends_and_the_ledgers_return_to_zero(cls, seed, roles):
    stage = Stage(cls(), roles, seed)
    for request_id in range(40):
        tokens = stage.draw.randrange(1, 1500)
        stage.tell(Arrived(Request(request_id, stage.now, tokens, tuple(range(min(30, tokens // 16))), priority=stage.draw.randrange(2))))
        for _ in range(stage.draw.randrange(4)):
            stage.settle()
        if stage.draw.random() < 0.3:
            stage.report(stage.draw.choice(list(stage.specs)))
        if stage.draw.random() < 0.3:
            stage.tell(Tick())
        if stage.draw.random() < 0.1:
            stage.tell(Cancelled(stage.draw.randrange(request_id + 1)))
        if stage.draw.random() < 0.03:
            name = stage.draw.choice(list(stage.specs))
            old = stage.specs[name]
            stage.tell(Left(name, old.incarnation))
            role = stage.router.by_name[name].role
            spec = stage.specs[name] = InstanceSpec(name=name, role=role, kv_blocks=200, incarnation=old.incarnation + 1, **PROFILES)
            stage.tell(Joined(spec))
    for _ in range(2000):
        if not stage.router.cluster.live:
            break
        stage.settle()
        stage.now += 0.1
        if stage.draw.random() < 0.2:
            for name in stage.specs:
                stage.report(name)
            stage.tell(Tick())
    assert not stage.router.cluster.live
    assert sorted(set(stage.ended)) == list(range(40))
    assert all(x.prefill_tokens == x.decode_tokens == x.prefill_requests == x.decode_requests == 0 for x in stage.router.cluster.instances)
