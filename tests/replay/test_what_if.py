"""Another policy asked beside the one that decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab.cli.main import main
from pdlab.core.policy import Policy
from pdlab.core.types import Request, UsageError
from pdlab.core.view import Cluster
from pdlab.experiment.experiment import Experiment
from pdlab.policies.load import build
from pdlab.replay.what_if import Shadow, ShadowRouter, beside
from pdlab.sim import simulate

POLICY = {"dispatch": "power_of_two", "handoff": "least_kv"}


QUEUED = Experiment.parse(
    {
        "model": "llama-3.1-8b",
        "workload": {"source": "synthetic", "requests": 200, "rate": 40.0, "prompt": 2048, "output": 8},
        "cluster": {"instances": [{"role": "prefill", "hardware": "a10"}, {"role": "decode", "hardware": "a10"}]},
        "policy": "flow_control",
    }
)


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


def test_a_shadow_that_is_fed_the_log_as_it_grows_says_the_same(log: Path) -> None:
    whole = without_effect(log, "round_robin")
    head, *lines = log.read_bytes().splitlines(keepends=True)
    growing = ShadowRouter(head, build("round_robin", Path()), most_kept=7)
    for start in range(0, len(lines), 50):
        growing.feed(b"".join(lines[start : start + 50]))
    assert growing.events == len(lines)
    assert (growing.shadow.asked, growing.shadow.departed) == (whole.asked, whole.departed)
    assert list(growing.shadow.departures) == list(whole.departures)[-7:]
    assert sum(growing.shadow.departed.values()) == len(whole.departures) > 7
    altered = ShadowRouter(head, build("round_robin", Path()), most_kept=7)
    with pytest.raises(UsageError, match=r"the router answered otherwise than its log's replay does"):
        altered.feed(b"".join(line.replace(b'"prefill-0"', b'"prefill-1"') if b"Dispatch" in line else line for line in lines))


class Nonsense(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Any:
        return 5


def test_an_answer_that_is_none_is_the_other_policys_mistake(log: Path) -> None:
    head, _, lines = log.read_bytes().partition(b"\n")
    with pytest.raises(UsageError, match=r"test_what_if.py:\d+: policy Nonsense.dispatch answered 5"):
        ShadowRouter(head, Nonsense(), most_kept=7).feed(lines)


def test_a_policy_that_orders_who_waits_is_shadowed_with_its_queue(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    simulate(QUEUED, trace_events=path)
    shadow, _, difference = beside(path, "round_robin")
    assert difference is None
    assert shadow.asked["first"] and shadow.asked["evict"]


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
