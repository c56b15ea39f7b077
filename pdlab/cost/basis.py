"""What a cost's seconds rest on, in a line for who reads the figures: calibrated on what, how far off, and what was in no fit.

`basis` is the one place that reports ask; the error is `pdlab.cost.error`'s.
"""

from __future__ import annotations

import re

from pdlab.cost.error import cost_error
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.roofline import Coefficients, coefficient_sets, coefficients, coefficients_of
from pdlab.cost.shapes import Model
from pdlab.cost.spec import CostSpec

ENGINES = ("vllm", "sglang", "trtllm")
_2023 = ("bloom-176b", "llama-2-70b")
_HOPPER = (
    "deepseek-r1",
    "deepseek-v3",
    "glm-5",
    "gpt-oss-120b",
    "llama-3.1-70b",
    "llama-3.1-8b",
    "qwen3-235b-a22b",
    "qwen3-32b",
    "qwen3.5-397b-a17b",
)
_BLACKWELL = ("deepseek-r1", "deepseek-v3", "glm-5", "gpt-oss-120b", "llama-3.1-70b", "qwen3-32b", "qwen3.5-397b-a17b")
FITTED = {  # models and accelerators that the sets of a generation were fitted to
    "h100-2023": (_2023, ("h100-sxm",)),
    "a100-2023": (_2023, ("a100-sxm-80gb",)),
    "h100": (_HOPPER, ("h100-sxm", "h200-sxm")),
    "blackwell": (_BLACKWELL, ("b200-sxm", "gb200-nvl72")),
}
VERSIONS = {"vllm": ("0.11", "0.18"), "sglang": ("0.5", "0.5"), "trtllm": ("1.0", "1.3")}  # of engines, the oldest and newest measured


def basis(spec: CostSpec, model: Model, chip: Hardware, parallel: Parallel | int = 1, like: str = "vllm", version: str = "") -> str:
    """Of `model` on so many `chip` (a number is a tp), under that version of an engine, where it is known. Such as: h100-sxm: roofline
    fitted to measured servers of vllm on h100 (271 rows): TPOT within -24 to +32 % in 95 % of cases."""
    spread = fitting(model, parallel)
    name = chip.name if spread.gpus == 1 else f"{chip.name} {spread}"
    return f"{name}: {_words(spec, model, chip, like, version)}"


def _words(spec: CostSpec, model: Model, chip: Hardware, like: str, version: str) -> str:
    if spec.table is not None:
        return f"table {spec.table}" + (", continued beyond its grid" if spec.extrapolate else "")
    if isinstance(spec.fitted, str):
        return f"fit {spec.fitted}, as DistServe publishes it; its error is not known here"
    if spec.fitted is not None:
        return "a fit given in the file; its error is not known here"
    if chip.profile is not None:
        return f"measured by pdlab calibrate, {chip.profile.made_at or 'at an unknown time'}"
    if spec.roofline is not None and not isinstance(spec.roofline, str):
        return "roofline with fractions given in the file; its error is not known here"
    return _roofline_words(spec, model, chip, like, version)


def _roofline_words(spec: CostSpec, model: Model, chip: Hardware, like: str, version: str) -> str:
    found = coefficients(spec.roofline) if isinstance(spec.roofline, str) else coefficients_of(chip, like)
    error = cost_error(spec, chip, like)
    assert error is not None, "a named set has one"
    if not found.calibrated:
        return f"roofline, {found.source}: {error.tpot_words}, which is a guess"
    words = f"roofline {found.source} ({found.rows:,} rows): {error.tpot_words} in 95 % of cases"
    beyond = [*_beyond(found, model, chip), *_other_version(like, version)]
    return f"{words}; extrapolated: {', '.join(beyond)}" if beyond else words


def _beyond(found: Coefficients, model: Model, chip: Hardware) -> list[str]:
    """What was not in the fit."""
    models, chips = next(known for name, known in FITTED.items() if known_set(name, found))
    return [*([model.name] if model.name not in models else []), *([chip.name] if chip.name not in chips else [])]


def _other_version(like: str, version: str) -> list[str]:
    """An engine's version that is older or newer than all that were measured."""
    if not version or like not in VERSIONS:
        return []
    oldest, newest = VERSIONS[like]
    if _number(oldest) <= _number(version)[:2] <= _number(newest):
        return []
    return [f"{like} {version} (measured: {oldest if oldest == newest else f'{oldest} to {newest}'})"]


def _number(version: str) -> tuple[int, ...]:
    """0.11.2rc1 -> (0, 11, 2)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("rc")[0])) + (0,) * (version.count(".") == 0)


def known_set(name: str, found: Coefficients) -> bool:
    """Is it that set, or one engine's of that generation?"""
    return any(coefficients(one) == found for one in (name, *(f"{name}-{engine}" for engine in ENGINES)) if one in coefficient_sets())
