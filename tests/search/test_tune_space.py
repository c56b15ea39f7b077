"""Which parameters are tuned, between which values, and where they go in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.tune_cases import TuneCase, TuneCases
from pdlab.search.tune_space import TuneSpace, named_policy, placed

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.yaml"
MINE = """
from dataclasses import dataclass
from typing import Annotated
from pdlab import Policy, Range

@dataclass
class Mine(Policy):
    depth: int = 3
    share: Annotated[float, Range(ge=0.0, lt=1.0)] = 0.5
    needed: Annotated[int, Range(ge=1, le=9)]{default}

    def dispatch(self, request, cluster):
        return cluster.prefill[0]
"""


def base(**changes: Any) -> Experiment:
    return Experiment.load(QUICKSTART).with_(**changes)


def test_all_that_have_a_range_are_tuned() -> None:
    space = TuneSpace.read("llumnix", (), ROOT)
    assert [one.name for one in space.parameters] == [
        "tick_s", "migrate_out_threshold", "pairing", "request_order", "head_of_line", "stay_on_prefill",
    ]  # fmt: skip
    assert space.left == ("priority_tokens", "high_priority")
    tick, *_, stay = space.parameters
    assert (tick.low, tick.high, tick.log, tick.optional) == (0.02, 2.0, True, True)
    assert stay.choices == (False, True)


def test_some_are_asked_for_with_other_ends() -> None:
    space = TuneSpace.read("conditional", ["threshold_tokens=100..300", "max_kv_use"], ROOT)
    threshold, use = space.parameters
    assert (threshold.low, threshold.high, threshold.whole, threshold.log) == (100, 300, True, True)
    assert (use.low, use.high) == (0.3, 1.0)
    assert threshold.rounded(111.7) == 112
    assert use.rounded(0.876543) == 0.8765
    assert use.rounded(0.99999) == 1.0


@pytest.mark.parametrize(
    ("policy", "asked", "line"),
    [
        ("random", (), "--policy random: there is nothing to tune: it has no parameters"),
        ("nobody", (), "unknown policy 'nobody'"),
        ("llumnix", ("tik_s",), "--params tik_s: policy llumnix has no parameter 'tik_s' (did you mean tick_s?); it has tick_s, "),
        ("llumnix", ("priority_tokens",), "--params priority_tokens: nothing says between which values; give --params priority_tokens=LOW"),
        ("llumnix", ("tick_s", "tick_s=1..2"), "--params tick_s: it is there twice"),
        ("llumnix", ("tick_s=2..1",), "--params tick_s=2..1: 2 is not below 1"),
        ("llumnix", ("tick_s=0..1",), "--params tick_s=0..1: policy parameter tick_s must be above 0, or null, not 0.0"),
        ("llumnix", ("tick_s=1",), "--params tick_s=1: write tick_s=LOW..HIGH, both numbers"),
        ("llumnix", ("high_priority=1..2.5",), "--params high_priority=1..2.5: write high_priority=LOW..HIGH, both whole numbers"),
        ("llumnix", ("pairing=1..2",), "--params pairing=1..2: pairing is no number, so that it has no ends; write --params pairing"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_a_line(policy: str, asked: tuple[str, ...], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        TuneSpace.read(policy, asked, ROOT)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


def test_a_users_field_without_a_range_is_left_or_has_it_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(default=" = 2"))
    space = TuneSpace.read("mine.py", (), tmp_path)
    assert ([one.name for one in space.parameters], space.left) == (["needed"], ("depth", "share"))
    assert TuneSpace.read("mine.py", ["depth=1..8"], tmp_path).parameters[0].whole


def test_the_untuned_is_what_the_file_says_and_else_the_default() -> None:
    own = base(policy={"dispatch": {"name": "conditional", "max_kv_use": 0.5}, "handoff": "least_kv"})
    space = TuneSpace.read("conditional", (), own.base_dir)
    assert space.untuned(own) == {"threshold_tokens": 256, "max_kv_use": 0.5}
    assert space.untuned(base(policy="random")) == {"threshold_tokens": 256, "max_kv_use": 0.9}
    twice = base(policy={"dispatch": {"name": "freeness", "tick_s": 1.0}, "handoff": "freeness"})
    with pytest.raises(UsageError, match="--policy freeness: the file has it twice, with different parameters"):
        TuneSpace.read("freeness", (), own.base_dir).untuned(twice)


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ("random", {"name": "freeness", "tick_s": None}),
        ("freeness", {"name": "freeness", "tick_s": None}),
        ({"name": "freeness", "pairing": "balanced", "tick_s": 1.0}, {"name": "freeness", "pairing": "balanced", "tick_s": None}),
        (
            {"dispatch": "random", "migrate": "freeness", "handoff": {"name": "freeness"}},
            {"dispatch": "random", "migrate": {"name": "freeness", "tick_s": None}, "handoff": {"name": "freeness", "tick_s": None}},
        ),
    ],
)
def test_values_go_where_the_file_has_the_policy(said: Any, there: Any) -> None:
    assert placed(said, "freeness", {"tick_s": None}) == there
    assert base(policy=there).policy == there


def test_who_names_no_policy_means_the_only_one() -> None:
    assert named_policy(base(policy={"dispatch": "freeness", "migrate": {"name": "freeness"}})) == "freeness"
    with pytest.raises(UsageError, match="made of prefix_aware, least_kv: say with --policy which one to tune"):
        named_policy(base(policy={"dispatch": "prefix_aware", "handoff": "least_kv"}))


def test_of_a_drawn_workload_the_judge_has_other_seeds() -> None:
    cases = TuneCases.of(base(seed=7), None, 3, 0.4, 3)
    assert [[case.seed for case in rung] for rung in cases.rungs] == [[7], [7, 8], [7, 8, 9, 10]]
    assert cases.judging == (TuneCase(11), TuneCase(12), TuneCase(13))
    assert cases.worded() == "3 seeds that tuning never saw"
    assert len(TuneCases.of(base(), 1, 3, 0.4, 3).rungs) == 1


def test_of_a_trace_the_judge_has_the_last_part() -> None:
    traced = Experiment.load(ROOT / "experiments" / "xllm_role_flip.yaml")
    cases = TuneCases.of(traced, None, 10, 0.25, 3)
    assert cases.rungs == tuple((TuneCase(3, (0.0, share)),) for share in (0.1875, 0.375, 0.75))
    assert cases.judging == (TuneCase(4, (0.75, 1.0)),)
    assert cases.worded() == "10 stretches of the last 25 % of the trace, which tuning never saw"


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ((0, 10, 0.4, 3), "--seeds 0: write 1 or more"),
        ((1, 1, 0.4, 3), "--judge 1: write 2 or more"),
        ((1, 10, 0.4, 0), "--rungs 0: write 1 or more"),
        ((1, 10, 1.0, 3), "--holdout 1: it is the part of a trace that is kept for judging, above 0 and below 1"),
    ],
)
def test_numbers_that_make_no_tuning(numbers: tuple[int, int, float, int], line: str) -> None:
    with pytest.raises(UsageError, match=f"^{line}$"):
        TuneCases.of(base(), *numbers)
