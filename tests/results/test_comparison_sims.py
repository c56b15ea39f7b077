from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pdlab.report.compare import comparison_page, comparison_table
from pdlab.report.result import Result
from pdlab.results.comparison import Comparison
from pdlab.results.comparison_sims import batch_means, compare_simulations, differences
from pdlab.sim import simulate
from tests.report.test_compare import shown
from tests.support.measured_runs import experiment


@pytest.fixture(scope="module")
def slow() -> Result:
    return simulate(experiment(rate=60, requests=200).with_(**{"cluster.instances.0.hardware": "a100-sxm-80gb"}))


@pytest.fixture(scope="module")
def fast() -> Result:
    return simulate(experiment(rate=60, requests=200))


@pytest.fixture(scope="module")
def both(slow: Result, fast: Result) -> Comparison:
    return compare_simulations(("out/slow", slow), ("out/fast", fast))


def said(comparison: Comparison) -> list[str]:
    return [line.words for line in comparison.groups[0].verdict]


def test_the_verdict_says_who_is_better_by_how_much_and_what_differs(both: Comparison) -> None:
    lines = said(both)
    ttft = next(line for line in lines if line.startswith("TTFT mean"))
    assert "fast is better by" in ttft and "±" in ttft
    assert any(line.startswith("slow is held back by prefill compute") for line in lines)
    assert "cluster.instances.0.hardware a100-sxm-80gb, not h100-sxm" in next(line for line in lines if "what differs" in line)
    assert both.groups[0].sides == ("slow", "fast")
    assert both.groups[0].notes[0] == "other hardware: 2 x a100-sxm-80gb, 1 x h100-sxm in slow, 3 x h100-sxm in fast"


def test_a_run_against_itself_is_alike_and_another_seed_is_no_pair(fast: Result) -> None:
    lines = said(compare_simulations(("a/run", fast), ("b/run", fast)))
    assert any(line.startswith("TTFT mean") and "alike" in line for line in lines) and "the files are the same" in lines
    other = simulate(experiment(rate=60, requests=200).model_copy(update={"seed": 5}))
    apart = compare_simulations(("a", fast), ("b", other))
    assert "a has seed 0, b 5: requests are no pairs" in apart.groups[0].notes
    assert any("tell nothing of chance" in line for line in said(apart))


def test_a_small_difference_is_undecided() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0.0, 1.0, 400)
    found, shifted = batch_means(noise), batch_means(noise + 1.0)
    assert found is not None and found.half is not None and abs(found.mean) < found.half
    assert shifted is not None and shifted.half == pytest.approx(found.half) and shifted.mean > shifted.half
    few = batch_means(np.ones(7))
    assert few is not None and few.half is None
    assert batch_means(np.full(9, np.nan)) is None


def test_the_page_begins_with_the_verdict_and_has_all_of_the_other(both: Comparison) -> None:
    page, table = comparison_page(both), shown(comparison_table(both))
    assert page.index("verdict good") < page.index("other hardware") < page.index("TTFT p99")
    assert page.count("<svg") == 2 and "The same requests in both" in page and "Load of the instances" in page
    assert "measured" not in page.split("What the words mean")[0] and "spread" not in page.split("What the words mean")[0]
    for words in ("fast is better by", "difference", "rank correlation", "warning  other hardware"):
        assert words in table


def test_what_differs_is_told_by_its_path_hardware_first() -> None:
    one = {"name": "a", "policy": {"dispatch": "random"}, "cluster": {"instances": [{"hardware": "h100-sxm", "tp": 1}]}}
    other = {"name": "b", "policy": "random", "seed": 3, "cluster": {"instances": [{"hardware": "h200-sxm", "tp": 1}]}}
    assert differences(one, other) == (
        "cluster.instances.0.hardware h100-sxm, not h200-sxm; policy dispatch random, not random; seed left out, not 3"
    )
    assert differences(one, {**one, "name": "another", "base_dir": str(Path("/else"))}) == ""
