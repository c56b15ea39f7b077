from __future__ import annotations

import pytest

from pdlab.cost import CostSpec, hardware, model
from pdlab.cost.basis import FITS, basis
from pdlab.cost.catalogue import hardware_names
from pdlab.cost.roofline import coefficient_sets


def said(name: str = "llama-3.1-8b", chip: str = "h100-sxm", tp: int = 1, **spec: object) -> str:
    return basis(CostSpec(**spec), model(name), hardware(chip), tp)  # type: ignore[arg-type]


def test_what_was_fitted_says_how_far_off_it_is() -> None:
    assert said() == "h100-sxm: roofline calibrated on H100's TPOT, engines of 2025 (llama-3.1-8b, qwen3-32b: ±7 % TPOT)"
    assert "vLLM 0.12" in said(roofline="h100-vllm")


@pytest.mark.parametrize(
    ("given", "beyond"),
    [
        ({"name": "llama-3.1-70b", "tp": 2}, "extrapolated: llama-3.1-70b"),
        ({"name": "qwen3-30b-a3b"}, "extrapolated: qwen3-30b-a3b (experts were in no fit)"),
        ({"name": "deepseek-v3", "tp": 8}, "extrapolated: deepseek-v3 (experts and MLA were in no fit), tp 8"),
        ({"chip": "h200-sxm"}, "extrapolated: h200-sxm"),
        ({"tp": 4}, "extrapolated: tp 4"),
    ],
)
def test_what_was_in_no_fit_is_extrapolated(given: dict[str, object], beyond: str) -> None:
    assert said(**given).endswith(beyond)  # type: ignore[arg-type]


def test_what_has_no_known_error_says_so() -> None:
    assert "not calibrated" in said(chip="mi300x") and "its error is not known" in said(chip="mi300x")
    assert "fit distserve-opt-13b-a100" in said(fitted="distserve-opt-13b-a100")
    assert said(table="grid.json", extrapolate=True).endswith("table grid.json, continued beyond its grid")


@pytest.mark.parametrize("chip", hardware_names())
def test_every_accelerator_has_a_line(chip: str) -> None:
    assert said(chip=chip).startswith(f"{chip}: roofline")


def test_fits_are_of_shipped_sets_that_are_calibrated() -> None:
    assert {name for name, found in coefficient_sets().items() if found.calibrated} == set(FITS)
