"""What a workload lost is said once, with the reason where one is known, in both worlds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdlab.experiment.experiment import Experiment
from pdlab.proof.bench.run import Target, measure
from pdlab.report.result import Result
from pdlab.sim import simulate
from pdlab.workload.base import Workload
from tests.proof.bench.wire import tokens, wired


def run(world: str, workload: Workload | None = None) -> Result:
    source = {"source": "synthetic", "requests": 12, "rate": 200, "prompt": {"uniform": [8, 60]}, "output": 2, "max_prompt_tokens": 40}
    made: dict[str, Any] = {"model": "llama-3.1-8b", "workload": source}
    made["cluster"] = {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]}
    experiment = Experiment.parse(made)
    if world == "sim":
        return simulate(experiment, workload=workload)
    with wired(tokens) as wire:
        return measure(experiment, Target(wire.url), workload=workload)


def dropped(result: Result) -> list[str]:
    return [line for line in result.summary["warnings"] if "dropped" in line]


@pytest.mark.parametrize("world", ["sim", "real"])
def test_what_was_dropped_is_said_once_with_the_reason(world: str) -> None:
    result = run(world)
    assert dropped(result) == [f"{12 - result.summary['requests']} dropped: prompts over 40 tokens"]


@pytest.mark.parametrize("world", ["sim", "real"])
def test_what_was_dropped_without_a_reason_is_said_too(world: str) -> None:
    ones = np.ones(2, np.int32)
    assert dropped(run(world, Workload("mine", np.zeros(2), 8 * ones, ones, dropped=3))) == ["3 rows of the workload were dropped"]
