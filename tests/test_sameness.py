"""The sameness contract: a policy is shown the same and decides the same, event by event, in the simulator and in the live world.

The live world runs on the virtual clock, its instances on the live path; both share the cost model and the network. See `tests.support`.
"""

from __future__ import annotations

from collections import Counter

import pytest

from pdlab.core.types import Arrived, Fetched, Handoff
from pdlab.policies.load import names
from tests.support.contract import EXCEPTIONS, TRAITS, experiment, live, simulated, workload
from tests.support.views import Seen, difference, to_the_end, without

pytestmark = pytest.mark.usefixtures("no_front_end")


@pytest.mark.parametrize("policy", names())
def test_a_policy_sees_and_decides_the_same_in_both_worlds(policy: str) -> None:
    plan, work = experiment(policy), workload()
    ours, theirs = simulated(plan, work), live(plan, work)
    assert not (words := difference(comparable(ours), comparable(theirs))), words
    assert ends(theirs) == ends(ours), "as many requests end well in both"


def comparable(seen: list[Seen]) -> list[Seen]:
    return without(to_the_end(seen), EXCEPTIONS)


def ends(seen: list[Seen]) -> Counter[str]:
    return Counter(type(one.event).__name__ for one in seen if type(one.event).__name__ in ("Finished", "Left", "Arrived"))


def test_the_contract_is_about_every_kind_of_trouble() -> None:
    seen = simulated(experiment("least_loaded"), workload())
    events = Counter(type(one.event).__name__ for one in seen)
    assert events["Refused"] > 10, "a decode instance is full"
    assert events["Drained"] == 1
    assert events["Unreachable"] > 0, "two do not reach each other"
    assert events["Left"] == 2, "one died, one was drained"
    arrived = [one.event for one in seen if type(one.event).__name__ == "Arrived"]
    assert {"prefixes", "priorities", "objectives", "best_of", "kill", "drain", "cut", "full"} <= set(TRAITS)
    assert len({a.request.priority for a in arrived}) > 1  # type: ignore[attr-defined]
    assert any(a.request.ttft_slo_s for a in arrived)  # type: ignore[attr-defined]
    assert any(a.request.best_of > 1 for a in arrived)  # type: ignore[attr-defined]
    assert {len(set(kind)) for kind in zip(*((a.request.session, a.request.tenant, a.request.offline) for a in arrived), strict=True)} == {  # type: ignore[attr-defined]
        7,
        3,
        2,
    }
    assert max(tokens for one in seen for x in one.view.instances.values() for tokens in x["cached_tokens"]) > 0  # type: ignore[attr-defined]


def test_prefixes_are_read_from_others_or_not_in_both_worlds() -> None:
    plan, work = experiment({"name": "p2p_prefix", "min_tokens": 16}), workload()
    ours, theirs = simulated(plan, work), live(plan, work)
    assert not (words := difference(comparable(ours), comparable(theirs))), words
    fetched = [one.event for one in ours if isinstance(one.event, Fetched)]
    assert sum(event.tokens > 0 for event in fetched) > 5
    assert any(not event.tokens for event in fetched)
    assert {event.instance for event in fetched} == {"mixed-0", "prefill-0", "prefill-1"}, "who decodes what it prefills reads, too"


def test_exceptions_are_few() -> None:
    assert len(EXCEPTIONS) <= 3


def test_what_nobody_else_reaches_decodes_where_it_was_prefilled_in_both_worlds() -> None:
    rows = [{"role": role, "hardware": "a10", "nics": 1} for role in ("prefill", "decode")]
    cut = {"at_s": 0.5, "cut": ["prefill-0", "decode-0"], "for_s": 4.0}
    plan = experiment("least_loaded")
    cluster = plan.cluster.model_dump(mode="json", exclude_unset=True) | {"instances": rows}
    plan = experiment("least_loaded", cluster=cluster, engine={"kv_blocks": 1000}, faults=[cut])
    work = workload(requests=60)
    ours, theirs = simulated(plan, work), live(plan, work)
    assert not (words := difference(comparable(ours), comparable(theirs))), words
    several = {one.event.request.id for one in ours if isinstance(one.event, Arrived) and one.event.request.best_of > 1}
    here = [action for one in ours for action in one.actions if isinstance(action, Handoff) and action.src == action.dst]
    assert {action.request_id in several for action in here} == {True, False}


@pytest.mark.parametrize(("policy", "batching"), [("least_loaded", "slide_batching"), ("ooco", "online_first")])
def test_an_instance_batches_the_same_in_both_worlds(policy: str, batching: str) -> None:
    plan = experiment(policy)
    plan = experiment(policy, engine=plan.engine.model_dump(exclude_unset=True) | {"batching": batching})
    work = workload()
    ours, theirs = simulated(plan, work), live(plan, work)
    assert not (words := difference(comparable(ours), comparable(theirs))), words
    assert ends(theirs) == ends(ours)
