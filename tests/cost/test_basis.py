from __future__ import annotations

import pytest

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, hardware, model
from pdlab.cost.basis import FITTED, basis, known_set
from pdlab.cost.catalogue import hardware_names
from pdlab.cost.roofline import coefficient_sets
from pdlab.experiment.experiment import Experiment
from pdlab.sim.outcome import rests_on
from tests.experiment.test_spec import changed


def said(name: str = "llama-3.1-8b", chip: str = "h100-sxm", tp: int = 1, **spec: object) -> str:
    return basis(CostSpec(**spec), model(name), hardware(chip), tp)  # type: ignore[arg-type]


def test_what_was_fitted_says_how_far_off_it_is() -> None:
    own = coefficient_sets()["h100-vllm"]
    line = said()
    assert line.startswith(f"h100-sxm: roofline fitted to measured servers of vllm on h100 ({own.rows} rows): TPOT within -")
    assert line.endswith("in 95 % of cases")
    assert "splitwise" in said("llama-2-70b", roofline="h100-2023")


@pytest.mark.parametrize(
    ("given", "beyond"),
    [
        ({"name": "llama-3.1-405b", "tp": 8}, "extrapolated: llama-3.1-405b"),
        ({"chip": "h20"}, "extrapolated: h20"),
        ({"name": "mixtral-8x7b", "chip": "b300-sxm", "tp": 2}, "extrapolated: mixtral-8x7b, b300-sxm"),
    ],
)
def test_what_was_in_no_fit_is_extrapolated(given: dict[str, object], beyond: str) -> None:
    assert said(**given).endswith(beyond)  # type: ignore[arg-type]


def test_what_has_no_known_error_says_so() -> None:
    assert "not calibrated" in said(chip="mi300x") and "a guess" in said(chip="mi300x")
    assert "fit distserve-opt-13b-a100" in said(fitted="distserve-opt-13b-a100")
    assert said(table="grid.json", extrapolate=True).endswith("table grid.json, continued beyond its grid")


@pytest.mark.parametrize("chip", hardware_names())
def test_every_accelerator_has_a_line(chip: str) -> None:
    assert said(chip=chip).startswith(f"{chip}: roofline")


def test_every_calibrated_set_belongs_to_a_fit() -> None:
    for name, found in coefficient_sets().items():
        assert any(known_set(one, found) for one in FITTED) == found.calibrated, name


@pytest.mark.parametrize(
    ("like", "version", "beyond"),
    [
        ("vllm", "0.8.5", "extrapolated: vllm 0.8.5 (measured: 0.11 to 0.18)"),
        ("vllm", "0.19.0rc1", "extrapolated: vllm 0.19.0rc1 (measured: 0.11 to 0.18)"),
        ("sglang", "0.4.10.post2", "extrapolated: sglang 0.4.10.post2 (measured: 0.5)"),
        ("vllm", "1", "extrapolated: vllm 1 (measured: 0.11 to 0.18)"),
    ],
)
def test_a_version_of_an_engine_that_nothing_measured_is_near_is_said(like: str, version: str, beyond: str) -> None:
    assert basis(CostSpec(), model("llama-3.1-8b"), hardware("h100-sxm"), 1, like, version).endswith(beyond)


@pytest.mark.parametrize(("like", "version"), [("vllm", "0.11.2"), ("vllm", "v0.18"), ("trtllm", "1.2.0rc6.post2"), ("pdlab", "0.1")])
def test_a_version_that_was_measured_changes_nothing(like: str, version: str) -> None:
    plain = basis(CostSpec(), model("llama-3.1-8b"), hardware("h100-sxm"), 1, like)
    assert basis(CostSpec(), model("llama-3.1-8b"), hardware("h100-sxm"), 1, like, version) == plain


def test_an_experiment_may_say_its_engines_version() -> None:
    told = changed("engine", {"like": "sglang", "version": "0.3.6"})
    assert all("extrapolated: sglang 0.3.6" in line for line in rests_on(Experiment.parse(told)))
    with pytest.raises(UsageError, match="version"):
        Experiment.parse(changed("engine", {"version": "latest"}))
