"""The picture of the README, by `make picture`: one set of accelerators, split in four ways, under more and more load.

Left: how many requests meet both objectives. Right: how evenly their tokens come, at one rate. The experiment is which_split.yaml; the
results are docs/pictures/split-light.svg and split-dark.svg, and the table in the experiment's head.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pdlab import Experiment, Result, simulate
from pdlab.report.look import STYLE, completed, curve, picture

ROOT = Path(__file__).resolve().parents[1]
RATES = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32)
SHOWN = 16  # the rate at right
TABLE = (4, 8, 16, 20, 24)
SPLITS = {
    "4 mixed": {"mixed": 4},
    "1 prefill + 3 decode": {"prefill": 1, "decode": 3},
    "2 prefill + 2 decode": {"prefill": 2, "decode": 2},
    "3 prefill + 1 decode": {"prefill": 3, "decode": 1},
}
COLOURS = {  # text, grid, the splits
    "light": ("#1f2328", "#d1d9e0", ("#8a939d", "#c2410c", "#0969da", "#1a7f37")),
    "dark": ("#e6edf3", "#3d444d", ("#8d96a0", "#f0883e", "#58a6ff", "#3fb950")),
}


def run(split: dict[str, int], rate: float) -> Result:
    rows = ", ".join(f"{{role: {role}, count: {count}, hardware: h100-sxm, tp: 4}}" for role, count in split.items())
    overrides = [f"cluster.instances=[{rows}]", f"workload.rate={rate}"]
    return simulate(Experiment.load(ROOT / "experiments" / "which_split.yaml", overrides), trim=False)


def draw(results: dict[str, list[Result]], text: str, grid: str, colours: tuple[str, ...]) -> bytes:
    """An SVG, its letters as paths, so that it looks alike everywhere."""
    colour = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "text.color"), text)
    own = {"grid.color": grid, "svg.fonttype": "path", "svg.hashsalt": "pdlab", "lines.linewidth": 2.2, "font.size": 10}
    with mpl.rc_context({**STYLE, **colour, **own}):
        figure = picture(9.6, 3.5)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for (name, runs), each in zip(results.items(), colours, strict=True):
            left.plot(RATES, [run.summary["slo_attainment"] for run in runs], color=each, label=name)
            values, shares = curve(completed(runs[RATES.index(SHOWN)].records, "tpot_s"))
            right.plot(values * 1e3, shares, color=each)
        finish(left, right, text)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def finish(left: Axes, right: Axes, text: str) -> None:
    left.set_title("Which split keeps its promises?")
    left.set_xlabel("requests a second, on 16 H100s (Llama 3.1 70B)")
    left.set_ylabel("requests that met both objectives")
    left.legend(loc="lower left", labelcolor=text)
    left.set_xlim(0, RATES[-1])
    right.set_title(f"The same requests, {SHOWN} a second")
    right.set_xlabel("milliseconds a token (TPOT), up to")
    right.set_ylabel("of the requests")
    right.axvline(30, color=text, linestyle=(0, (4, 2)), linewidth=1.0)
    right.annotate("objective", (30, 0.04), xytext=(4, 0), textcoords="offset points")
    right.set_xlim(10, 45)
    for axes in (left, right):
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def table(results: dict[str, list[Result]]) -> str:
    """For the head of the experiment."""
    rows = [[run.summary["slo_attainment"] for run in (runs[RATES.index(rate)] for runs in results.values())] for rate in TABLE]
    return "\n".join(f"#   {rate:<9}" + "".join(f"{share:>8.0%}" for share in row) for rate, row in zip(TABLE, rows, strict=True))


if __name__ == "__main__":
    results = {name: [run(split, rate) for rate in RATES] for name, split in SPLITS.items()}
    print(table(results))
    for mode, colours in COLOURS.items():
        path = ROOT / "docs" / "pictures" / f"split-{mode}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw(results, *colours))
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")
