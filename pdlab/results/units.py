"""Figures as a reader wants them: three digits and a unit; a dash for what does not exist."""

from __future__ import annotations

from math import isfinite

MISSING = "–"  # noqa: RUF001  an en dash, as in printed tables


def seconds(value: float | None) -> str:
    """12.3 s, 85.0 ms, 410 us."""
    if value is None or not isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f} s"
    if size >= 1:
        return f"{_three(value)} s"
    if size >= 1e-3:
        return f"{_three(value * 1e3)} ms"
    return "0 ms" if size < 5e-10 else f"{_three(value * 1e6)} us"


def _three(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """98.7 %; never 100 % (or 0 %) for what is not all (or nothing)."""
    if value is None or not isfinite(value):
        return MISSING
    if 0 < value < 0.001:
        return "<0.1 %"
    if 0.999 < value < 1:
        return ">99.9 %"
    return f"{value * 100:.1f} %" if value not in (0, 1) else f"{value * 100:.0f} %"


def number(value: float | None) -> str:
    """12,345, 8.31, 0.0123."""
    if value is None or not isfinite(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes: 1.21 TB, 340 MB."""
    if value is None or not isfinite(value):
        return MISSING
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"
