"""Another policy asked beside the one that decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.cli.main import main
from pdlab.experiment.experiment import Experiment
from pdlab.replay.what_if import Shadow, beside
from pdlab.sim import simulate

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


def without_effect(log: Path, other: object) -> Shadow:
    shadow, events, difference = beside(log, other)
    assert difference is None, "the run itself is as it was"
    assert events > 360
    return shadow


def test_asking_another_policy_does_not_change_the_run(log: Path) -> None:
    shadow = without_effect(log, "round_robin")
    assert shadow.asked["dispatch"] >= 120
    assert 0 < len(shadow.departures) <= sum(shadow.asked.values())
    first = shadow.departures[0]
    assert (first.hook, first.decided[:8], first.other[:8]) in {("dispatch", "prefill-", "prefill-"), ("handoff", "decode-0", "decode-1")}


def test_the_same_policy_without_draws_never_departs(log: Path) -> None:
    shadow = without_effect(log, {"dispatch": "least_loaded", "handoff": "least_kv"})
    assert not [d for d in shadow.departures if d.hook == "handoff"]
    assert [d for d in shadow.departures if d.hook == "dispatch"]


def test_the_command_lists_where_they_part(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(log), "--policy", "round_robin"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "0 differ" in said
    assert "dispatch: asked" in said
    assert "other: prefill-" in said
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(log), "--policy", "rund_robin"])
    assert ended.value.code == 2
    assert "round_robin" in capsys.readouterr().err
