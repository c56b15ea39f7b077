"""What an experiment's `workload:` asks for is what it gets, and what makes no sense is said in one line."""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from pdlab.core.types import UsageError
from pdlab.workload import builtin
from pdlab.workload.base import Workload
from pdlab.workload.spec import WorkloadSpec, build
from pdlab.workload.stats import arrivals
from pdlab.workload.writer import write

SYNTHETIC = {"source": "synthetic", "rate": 10.0, "requests": 1000, "prompt": 100, "output": 20}


def made(seed: int = 0, base_dir: Path = Path(), **keys: Any) -> Workload:
    spec = {key: value for key, value in keys.items() if value is not None}
    return build(WorkloadSpec.model_validate(spec), seed, base_dir)


def synthetic(seed: int = 0, **keys: Any) -> Workload:
    return made(seed, **(SYNTHETIC | keys))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Ten requests with times, priorities and prefixes."""
    count = 10
    times_s = np.array([0.0, 0.1, 0.2, 4.0, 4.1, 4.2, 8.0, 8.1, 8.2, 12.0])
    prompts = np.arange(32, 32 + 16 * count, 16, dtype=np.int32)
    chains = [tuple(range(1, 1 + (int(p) + 48) // 16)) for p in prompts]
    workload = Workload("mine", times_s, prompts, np.full(count, 48, np.int32), chains, priority=(np.arange(count) % 2).astype(np.int16))
    write(workload, tmp_path / "mine.csv")
    return tmp_path


def columns(workload: Workload) -> list[NDArray[Any]]:
    return [workload.arrival_s, workload.prompt_tokens, workload.output_tokens]


@pytest.mark.parametrize("keys", [{"prompt": {"lognormal": {"median": 500, "cv": 1}}}, {"sessions": {"turns": 3}}, {"arrival": "poisson"}])
def test_equal_seeds_build_equal_workloads_and_others_differ(keys: dict[str, Any]) -> None:
    one, same, other = synthetic(1, **keys), synthetic(1, **keys), synthetic(2, **keys)
    assert all(np.array_equal(a, b) for a, b in zip(columns(one), columns(same), strict=True))
    assert list(one.hashes or ()) == list(same.hashes or ())
    assert not np.array_equal(one.arrival_s, other.arrival_s)


def test_priorities_and_objectives_move_no_arrival() -> None:
    plain, labelled = synthetic(), synthetic(priorities={0: 0.5, 1: 0.5}, ttft_slo_s={"uniform": [1, 2]})
    assert all(np.array_equal(a, b) for a, b in zip(columns(plain), columns(labelled), strict=True))


@pytest.mark.parametrize(
    "arrival", ["poisson", {"process": "gamma", "cv": 3}, "constant", {"process": "ramp", "to_rate": 40, "over_s": 30}], ids=str
)
def test_duration_ends_the_arrivals_whatever_the_process(arrival: Any) -> None:
    workload = synthetic(arrival=arrival, requests=None, duration_s=60.0)
    assert 55 < workload.arrival_s[-1] < 60
    expected = 10 * 60 if not isinstance(arrival, dict) or "to_rate" not in arrival else 25 * 30 + 40 * 30
    assert len(workload) == pytest.approx(expected, rel=0.35)


def test_the_first_of_requests_and_duration_ends_a_workload() -> None:
    assert len(synthetic(duration_s=1e6)) == 1000
    assert len(synthetic(duration_s=10.0, arrival="constant")) == 100
    assert made(source="azure-code-2023", duration_s=600.0).arrival_s[-1] < 600


@pytest.mark.parametrize("name", builtin.NAMES)
def test_a_built_in_has_its_own_rate_unless_one_is_given(name: str) -> None:
    assert made(source=name).rate_rps == pytest.approx(builtin.rate_rps(name), rel=0.06)
    assert made(source=name, requests=300, rate=20.0).rate_rps == pytest.approx(20.0)


def test_rescaling_keeps_burstiness() -> None:
    own, fast = arrivals(made(source="azure-code-2023")), arrivals(made(source="azure-code-2023", rate=25.0))
    assert own is not None
    assert fast is not None
    assert fast["interarrival_cv"] == pytest.approx(own["interarrival_cv"])


def test_a_file_keeps_its_times_unless_a_rate_stretches_them(trace: Path) -> None:
    assert made(0, trace, source="mine.csv").arrival_s[-1] == 12.0
    assert made(0, trace, source="mine.csv", rate=1.5).arrival_s == pytest.approx(made(0, trace, source="mine.csv").arrival_s / 2)
    assert len(made(0, trace, source="mine.csv", requests=4)) == 4
    assert len(made(0, trace, source="mine.csv", duration_s=5.0)) == 6


def test_a_files_times_and_lengths_can_be_replaced(trace: Path) -> None:
    closed = made(0, trace, source="mine.csv", arrival={"process": "closed", "concurrency": 3})
    assert closed.concurrency == 3
    steady = made(0, trace, source="mine.csv", arrival="constant", rate=2.0)
    assert np.diff(steady.arrival_s) == pytest.approx([0.5] * 9)
    replaced = made(0, trace, source="mine.csv", prompt=7)
    assert (set(replaced.prompt_tokens.tolist()), replaced.hashes) == ({7}, None)


def test_a_shorter_output_shortens_the_chain_not_the_prompts(trace: Path) -> None:
    cut = made(0, trace, source="mine.csv", max_output_tokens=16)
    assert cut.hashes is not None
    assert [len(chain) for chain in cut.hashes] == ((cut.prompt_tokens + 16) // 16).tolist()
    assert cut.prompt_hashes(3) == made(0, trace, source="mine.csv").prompt_hashes(3)


def test_too_long_prompts_are_dropped_and_counted(trace: Path) -> None:
    kept = made(0, trace, source="mine.csv", max_prompt_tokens=100)
    assert kept.prompt_tokens.max() <= 100
    assert (len(kept), kept.dropped, kept.notes) == (5, 5, ("5 dropped: prompts over 100 tokens",))
    with pytest.raises(UsageError, match="leaves no request; the shortest prompt has 32"):
        made(0, trace, source="mine.csv", max_prompt_tokens=20)


def test_priorities_have_their_shares() -> None:
    workload = synthetic(requests=20_000, priorities={0: 3, 5: 1})
    assert workload.priority is not None
    assert workload.priority.dtype == np.int16
    assert (workload.priority == 5).mean() == pytest.approx(0.25, abs=0.02)


def test_priorities_and_objectives_have_nothing_to_do_with_lengths() -> None:
    workload = synthetic(requests=20_000, prompt={"uniform": [1, 1000]}, priorities={0: 1, 1: 1}, ttft_slo_s={"uniform": [1, 2]})
    for column in (workload.priority, workload.ttft_slo_s):
        assert column is not None
        assert abs(np.corrcoef(workload.prompt_tokens, column)[0, 1]) < 0.05


def test_objectives_are_for_all_for_a_priority_or_spread() -> None:
    workload = synthetic(requests=20_000, priorities={0: 1, 1: 1}, ttft_slo_s={1: 0.5}, tpot_slo_s=0.1)
    assert workload.priority is not None
    assert workload.ttft_slo_s is not None
    assert set(workload.ttft_slo_s[workload.priority == 1].tolist()) == {0.5}
    assert np.all(np.isnan(workload.ttft_slo_s[workload.priority == 0]))
    assert workload.tpot_slo_s is not None
    assert set(workload.tpot_slo_s.tolist()) == {0.1}
    spread = synthetic(requests=20_000, ttft_slo_s={"uniform": [1, 3]}, tpot_slo_s={"shares": [[0.02, 3], [0.1, 7]]})
    assert spread.ttft_slo_s is not None
    assert (spread.ttft_slo_s.min(), spread.ttft_slo_s.mean(), spread.ttft_slo_s.max()) == pytest.approx((1, 2, 3), rel=0.02)
    assert spread.tpot_slo_s is not None
    assert (spread.tpot_slo_s == 0.02).mean() == pytest.approx(0.3, abs=0.02)


def test_a_files_own_priorities_choose_the_objective(trace: Path) -> None:
    workload = made(0, trace, source="mine.csv", ttft_slo_s={1: 0.5})
    assert workload.ttft_slo_s is not None
    assert np.isnan(workload.ttft_slo_s).tolist() == [True, False] * 5


def test_answers_and_candidates() -> None:
    assert synthetic().best_of is None
    both = synthetic(n=2, best_of=4)
    assert (set(both.n.tolist()), set(both.best_of.tolist())) == ({2}, {4})  # type: ignore[union-attr]
    assert set(synthetic(n=3).best_of.tolist()) == {3}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source": "azure-conv"}, "did you mean azure-conv-2023"),
        ({"source": "synthetic", "rate": 1, "requests": 1}, "needs prompt and output"),
        (SYNTHETIC | {"rate": None}, "needs rate"),
        (SYNTHETIC | {"requests": None}, "needs requests or duration_s"),
        (SYNTHETIC | {"rate": -1}, "greater than 0"),
        (SYNTHETIC | {"arrival": {"process": "closed", "concurrency": 2}}, "closed takes no rate"),
        (SYNTHETIC | {"arrival": {"process": "closed", "concurrency": 2}, "rate": None, "duration_s": 5}, "closed takes no duration_s"),
        (SYNTHETIC | {"arrival": {"process": "closed", "concurrency": 2}, "rate": None, "sessions": {}}, "closed takes no sessions"),
        ({"source": "sharegpt", "sessions": {}}, "sessions are for source synthetic"),
        (SYNTHETIC | {"n": 3, "best_of": 2}, "best_of 2 must be at least n 3"),
        (SYNTHETIC | {"ttft_slo_s": {2: 1.0}}, "ttft_slo_s names priority 2"),
        (SYNTHETIC | {"ttft_slo_s": {"uniform": [2, 1]}}, "ends before it begins"),
        (SYNTHETIC | {"tpot_slo_s": {"uniform": [1, 2], "shares": [[1, 1]]}}, "not uniform and shares"),
        (SYNTHETIC | {"requets": 3}, "requets"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        made(**keys)


def test_mistakes_that_show_only_when_building(tmp_path: Path, trace: Path) -> None:
    once = Workload("once", np.zeros(3), np.full(3, 5, np.int32), np.full(3, 5, np.int32))
    write(once, tmp_path / "once.csv")
    with pytest.raises(UsageError, match="has no times"):
        made(0, tmp_path, source="once.csv", rate=2.0)
    with pytest.raises(UsageError, match=r"arrival needs workload\.rate"):
        made(0, tmp_path, source="once.csv", arrival="poisson")
    with pytest.raises(UsageError, match=r"absent\.csv"):
        made(0, tmp_path, source="absent.csv")
    with pytest.raises(UsageError, match="more than 100,000,000 requests"):
        synthetic(requests=None, duration_s=1e12)


def test_a_million_requests_are_quick_and_small() -> None:
    before = process_time()
    workload = synthetic(requests=1_000_000, prompt={"lognormal": {"median": 1000, "cv": 1}})
    assert process_time() - before < 2.0
    assert sum(column.nbytes for column in columns(workload)) < 20e6
