from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.types import Event, InstanceSpec, Joined, Request, Role, Tick
from pdlab.core.view import Cluster
from pdlab.policies.compose import Composed
from pdlab.policies.fastdeploy_splitwise import FastdeploySplitwise
from pdlab.policies.freeness import Freeness
from pdlab.policies.least_kv import LeastKv
from pdlab.policies.random import Random
from pdlab.policies.round_robin import RoundRobin
from pdlab.policies.xllm_slo_aware import XllmSloAware


@dataclass
class Listener(Policy):
    heard: list[Event] = field(default_factory=list)

    def observe(self, event: Event, cluster: Cluster) -> None:
        self.heard.append(event)


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster(random.Random(0))
    for i, role in enumerate((Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)):
        made.admit(InstanceSpec(name=f"x{i}", role=role, kv_blocks=10))
    made.refresh()
    return made


def test_each_hook_is_answered_by_its_member_and_the_rest_is_plain(cluster):
    policy = Composed(dispatch=RoundRobin())
    request = Request(1, 0.0, 10)
    assert [policy.dispatch(request, cluster).index for _ in range(3)] == [0, 1, 0]
    assert [policy.handoff(request, cluster).index for _ in range(3)] == [2, 2, 2]
    assert policy.migrate(cluster) == policy.resize(cluster) == ()


def test_two_hooks_may_share_one_object(cluster):
    both = RoundRobin()
    policy = Composed(dispatch=both, handoff=both)
    policy.handoff(Request(1, 0.0, 10), cluster)
    assert both.handoff(Request(2, 0.0, 10), cluster).index == 3


def test_the_tick_is_the_shortest_of_those_that_are_asked_at_ticks():
    assert Composed(dispatch=Random()).tick_s is None
    assert Composed(dispatch=Freeness(tick_s=0.1)).tick_s is None  # its migrate is not asked
    assert Composed(migrate=Freeness(tick_s=0.3), resize=XllmSloAware(tick_s=0.2)).tick_s == 0.2
    assert Composed(migrate=Freeness(tick_s=None), resize=XllmSloAware(tick_s=0.2)).tick_s == 0.2


def test_a_pair_is_chosen_at_once_if_either_half_wants_it():
    assert Composed(dispatch=Random(), handoff=FastdeploySplitwise()).pairs
    assert Composed(dispatch=FastdeploySplitwise(), handoff=LeastKv()).pairs
    assert not Composed(dispatch=Random(), handoff=LeastKv(), resize=XllmSloAware()).pairs


def test_a_listener_hears_each_event_once_however_many_hooks_it_answers():
    listener, other = Listener(), Listener()
    policy = Composed(dispatch=listener, handoff=listener, migrate=other, resize=Random())
    router = Router(policy)
    router.handle(Joined(InstanceSpec(name="x", role=Role.MIXED, kv_blocks=10)), 0.0)
    router.handle(Tick(), 1.0)
    assert [type(e) for e in listener.heard] == [type(e) for e in other.heard] == [Joined, Tick]


def test_nobody_is_told_where_nobody_listens():
    assert not Composed(dispatch=Random(), handoff=LeastKv()).observers
    assert type(Composed()).observe is Policy.observe  # so a router calls nothing


def test_composed_members_may_be_composed():
    listener = Listener()
    Composed(dispatch=Composed(dispatch=listener)).observe(Tick(), Cluster(random.Random(0)))
    assert listener.heard == [Tick()]
