"""Figures as a reader wants them: three digits and a unit; a dash for what does not exist."""

from __future__ import annotations

from math import floor, isfinite, log10

from pdlab.results.statistics import MeanInterval

_NOTHING = 1e-9  # of a mean: an interval as small is that of sums in another order
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


def interval_words(found: MeanInterval, unit: str) -> str:
    """85.0 ±1.2 ms, no finer than the interval says; `unit` is s, % or empty, `half` may be missing."""
    factor, shown = _interval_scale(abs(found.mean), unit)
    mean, half = found.mean / factor, 0.0 if found.half is None else found.half / factor
    if half < _NOTHING * abs(mean):
        half = 0.0
    words = f"{mean:,.0f}" if abs(mean) >= 1000 or mean == 0.0 else _three(mean)
    finest = max(0, 1 - floor(log10(half))) if half else 3
    if finest < len(words.partition(".")[2]):
        words = f"{mean:.{finest}f}"
    return f"{words}{'' if found.half is None else f' ±{_two(half)}'}{shown}"


def _interval_scale(mean: float, unit: str) -> tuple[float, str]:
    if unit == "%":
        return 0.01, " %"
    if unit == "s":
        return (1.0, " s") if mean >= 1 else (1e-3, " ms")
    return 1.0, ""


def _two(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
