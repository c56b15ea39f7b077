"""What a run gives back: all that is known of it, and its pictures.

    result = simulate(Experiment.load("experiments/quickstart.yaml"))
    result.summary["slo_attainment"], result.requests.groupby("prefill_instance", observed=True).ttft_s.mean(), result.plot()

What draws is loaded when it is asked for: a simulation whose result is only counted does not wait for matplotlib.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from pdlab.results.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, TRACE = "report.html", "trace.json.gz"


class Result(Run):
    """A run that can be looked at."""

    def plot(self) -> Figure:
        """TTFT and TPOT distributions, load over time, and a timeline of some requests."""
        from pdlab.report.figures import overview

        return overview(self.records, self.samples, self.slo, self.name)

    def _write(self, directory: Path) -> None:
        from pdlab.report.html import run_page
        from pdlab.report.perfetto import write_trace

        page = run_page(self.summary, self.records, self.samples, self.experiment)
        (directory / REPORT).write_text(page, encoding="utf-8")
        if self.spans:
            write_trace(directory / TRACE, self.records, spans=self.spans, samples=self.samples)
        super()._write(directory)

    def _repr_html_(self) -> str:
        from pdlab.report.html import fragment

        return f"<b>{html.escape(self.name)}</b>{fragment(self.summary)}"
