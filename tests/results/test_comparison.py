from __future__ import annotations

import math

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.results.comparison import ComparedFigure, Pairs, compare, policy_of
from tests.support.measured_runs import measured, simulated

NAN = math.nan


def test_errors_are_the_simulations_signed_and_relative_to_the_measured_mean() -> None:
    line = ComparedFigure("TTFT", "ttft_s.mean", 0.9, (1.0, 1.4))
    assert line.mean == 1.2 and line.error == pytest.approx(-0.25)
    assert line.half_range == pytest.approx(0.2) and line.spread == pytest.approx(1 / 6)
    assert not line.inside and ComparedFigure("TTFT", "", 1.1, (1.0, 1.4)).inside


def test_one_measured_run_has_no_spread_and_what_is_missing_has_no_error() -> None:
    alone = ComparedFigure("TTFT", "", 1.0, (1.0,))
    assert alone.error == 0.0 and math.isnan(alone.spread) and not alone.inside
    missing = ComparedFigure("queue", "", 1.0, (NAN, NAN))
    assert math.isnan(missing.error) and math.isnan(missing.spread) and not missing.inside
    assert math.isnan(ComparedFigure("x", "", 1.0, (0.0,)).error) and ComparedFigure("x", "", 0.0, (0.0,)).error == 0.0
    assert ComparedFigure("x", "", 1.0, (NAN, 2.0)).error == -0.5


def test_pairs_know_their_bias_their_size_and_their_order() -> None:
    pair = Pairs("TTFT", "ttft_s", np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 3.0, 5.0]))
    assert pair.bias == pytest.approx(-0.1) and pair.typical == pytest.approx(0.1)
    assert pair.correlation == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert math.isnan(Pairs("", "", np.ones(4), np.arange(4.0)).correlation)
    none = Pairs("", "", np.array([]), np.array([]))
    assert math.isnan(none.bias) and math.isnan(none.typical) and math.isnan(none.correlation)


def test_a_simulation_is_compared_with_all_its_repeats_whatever_their_order() -> None:
    sim = simulated()
    (group,) = compare([("b", measured(sim, 1.1)), ("a", sim), ("c", measured(sim, 1.3))]).groups
    assert group.simulated == (sim,) and len(group.measured) == 2 and not group.notes
    ttft = group.line("ttft_s.mean")
    assert ttft.error == pytest.approx(1 / 1.2 - 1) and ttft.spread == pytest.approx(0.1 / 1.2) and not ttft.inside
    assert group.line("itl_s.p99").error == 0.0 and group.line("itl_s.p99").inside
    assert group.line("transfer_s.p50").error == pytest.approx(1 / 1.2 - 1)
    assert all(pair.bias == pytest.approx(1 / 1.2 - 1) and pair.correlation == pytest.approx(1.0, abs=1e-4) for pair in group.pairs)
    assert [name for name, _ in group.instances] == ["prefill-0", "prefill-1", "decode-0"]
    assert {line.key: line.error for line in group.instances[2][1]}["decode_tokens"] == 0.0


def test_policies_are_ranked_in_both_worlds_and_ties_decide_nothing() -> None:
    one, two = simulated("least_loaded"), simulated("round_robin")
    right = compare([("a", one), ("b", two), ("c", measured(one, 1.0)), ("d", measured(two, 1.5))])
    reverse = one.summary["ttft_s"]["mean"] < two.summary["ttft_s"]["mean"]
    ranking = {r.label: r for r in right.rankings}["TTFT mean"]
    assert ranking.pairs == ranking.decided == 1 and ranking.measured == ("least_loaded", "round_robin")
    assert ranking.agree == int(reverse) and (ranking.simulated == ranking.measured) == reverse
    tied = compare([("a", one), ("b", two), ("c", measured(one, 1.0)), ("d", measured(two, 0.5)), ("e", measured(two, 1.7))])
    assert {r.label: r for r in tied.rankings}["TTFT mean"].decided == 0


def test_of_several_simulations_the_mean_counts() -> None:
    one, run = simulated(), measured(simulated(), 1.0)
    (alone,) = compare([("a", one), ("c", run)]).groups
    slower = simulated()
    slower.summary["ttft_s"]["mean"] *= 3
    (group,) = compare([("a", one), ("b", slower), ("c", run)]).groups
    assert len(group.simulated) == 2 and not group.notes
    assert group.line("ttft_s.mean").simulated == pytest.approx(2 * alone.line("ttft_s.mean").simulated)
    assert group.line("ttft_s.p50") == alone.line("ttft_s.p50") and group.instances == alone.instances
    assert all((a.simulated == b.simulated).all() for a, b in zip(group.pairs, alone.pairs, strict=True))
    other = simulated()
    other.experiment["engine"]["max_seqs"] = 3
    assert "different experiments: engine.max_seqs 3" in compare([("a", one), ("b", other), ("c", run)]).groups[0].notes[0]


def test_a_world_that_is_missing_is_the_users_mistake() -> None:
    sim = simulated()
    with pytest.raises(UsageError, match=r"a: simulated with policy least_loaded, and no measured result has it; .* pdlab bench"):
        compare([("a", sim)])
    with pytest.raises(UsageError, match=r"b: measured .* no simulated result has it; add one of pdlab sim"):
        compare([("b", measured(sim, 1.0))])


def test_policies_put_together_have_a_readable_name() -> None:
    sim = simulated()
    sim.summary["run"]["policy"] = {"dispatch": "prefix_aware", "handoff": "least_kv"}
    assert policy_of(sim) == "dispatch prefix_aware, handoff least_kv"
    sim.summary["run"]["policy"] = {"dispatch": {"name": "random"}}
    assert policy_of(sim) == '{"dispatch": {"name": "random"}}'


def test_policies_that_are_equal_share_a_place() -> None:
    one, two = simulated("least_loaded"), simulated("least_loaded")
    two.summary["run"]["policy"] = "round_robin"
    found = compare([("a", one), ("b", two), ("c", measured(one, 1.0)), ("d", measured(two, 1.5))])
    ranking = {r.label: r for r in found.rankings}["TTFT mean"]
    assert ranking.simulated == ("least_loaded = round_robin",) and ranking.measured == ("least_loaded", "round_robin")
    assert (ranking.agree, ranking.decided) == (0, 1)
