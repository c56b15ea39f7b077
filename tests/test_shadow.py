"""Another policy asked beside the one that decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab import load_policy
from pdlab.control import router
from pdlab.log import read, replay
from pdlab.shadow import Shadow
from pdlab.sim.build import simulate
from pdlab.spec import Experiment

POLICY = {"dispatch": "power_of_two", "handoff": "least_kv"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    experiment = Experiment.parse(
        {
            "model": "llama-3.1-8b",
            "seed": 3,
            "workload": {"source": "azure-conv-2023", "requests": 120, "rate": 20.0},
            "cluster": {
                "instances": [
                    {"role": "prefill", "count": 3, "hardware": "h100-sxm"},
                    {"role": "decode", "count": 2, "hardware": "h100-sxm"},
                ]
            },
            "policy": POLICY,
        }
    )
    path = tmp_path / "events.jsonl"
    simulate(experiment, trace_events=path)
    return path


def beside(log: Path, other: object) -> tuple[Shadow, int]:
    head, entries = read(log)
    experiment = Experiment.parse(head.experiment)
    fresh = router(experiment, hash_tokens=head.hash_tokens)
    shadow = Shadow(fresh.policy, load_policy.build(other, Path()), seed=experiment.seed)
    events, differences = replay(entries, router(experiment, hash_tokens=head.hash_tokens, policy=shadow))
    assert not differences, "the run itself is as it was"
    assert events > 360
    return shadow, len(shadow.departures)


def test_asking_another_policy_does_not_change_the_run(log: Path) -> None:
    shadow, departures = beside(log, "round_robin")
    assert shadow.asked["dispatch"] >= 120
    assert 0 < departures <= sum(shadow.asked.values())
    first = shadow.departures[0]
    assert (first.hook, first.decided[:8], first.other[:8]) in {("dispatch", "prefill-", "prefill-"), ("handoff", "decode-0", "decode-1")}


def test_the_same_policy_without_draws_never_departs(log: Path) -> None:
    shadow, _ = beside(log, {"dispatch": "least_loaded", "handoff": "least_kv"})
    assert not [d for d in shadow.departures if d.hook == "handoff"]
    assert [d for d in shadow.departures if d.hook == "dispatch"]
