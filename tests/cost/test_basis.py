from __future__ import annotations

import pytest

from pdlab.cost import CostSpec, hardware, model
from pdlab.cost.basis import FITTED, basis, known_set
from pdlab.cost.catalogue import hardware_names
from pdlab.cost.roofline import coefficient_sets


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
