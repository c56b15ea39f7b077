from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pdlab import Experiment, simulate
from pdlab.report.result import Result
from pdlab.search.pool import ProcessPool, SimulationTask, WarmSimulator
from pdlab.search.replicate import UNSAVED, Replicated, ThisProcess, replicate


def small(policy: str = "round_robin") -> Experiment:
    rows = [{"role": "prefill", "hardware": "h100-sxm", "count": 2}, {"role": "decode", "hardware": "h100-sxm"}]
    return Experiment.parse(
        {
            "name": policy,
            "seed": 3,
            "model": "llama-3.1-8b",
            "workload": {"source": "synthetic", "requests": 30, "rate": 8, "prompt": 300, "output": 10},
            "cluster": {"instances": rows},
            "policy": policy,
        }
    )


def replicated(folder: Path, *policies: str) -> list[Replicated]:
    return [Replicated(policy, small(policy), folder / policy) for policy in policies]


def test_every_experiment_has_every_seed_and_the_files_of_its_first(tmp_path: Path) -> None:
    both, ended = replicated(tmp_path, "round_robin", "random"), []
    with ProcessPool(2) as pool:
        replicate(both, (3, 4), pool, ended=lambda: ended.append(1))
    assert len(ended) == 4 and [sorted(one.by_seed) for one in both] == [[3, 4], [3, 4]]
    for one in both:
        alone = simulate(one.experiment.model_copy(update={"seed": 4})).summary
        assert one.by_seed[4]["ttft_s.mean"] == alone["ttft_s"]["mean"]
        kept = Result.load(one.directory)
        assert kept.experiment["seed"] == 3 and kept.summary["ttft_s"]["mean"] == one.by_seed[3]["ttft_s.mean"]
        assert (one.directory / "report.html").is_file()
        frame = pd.read_parquet(one.write_seeds())
        assert frame["seed"].tolist() == [3, 4] and frame["goodput_rps"].notna().all()
    arrivals = [one.by_seed[4]["window.end_s"] for one in both]
    assert arrivals[0] == arrivals[1], "common random numbers"
    assert "roofline" in both[0].runs.rests_on[0]


def test_this_process_does_the_same(tmp_path: Path) -> None:
    here, there = replicated(tmp_path / "here", "random"), replicated(tmp_path / "there", "random")
    replicate(here, (3,), ThisProcess(), ended=lambda: None)
    with ProcessPool(1) as pool:
        replicate(there, (3,), pool, ended=lambda: None)
    own, its = ({k: v for k, v in one[0].by_seed[3].items() if not k.startswith("run.")} for one in (here, there))
    assert own == its


def test_a_place_that_cannot_be_written_costs_the_files_and_not_the_figures(tmp_path: Path) -> None:
    (tmp_path / "random").write_text("a file")
    (one,) = replicated(tmp_path, "random")
    replicate([one], None, ThisProcess(), ended=lambda: None)
    assert str(tmp_path / "random") in one.unsaved and UNSAVED in one.by_seed[3]
    assert one.by_seed[3]["completed"] == 30


@pytest.mark.parametrize("trim", [True, False])
def test_a_task_says_whether_its_warm_up_counts(trim: bool) -> None:
    warming = small().with_(**{"workload.requests": 400, "workload.rate": 6, "workload.prompt": 6000})
    wanted = simulate(warming, trim=trim).summary
    figures = WarmSimulator().perform(SimulationTask("one", warming, trim=trim)).figures
    assert figures["ttft_s.mean"] == wanted["ttft_s"]["mean"]
    assert figures["window.warm_up_requests"] == wanted["window"]["warm_up_requests"]
    assert (wanted["window"]["warm_up_requests"] > 0) == trim
