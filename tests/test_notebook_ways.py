"""What somebody does in a notebook: a policy from a cell, a file's name, a changed experiment, a look at it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from pdlab import Cluster, Experiment, Instance, Policy, Request, UsageError, simulate
from pdlab.policies import load as load_policy
from pdlab.policies.prefix_aware import PrefixAware
from pdlab.policies.round_robin import RoundRobin
from pdlab.results.run import RequestFrame

HERE = Path(__file__).parent.parent
QUICK = HERE / "experiments" / "quickstart.yaml"
MAPPING: dict[str, Any] = {
    "name": "tiny",
    "model": "llama-3.1-8b",
    "workload": {"source": "synthetic", "requests": 40, "rate": 20.0, "prompt": 64, "output": 8},
    "cluster": {"instances": [{"role": "mixed", "count": 2, "hardware": "h100-sxm", "engine": {"max_seqs": 64}}]},
}


@dataclass
class Last(Policy):
    """All to the last instance; remembers how many."""

    offset: int = 0
    seen: list[int] = field(default_factory=list)

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        self.seen.append(request.id)
        there = sorted(cluster.prefill, key=lambda x: x.index)
        return there[-1 - self.offset] if there else None


@pytest.fixture(scope="module")
def tiny() -> Experiment:
    return Experiment.parse(MAPPING)


def used(result: Any) -> set[str]:
    return set(result.requests.prefill_instance.dropna().astype(str))


def test_a_policy_object_or_class_decides_in_place_of_the_experiments(tiny: Experiment) -> None:
    assert used(simulate(tiny, policy=Last)) == {"mixed-1"}
    mine = Last(offset=1)
    first, again = simulate(tiny, policy=mine), simulate(tiny, policy=mine)
    assert used(first) == used(again) == {"mixed-0"} and mine.seen == []  # a run has its own copy
    assert first.summary["run"]["policy"] == {"class": f"{__name__}:Last", "offset": 1, "seen": []}
    assert first.summary["run"]["policy_hash"] == load_policy.source_hash(mine)
    assert first.experiment["policy"] == first.summary["run"]["policy"]


def test_a_built_in_policy_object_is_recorded_as_yaml_has_it(tiny: Experiment) -> None:
    result = simulate(tiny, policy=PrefixAware())
    named = result.summary["run"]["policy"]
    assert named["name"] == "prefix_aware" and Experiment.parse(result.experiment).policy == named
    assert simulate(tiny, policy="round_robin").summary["run"]["policy"] == "round_robin"
    assert simulate(tiny, policy={"dispatch": "round_robin"}).experiment["policy"] == {"dispatch": "round_robin"}
    parts = simulate(tiny, policy=load_policy.build({"dispatch": "round_robin", "handoff": "least_kv"}, Path())).summary["run"]["policy"]
    assert parts == {"dispatch": {"name": "round_robin"}, "handoff": {"name": "least_kv"}}


@pytest.mark.parametrize("wrong", [3, Experiment, object()])
def test_what_is_no_policy_is_refused_in_a_line(tiny: Experiment, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"^policy must be") as caught:
        simulate(tiny, policy=wrong)
    assert "\n" not in str(caught.value)


def test_the_log_of_a_run_with_an_object_says_that_it_cannot_be_replayed(tiny: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Last"):
        simulate(tiny, policy=Last(), trace_events=tmp_path / "events.jsonl")
    assert not (tmp_path / "events.jsonl").exists()
    assert len(simulate(tiny, policy=RoundRobin(), trace_events=tmp_path / "events.jsonl").requests) == 40


def test_policies_typed_into_cells_have_hashes_of_their_own() -> None:
    def cell(body: str) -> Policy:
        cell = ModuleType("cell")
        exec(f"from pdlab import Policy\nclass Mine(Policy):\n    def dispatch(self, request, cluster):\n        {body}", cell.__dict__)
        import sys

        sys.modules["cell"] = cell
        made: Policy = cell.Mine()
        return made

    hashes = [
        load_policy.source_hash(cell(body)) for body in ("return None", "return None", "return cluster.prefill[0]", "return [1, lambda: 2]")
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_file_is_simulated_by_its_name() -> None:
    for path in (QUICK, str(QUICK)):
        result = simulate(path, policy="round_robin")
        assert result.name == Experiment.load(QUICK).name
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        simulate("nowhere.yaml")
    with pytest.raises(UsageError, match="an experiment, or the path of its file, not 3"):
        simulate(3)  # type: ignore[arg-type]


def test_with_changes_what_it_names_and_checks_it_all(tiny: Experiment) -> None:
    faster = tiny.with_(**{"workload.rate": 12, "cluster.instances.0.count": 3, "seed": 5})
    assert (faster.workload.rate, len(faster.placements()), faster.seed) == (12, 3, 5)
    assert tiny.workload.rate == 20.0 and faster.with_(**{"workload.rate": 20.0, "cluster.instances.0.count": 2}, seed=0) == tiny
    assert tiny.with_({"engine.max_seqs": 8}).placements()[0].engine.max_seqs == 64  # its row's own stays
    assert tiny.with_({"engine.block_tokens": 8}).placements()[0].engine.block_tokens == 8  # and what the row does not say does not
    assert tiny.with_(policy={"name": "random"}).policy == {"name": "random"}
    assert tiny.with_(slo=tiny.slo, name="other").slo == tiny.slo


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload.rat": 12}, r"^workload\.rat: unknown key; nearest is rate$"),
        ({"workload.rate": -1}, r"^workload\.rate: must be above 0"),
        ({"cluster.instances.4.count": 1}, "is not an index into a list of 1"),
        ({"sede": 3}, "nearest is seed"),
        ({"workload..rate": 3}, "workload..rate"),
        ({"engine.kv_blocks": "many"}, "must be a whole number"),
        ({"model.x": 1}, "not a mapping"),
    ],
)
def test_a_typo_in_with_is_an_error_that_names_the_key(tiny: Experiment, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny.with_(**change)
    assert "--set" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", [p for p in sorted((HERE / "experiments").glob("*.yaml")) if "two_worlds" not in p.name], ids=lambda path: path.stem
)
def test_with_nothing_is_the_same_experiment(path: Path) -> None:
    experiment = Experiment.load(path)
    assert experiment.with_() == experiment and experiment.with_().resolved() == experiment.resolved()


def test_an_experiment_shows_itself_shortly(tiny: Experiment) -> None:
    shown = tiny.with_(name="<b>tiny").__getattribute__("_repr_html_")()
    for word in ("&lt;b&gt;tiny", "llama-3.1-8b", "2 x mixed", "h100-sxm", "least_loaded", "synthetic", "40 requests", "<details>"):
        assert word in shown, word
    assert "<b>tiny" not in shown and len(re.sub(r"<details>.*?</details>", "", shown, flags=re.DOTALL)) < 2000


def test_requests_have_their_columns_as_types(tiny: Experiment) -> None:
    result = simulate(tiny)
    frame = result.requests
    assert list(RequestFrame.__annotations__) == list(frame.columns)
    kinds = {"int": "i", "float": "f", "bool": "b", "str": "O"}
    for name, kind in RequestFrame.__annotations__.items():
        what = re.fullmatch(r"pd\.Series\[(\w+)\]", kind)
        assert what is not None, kind
        column = frame[name]
        assert isinstance(column.dtype, pd.CategoricalDtype) if what[1] == "str" else column.dtype.kind == kinds[what[1]], name


def test_a_summary_tells_when_it_ran_and_p95_and_std(tiny: Experiment) -> None:
    result = simulate(tiny)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result.summary["run"]["date"])
    done = result.requests
    for key in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        values = done[key].dropna()
        assert result.summary[key]["p95"] == pytest.approx(values.quantile(0.95))
        assert result.summary[key]["std"] == pytest.approx(values.std(ddof=0), abs=1e-12)
    itl = result.summary["itl_s"]
    assert itl["p90"] <= itl["p95"] <= itl["p99"] and itl["std"] is not None
