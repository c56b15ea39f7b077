"""Larger random worlds than hypothesis makes: overload, tight memory, several faults at once. Each seed is one world."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pdlab.core.types import Refused, Role
from pdlab.experiment.study import FaultSpec
from tests.sim.test_invariants import CLUSTERS, POLICIES, TRANSFERS, run
from tests.support.small_world import small_world, workload


def scenario(seed: int) -> dict[str, object]:
    r = random.Random(seed)
    members, n = r.choice(CLUSTERS), r.randint(50, 150)
    prompts, outputs = [r.randint(1, 700) for _ in range(n)], [r.randint(1, 300) for _ in range(n)]
    hashes = None
    if r.random() < 0.5:
        families = [r.randint(0, 5) for _ in range(n)]
        hashes = [tuple(f << 20 | u for u in range((p + o) // 16)) for f, p, o in zip(families, prompts, outputs, strict=True)]
    events = []
    for _ in range(r.randint(0, 4)):
        kind = r.choice(["kill", "kill", "stop", "slow", "slow_link", "cut_link", "cut", "lose_reports", "delay_reports"])
        named = r.sample([name for name, _ in members], 2) if kind == "cut" else r.choice(members)[0]
        fault: dict[str, object] = {"at_s": r.uniform(0, 6), kind: named}
        fault |= {"restart_after_s": r.uniform(0.1, 5)} if kind == "kill" else {"for_s": r.uniform(0.1, 30)}
        fault |= {"slow": {"factor": 0.3}, "slow_link": {"factor": 0.01}, "delay_reports": {"by_s": 2.0}}.get(kind, {})
        events.append(FaultSpec(**fault))  # type: ignore[arg-type]
    best_of = np.array([r.choice([1, 1, 1, 3]) for _ in range(n)], np.int16) if r.random() < 0.3 else None
    priority = np.array([r.choice([0, 0, 1, -1]) for _ in range(n)], np.int16) if r.random() < 0.3 else None
    rate = r.choice([5, 20, 50])
    arrivals = np.cumsum([r.expovariate(rate) for _ in range(n)]).tolist()
    return {
        "members": members,
        "work": workload(arrivals, prompts, outputs, hashes=hashes, best_of=best_of, priority=priority),
        "faults": events,
        "policy": r.choice(POLICIES),
        "transfer": r.choice(TRANSFERS),
        "kv_blocks": r.choice([90, 150, 400, 1000]),
        "batch": r.choice(["chunked", "prefill_first", "decode_first"]),
        "max_seqs": r.choice([4, 64]),
        "reserve_first": r.random() < 0.5,
        "gbytes_per_s": r.choice([0.2, 25.0]),
    }


@pytest.mark.parametrize("seed", [*range(24), 56, 228])
def test_a_random_world_in_trouble_ends_clean(seed: int) -> None:
    world = run(scenario(seed))
    assert len(world.records) == len(world.workload)
    assert world.leaked_blocks == 0
    for instance in world.router.cluster.instances:
        assert (instance.prefill_tokens, instance.decode_tokens) == (0, 0)


def test_who_waits_for_a_full_instance_is_not_refused_again_with_everyone_that_ends() -> None:
    n = 600
    work = workload([0.0] * n, 320, [50 + i % 100 for i in range(n)], concurrency=300)
    world = small_world(
        work, members=(("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)), kv_blocks=400, gbytes_per_s=100.0, check=False
    )
    refusals = 0

    def count(event: object, _: object) -> None:
        nonlocal refusals
        refusals += isinstance(event, Refused)

    world.teller.on_event = count
    world.run()
    assert sum(x.scheduler.preemptions for x in world.instances.values()) > 0, "its KV memory is full"
    reports = world.env.now / world.periodic.report_period_s
    assert 0 < refusals < n + reports, "about one for each that ends, not all who wait"
