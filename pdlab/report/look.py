"""How pictures look, and what they are drawn with: colours, axes of time and of shares, curves. No global state knows of them."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from PIL import Image

from pdlab.core.types import Stage
from pdlab.results.records import Column, Records, latencies
from pdlab.results.units import seconds

INK, GRID = "#4a5058", "#d5d9de"
PALETTE = ("#2f7ed8", "#e0803a", "#3aa06b", "#8e62c7", "#d1517a", "#2aa5b0", "#a08a2c", "#6f7b8a")
LIMIT = "#d43d3d"
STYLE: Any = {  # matplotlib types its keys as 300 literals
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
}
_POINTS = 400  # of a curve


class Picture(Figure):
    """A Figure that shows itself in a notebook, whether or not pyplot is in use."""

    def _repr_png_(self) -> bytes:
        whole, small = io.BytesIO(), io.BytesIO()
        self.savefig(whole, format="png", dpi=110)
        with Image.open(whole) as drawn:  # 256 colours take a third of the space of millions, and cover what is drawn
            drawn.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        return small.getvalue()


def picture(width: float, height: float) -> Picture:
    """An empty one, in inches; draw on it within `mpl.rc_context(STYLE)`."""
    figure = Picture(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def completed(records: Records, key: str) -> Column:
    """One latency of the completed requests that have it."""
    found = records.columns()
    values = latencies(found)[key][found["status"] == Stage.DONE]
    known: Column = values[~np.isnan(values)]
    return known


def curve(values: Column) -> tuple[Column, Column]:
    """(value, share of the values up to it), thinned to what can be seen."""
    share = np.linspace(0, 1, min(_POINTS, max(values.size, 2)))
    # The upper tail is what objectives are about: half of many points lie above p90.
    share = np.unique(np.concatenate((share[:: 2 if values.size > _POINTS else 1], 0.9 + share / 10)))
    return np.quantile(values, share), share


def limit_line(axes: Axes, limit: float | None, words: bool = True) -> None:
    """An objective, in seconds; none where it is None or inf."""
    if limit is None or not math.isfinite(limit):
        return
    axes.axvline(limit, color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.3)
    if words:
        axes.set_title(f"- - objective {seconds(limit)}", loc="right", color=LIMIT, fontsize=8, fontweight="normal")


def time_axis(axes: Axes) -> None:
    """Logarithmic seconds, across."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    low, high = axes.get_xlim()
    # Powers of ten alone are too few to read from, unless there are many.
    decades = math.log10(high / max(low, 1e-12))
    subs = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 3.3 else (1,)
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=subs, numticks=16))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.grid(visible=True, which="major")


def tick(x: float, _: int | None = None) -> str:
    """Seconds on an axis: 50 ms, 1.5 s."""
    scale, unit = (1.0, "s") if x >= 0.9995 else (1e3, "ms") if x >= 0.9995e-3 else (1e6, "us")
    return f"{x * scale:.4g} {unit}"


def share_axis(axes: Axes) -> None:
    """From nothing to all, up."""
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def nothing(axes: Axes, words: str = "nothing to show") -> None:
    """In place of a picture."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
