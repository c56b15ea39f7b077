"""The highest rate at which an experiment still meets its objectives: bisection over `workload.rate`.

    python experiments/capacity.py experiments/distserve_opt13b.yaml [--attainment 0.9] [--set key.path=value ...]

Prints the rate, and the rate for each accelerator.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pdlab import Experiment, simulate


def attainment(experiment: Experiment, rate: float) -> float:
    """The share of all requests that meet both objectives at `rate` requests/s."""
    workload = experiment.workload.model_copy(update={"rate": rate})
    return float(simulate(experiment.model_copy(update={"workload": workload}), trim=False).summary["slo_attainment"])


def capacity_rps(experiment: Experiment, wanted: float = 0.9, *, relative: float = 0.01) -> float:
    """Requests/s, to within `relative`; 0.0 where even a trickle misses."""
    low, high = 0.0, 0.05
    while attainment(experiment, high) >= wanted:
        low, high = high, high * 2
        if high > 1e5:
            raise SystemExit("no rate up to 1e5 requests/s misses the objectives")
    if not low:
        return 0.0
    while high / low > 1 + relative:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attainment(experiment, middle) >= wanted else (low, middle)
    return low


def accelerators(experiment: Experiment) -> int:
    return sum(p.tp for p in experiment.placements())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--attainment", type=float, default=0.9)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args(arguments)
    experiment = Experiment.load(asked.file, asked.set)
    rate = capacity_rps(experiment, asked.attainment)
    count = accelerators(experiment)
    print(f"{asked.file}: {rate:.2f} requests/s at {asked.attainment:.0%} attainment, {rate / count:.3f} for each of {count} accelerators")


if __name__ == "__main__":
    main()
