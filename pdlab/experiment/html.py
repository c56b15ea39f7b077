"""An experiment in a few lines, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdlab.report.page import escaped

if TYPE_CHECKING:
    from pdlab.experiment.experiment import Experiment


def fragment(experiment: Experiment) -> str:
    """A table of what it is, and all of its YAML folded away."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escaped(key)}</th><td style='text-align:left'>{escaped(value)}</td></tr>"
        for key, value in _lines(experiment)
    )
    folded = f"<details><summary>YAML</summary><pre>{escaped(experiment.to_yaml())}</pre></details>"
    return f"<b>{escaped(experiment.name)}</b><table>{rows}</table>{folded}"


def _lines(experiment: Experiment) -> list[tuple[str, str]]:
    workload, slo = experiment.workload, experiment.slo
    counts = [f"{workload.requests:,} requests" if workload.requests is not None else "all requests"]
    counts += [f"{workload.rate:g} requests/s"] if workload.rate is not None else []
    rows = [
        f"{row.count} x {row.role} on {row.hardware}" + (f", tp {row.tp}" if row.tp > 1 else "") for row in experiment.cluster.instances
    ]
    return [
        ("model", experiment.model),
        ("workload", ", ".join([str(workload.source), *counts])),
        ("cluster", "; ".join(rows)),
        ("policy", str(experiment.policy)),
        ("objectives", f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s"),
        ("faults", str(len(experiment.faults)) if experiment.faults else "none"),
        ("seed", str(experiment.seed)),
    ]
