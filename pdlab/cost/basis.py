"""What a cost's seconds rest on, in a line for who reads the figures: calibrated on what, how far off, and what was in no fit.

`basis` is the one place that reports ask; what a cost knows of its own error replaces `FITS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.cost.hardware import Hardware
from pdlab.cost.roofline import coefficients
from pdlab.cost.shapes import Model
from pdlab.cost.spec import CostSpec


@dataclass(frozen=True, slots=True)
class RooflineFit:
    """`error` is the mean absolute relative error of what was left out of each fit (of single engines' sets: of the fit itself), see
    `pdlab.cost.calibrate`; `tp` the largest size fitted."""

    measured: str
    figure: str
    error: float
    models: tuple[str, ...]
    accelerator: str
    tp: int


_2025 = ("llama-3.1-8b", "qwen3-32b")
_2023 = ("llama-2-70b", "bloom-176b")
FITS = {
    "h100": RooflineFit("H100's TPOT, engines of 2025", "TPOT", 0.073, _2025, "h100-sxm", 2),
    "h100-trtllm": RooflineFit("H100's TPOT, TensorRT-LLM 1.0", "TPOT", 0.037, _2025, "h100-sxm", 2),
    "h100-vllm": RooflineFit("H100's TPOT, vLLM 0.12", "TPOT", 0.034, _2025, "h100-sxm", 2),
    "h100-2023": RooflineFit("H100's decode steps, an engine of 2023", "decode", 0.035, _2023, "h100-sxm", 8),
    "a100-2023": RooflineFit("A100's decode steps, an engine of 2023", "decode", 0.058, _2023, "a100-sxm-80gb", 8),
}


def basis(spec: CostSpec, model: Model, chip: Hardware, tp: int) -> str:
    """Of `model` on `tp` x `chip`: h100-sxm, roofline calibrated on H100's TPOT, engines of 2025 (llama-3.1-8b, qwen3-32b: ±7 %)."""
    name = chip.name if tp == 1 else f"{chip.name} tp {tp}"
    return f"{name}: {_words(spec, model, chip, tp)}"


def _words(spec: CostSpec, model: Model, chip: Hardware, tp: int) -> str:
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
    return _roofline_words(spec.roofline or chip.family, model, chip, tp)


def _roofline_words(name: str, model: Model, chip: Hardware, tp: int) -> str:
    fit = FITS.get(name)
    if fit is None:
        return f"roofline, {coefficients(name).source}; its error is not known"
    words = f"roofline calibrated on {fit.measured} ({', '.join(fit.models)}: ±{fit.error:.0%} {fit.figure})".replace("%", " %")
    beyond = _beyond(fit, model, chip, tp)
    return f"{words}; extrapolated: {', '.join(beyond)}" if beyond else words


def _beyond(fit: RooflineFit, model: Model, chip: Hardware, tp: int) -> list[str]:
    """What was not in the fit."""
    found = []
    if model.name not in fit.models:
        kinds = [
            kind
            for kind, has in (("experts", model.expert_params), ("MLA", model.kv_lora_rank), ("recurrent layers", model.recurrence))
            if has
        ]
        found.append(f"{model.name} ({' and '.join(kinds)} were in no fit)" if kinds else model.name)
    if chip.name != fit.accelerator:
        found.append(chip.name)
    if tp > fit.tp:
        found.append(f"tp {tp}")
    return found
