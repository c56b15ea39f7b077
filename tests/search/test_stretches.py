"""A run's figures by stretches of its requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.pool import SimulationTask, WarmSimulator, flat_figures
from pdlab.search.stretches import FIGURES, Stretches, stretch_key
from pdlab.sim import simulate

ROOT = Path(__file__).resolve().parents[2]
BASE = Experiment.load(ROOT / "experiments" / "quickstart.yaml", ["workload.requests=120", "workload.rate=70", "policy=random"])


def test_one_stretch_is_the_run() -> None:
    result = simulate(BASE)
    whole = flat_figures(result.summary)
    own = Stretches(1, FIGURES).figures(result.records, result.slo)
    for name in FIGURES:
        if name != "goodput_rps":
            assert own[stretch_key(0, name)] == pytest.approx(whole[name]), name
    met = round(float(str(whole["slo_attainment"])) * 120)
    assert own[stretch_key(0, "goodput_rps")] == pytest.approx(met / (result.requests.arrival_s.max() - result.requests.arrival_s.min()))


def test_stretches_are_of_equally_many_requests_by_arrival() -> None:
    result = simulate(BASE)
    own = Stretches(4, ("ttft_s.mean", "slo_attainment")).figures(result.records, result.slo)
    frame = result.requests.sort_values("arrival_s")
    for index in range(4):
        some = frame.iloc[30 * index : 30 * index + 30]
        assert own[stretch_key(index, "ttft_s.mean")] == pytest.approx(some.ttft_s.mean())
        assert own[stretch_key(index, "slo_attainment")] == pytest.approx(some.good.mean())


def test_a_task_has_them_of_its_part() -> None:
    task = SimulationTask("k", BASE, (0.5, 1.0), figures=Stretches(2, ("ttft_s.p99",)))
    found = WarmSimulator().perform(task)
    assert found.failure == ""
    assert found.figures["requests"] == 60
    assert {name for name in found.figures if name.startswith("stretches.")} == {"stretches.0.ttft_s.p99", "stretches.1.ttft_s.p99"}


def test_more_stretches_than_requests_are_refused() -> None:
    result = simulate(BASE)
    with pytest.raises(UsageError, match=r"^120 requests are fewer than 121 stretches; ask for fewer, or take a longer workload$"):
        Stretches(121, ("ttft_s.p99",)).figures(result.records, result.slo)
