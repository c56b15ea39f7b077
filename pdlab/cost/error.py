"""How far off a cost is, said of itself: the interval that holds measured TPOT and TTFT in 95 % of rows.

A roofline's is that of its coefficients: of configurations of its engine and generation that were left out of the fit, or, where nothing
was measured, a wide one. A measured profile and a table say nothing of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from pdlab.cost.hardware import Hardware
from pdlab.cost.roofline import Coefficients, coefficients, coefficients_of
from pdlab.cost.spec import CostSpec


@dataclass(frozen=True, slots=True)
class CostError:
    """Measured / simulated lies between exp(-x) and exp(x) in 95 % of rows: `tpot` and `ttft` are x. `rows` it is known from; 0: it is a
    guess, since nothing like this was measured."""

    tpot: float
    ttft: float
    rows: int
    source: str

    @property
    def measured(self) -> bool:
        return self.rows > 0

    def interval(self, value: float, measure: str = "tpot") -> tuple[float, float]:
        """(low, high) about a simulated TPOT or TTFT."""
        width = exp(self.tpot if measure == "tpot" else self.ttft)
        return value / width, value * width

    @property
    def tpot_words(self) -> str:
        return f"TPOT within {_span(self.tpot)}"

    def __str__(self) -> str:
        known = f"from {self.rows:,} measured rows" if self.measured else "a guess: nothing like it was measured"
        return f"TPOT within {_span(self.tpot)}, TTFT within {_span(self.ttft)} in 95 % of cases ({known})"


def _span(x: float) -> str:
    return f"-{100 * (1 - exp(-x)):.0f} to +{100 * (exp(x) - 1):.0f} %"


def cost_error(spec: CostSpec, hardware: Hardware, like: str = "vllm") -> CostError | None:
    """Of the cost that `pdlab.cost.build` makes of the same; None where nothing is said of it: a table, a fit, a measured profile, or
    coefficients that a file gives itself."""
    if spec.table is not None or spec.fitted is not None or hardware.profile is not None or isinstance(spec.roofline, Coefficients):
        return None
    k = coefficients(spec.roofline) if spec.roofline is not None else coefficients_of(hardware, like)
    return CostError(k.error, k.ttft_error, k.rows if k.calibrated else 0, k.source)
