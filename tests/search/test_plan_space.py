"""Which deployments there are, where their instances lie, and how much they could carry at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.types import Role, UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.plan_bound import SLACK, PlanBounds, RequestShape
from pdlab.search.plan_judge import RateAsk, SimulatedJudge
from pdlab.search.plan_search import CapacityBracket
from pdlab.search.plan_space import PlanCandidate, PlanSpace, packs, placed
from pdlab.search.pool import SimulationTask, TaskResult, WarmSimulator
from pdlab.search.run_journal import RunJournal
from pdlab.workload.spec import build as build_workload

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def experiment(*overrides: str) -> Experiment:
    return Experiment.load(EXPERIMENTS / "which_ratio.yaml", overrides)


def candidates(base: Experiment, gpus: str | None, usd: float | None = None, **options: Any) -> tuple[PlanSpace, list[PlanCandidate]]:
    space = PlanSpace.of(base)
    return space, space.candidates(space.fleet(gpus, usd), False, **options)


def layouts(found: list[PlanCandidate]) -> set[str]:
    return {one.layout_words for one in found}


def test_every_split_that_leaves_no_room_for_another_instance_is_there() -> None:
    _, found = candidates(experiment("plan.tp=[2, 4]"), "8")
    assert layouts(found) == {
        *(
            "4M tp2",
            "2M tp4",
            "1P tp2 + 3D tp2",
            "2P tp2 + 2D tp2",
            "3P tp2 + 1D tp2",
            "2P tp2 + 1D tp4",
            "1P tp4 + 2D tp2",
            "1P tp4 + 1D tp4",
        ),
    }
    _, every = candidates(experiment("plan.tp=[4]"), "16", every=True)
    assert {"1M tp4", "2M tp4", "4M tp4", "1P tp4 + 1D tp4", "1P tp4 + 3D tp4"} <= layouts(every)


def test_settings_are_multiplied_and_transfer_is_of_those_who_hand_off() -> None:
    base = experiment("plan={tp: [4], max_batch_tokens: [512, 2048], max_seqs: [64], transfer: [push, pull], policy: [random]}")
    _, found = candidates(base, "8")
    assert len([one for one in found if one.split == "mixed"]) == 2
    assert sorted(one.transfer for one in found if one.split == "pd") == ["pull", "pull", "push", "push"]


def test_a_candidate_is_an_experiment() -> None:
    base = experiment()
    space, found = candidates(base, "8")
    one = next(one for one in found if one.layout_words == "2P tp2 + 1D tp4" and one.transfer == "push" and one.max_batch_tokens == 512)
    made = base.with_(space.changes(one))
    assert [(p.name, p.parallel.tp, p.host) for p in made.placements()] == [
        ("decode-0", 4, "host-0"),
        ("prefill-0", 2, "host-0"),
        ("prefill-1", 2, "host-0"),
    ]
    assert (made.transfer.mode, made.transfer.granularity, made.engine.max_batch_tokens) == ("push", "layer", 512)


def test_what_does_not_fit_is_counted_by_its_reason() -> None:
    space, found = candidates(experiment("plan={tp: [1, 3, 8, 16], splits: [mixed], max_batch_tokens: [512], max_seqs: [256]}"), "16")
    assert layouts(found) == {"2M tp8"}
    assert len(space.pruned) == 3 and sum(space.pruned.values()) == 3 * 1
    reasons = " ".join(space.pruned)
    for words in ("does not fit 1 x h100-sxm", "tp 3 does not divide", "tp 16 is more than the 8 accelerators of a host"):
        assert words in reasons


def test_instances_that_do_not_fit_hosts_are_no_deployment() -> None:
    """Two of three and one of two are eight accelerators, and one host has room; four of three are twelve, and two hosts have not."""
    base = experiment("model=qwen3-14b", "plan={tp: [5], splits: [mixed], max_batch_tokens: [512], max_seqs: [256]}")
    space, found = candidates(base, "16")
    assert layouts(found) == set() and "tp 5 does not divide" not in " ".join(space.pruned)
    assert "its instances do not fit hosts of 8 accelerators" in space.pruned


def test_roles_share_hosts_where_they_can() -> None:
    space, found = candidates(experiment("plan.tp=[4]"), "16")
    layout = next(one.layout for one in found if one.layout_words == "2P tp4 + 2D tp4")
    hosts: dict[str, set[str]] = {}
    for row in placed(layout, 8):
        hosts.setdefault(row["host"], set()).add(row["role"])
    assert hosts == {"host-0": {"prefill", "decode"}, "host-1": {"prefill", "decode"}}
    assert packs(layout, space.fleet("16", None), 8)


def test_types_and_dollars_bound_a_fleet() -> None:
    base = experiment("plan={hardware: [h100-sxm, a100], tp: [4], usd_per_h: {h100-sxm: 2.0, a100: 1.0}}")
    _, found = candidates(base, "h100-sxm=4,a100=8")
    assert "1M tp4 h100-sxm + 2M tp4 a100" in layouts(found) and "1P tp4 h100-sxm + 2D tp4 a100" in layouts(found)
    assert all(one.used.get("h100-sxm", 0) <= 4 and one.used.get("a100", 0) <= 8 for one in found)
    space, cheap = candidates(base, None, 12.0)
    assert max(map(space.usd_per_h, cheap)) == 12.0


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("0", "takes an accelerator at least"),
        ("many", "write a number, or TYPE=NUMBER"),
        ("b200-sxm=8", "none of the accelerators of the file"),
    ],
)
def test_a_fleet_that_cannot_be_is_told(gpus: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PlanSpace.of(experiment()).fleet(gpus, None)


def bounds(base: Experiment) -> PlanBounds:
    return PlanBounds(PlanSpace.of(base), build_workload(base.workload, base.seed, base.base_dir))


def test_a_bound_adds_up_over_instances_and_roles_bind_one_another() -> None:
    base = experiment()
    of = bounds(base).of
    by_layout = {one.layout_words: bound for one in candidates(base, "8")[1] if (bound := of(one)) and one.max_batch_tokens == 8192}
    assert by_layout["3P tp2 + 1D tp2"].binds == "decode" and by_layout["1P tp2 + 3D tp2"].binds == "prefill compute"
    assert by_layout["2P tp2 + 2D tp2"].rps == pytest.approx(2 * by_layout["3P tp2 + 1D tp2"].rps)


def test_an_instance_less_is_a_lower_bound() -> None:
    base = experiment()
    found = bounds(base)
    one = next(one for one in candidates(base, "8")[1] if one.layout_words == "2P tp2 + 1D tp4")
    assert found.less(one, 1).rps == 0.0
    assert found.less(one, 0).rps == pytest.approx(found.of(one).rps / 2, rel=0.05)


def test_an_objective_that_nobody_meets_alone_bounds_all_at_nothing() -> None:
    base = experiment("slo.tpot_s=0.002")
    bound = bounds(base).of(candidates(base, "8")[1][0])
    assert bound.rps == 0.0 and bound.alone < 0.9 and bound.misses == "TPOT"


def test_prefixes_that_came_before_are_not_computed_again() -> None:
    base = experiment("workload={source: mooncake-conversation, requests: 300, rate: 1}")
    workload = build_workload(base.workload, base.seed, base.base_dir)
    cold, warm = (RequestShape.of(workload, (1.0, 0.05), cached=cached) for cached in (False, True))
    assert 0 < warm.prompt_tokens < 0.95 * cold.prompt_tokens
    assert bounds(base).shares_prefixes


class Here:
    """A pool of this process."""

    def __init__(self) -> None:
        self.simulator, self.tasks = WarmSimulator(), 0

    def run(self, tasks: Sequence[SimulationTask]) -> Iterator[TaskResult]:
        self.tasks += len(tasks)
        yield from map(self.simulator.perform, tasks)

    def close(self) -> None:
        pass


@contextmanager
def judged(folder: Path, base: Experiment, lost: int = 0) -> Iterator[tuple[SimulatedJudge, list[PlanCandidate], Here]]:
    space, found = candidates(base, "8")
    pool = Here()
    with closing(RunJournal.locked(folder, "a test")) as journal:
        yield SimulatedJudge(space, 200, pool, journal, lost=lost), found, pool


def test_no_simulated_capacity_exceeds_its_bound(tmp_path: Path) -> None:
    """Of short lengths, so that a run is long for each of its requests."""
    workload = "workload={source: synthetic, requests: 300, rate: 1, prompt: 600, output: 24}"
    base = experiment(workload, "plan={max_batch_tokens: [2048], max_seqs: [256], transfer: [pull], policy: [least_loaded]}")
    bound = bounds(base)
    with judged(tmp_path, base) as (judge, found, _):
        _compare(judge, found, bound)


def _compare(judge: SimulatedJudge, found: list[PlanCandidate], bound: PlanBounds) -> None:
    chosen = [one for one in found if one.layout_words in ("2M tp4", "2P tp2 + 1D tp4", "2P tp2 + 2D tp2", "1P tp4 + 1D tp4")]
    assert len(chosen) == 4
    for one in chosen:
        most = bound.of(one).rps
        assert not judge.scores([RateAsk(one, SLACK * most, 300, 7)])[0].met
        bracket = CapacityBracket(most, step=1.3, resolution=0.2)
        while (rate := bracket.next) is not None:
            bracket.tell(rate, judge.scores([RateAsk(one, rate, 300, 7)])[0])
        assert 0.3 * most < bracket.capacity < SLACK * most, one.words


def test_what_was_simulated_is_not_simulated_again(tmp_path: Path) -> None:
    with judged(tmp_path, experiment()) as (judge, found, pool):
        ask = RateAsk(found[0], 2.0, 60, 7)
        first = judge.scores([ask, ask])
        assert pool.tasks == 1 and first[0] == first[1]
        judge.scores([ask])
        assert pool.tasks == 1
    with judged(tmp_path, experiment()) as (judge, _, pool):
        assert judge.scores([ask])[0].attained == first[0].attained and pool.tasks == 0


def test_with_a_failure_the_worst_loss_counts(tmp_path: Path) -> None:
    with judged(tmp_path, experiment(), lost=1) as (judge, found, pool):
        one = next(one for one in found if one.layout_words == "3P tp2 + 1D tp2")
        (score,) = judge.scores([RateAsk(one, 6.0, 100, 7)])
        assert pool.tasks == 2 and not score.met, "without its only decode instance it misses"
        mixed = next(one for one in found if one.layout_words == "2M tp4")
        assert judge.scores([RateAsk(mixed, 2.0, 100, 7)])[0].met


def test_roles_are_those_of_the_layout() -> None:
    _, found = candidates(experiment(), "8")
    assert {group.role for one in found for group in one.layout} == {Role.MIXED, Role.PREFILL, Role.DECODE}


def test_an_accelerator_that_the_file_describes_is_planned_with() -> None:
    own = "cluster.instances=[{role: mixed, hardware: {like: h100-sxm, name: mine, hbm_gib: 160, usd_per_h: 3.0}}]"
    base = experiment(own, "plan={tp: [1], splits: [mixed]}")
    space, found = candidates(base, "2")
    assert layouts(found) == {"2M tp1"} and space.usd_per_h(found[0]) == 6.0
    assert str(base.with_(space.changes(found[0])).placements()[0].hardware) == "mine"
    with pytest.raises(UsageError, match=r"plan\.usd_per_h: h200-sxm is none of the accelerators of the file: mine"):
        PlanSpace.of(base.with_({"plan.usd_per_h": {"h200-sxm": 2.0}}))
