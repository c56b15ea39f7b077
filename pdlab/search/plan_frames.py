"""A plan in a notebook: asked in one call, shown as a table and a picture."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import pandas as pd

from pdlab.experiment.experiment import Experiment
from pdlab.report.look import PALETTE, STYLE, Picture, limit_line, picture
from pdlab.search.plan import Plan, PlanQuestion
from pdlab.search.plan_rows import COLUMNS, rows
from pdlab.search.plan_store import PlanStore
from pdlab.search.pool import ProcessPool, usable_cores


def planned(experiment: Experiment, question: PlanQuestion, *, folder: Path | None = None, jobs: int | None = None) -> Plan:
    """The answer, by simulations on all cores. With `folder` they are kept for the next time. Raises UsageError."""
    with TemporaryDirectory(prefix="pdlab-") as aside, closing(ProcessPool(jobs or usable_cores())) as pool:
        store = PlanStore.open(folder or Path(aside) / "plan", experiment.resolved())
        with closing(store):
            found = Plan(experiment, question)
            found.run(pool, store)
            return found


def plan_frame(plan: Plan) -> pd.DataFrame:
    """The ranked deployments, worded; the first is the best."""
    found = rows(plan)
    frame = pd.DataFrame([row.cells for row in found], columns=list(COLUMNS), index=[row.rank for row in found])
    frame["not told apart"] = ["" if row.rank == 1 or not row.tied else "from the first" for row in found]
    return frame


def plan_picture(plan: Plan) -> Picture:
    """Capacity over TPOT p99 at 80 % of it, with the interval over the seeds."""
    with mpl.rc_context(STYLE):
        figure = picture(7.2, 3.6)
        axes = figure.subplots()
        for colour, (split, label) in zip(PALETTE, (("mixed", "mixed"), ("pd", "prefill and decode apart")), strict=False):
            own = [row for row in rows(plan) if row.finalist.candidate.split == split and row.tpot_s is not None]
            x, y = [row.tpot_s or 0.0 for row in own], [row.capacity.mean for row in own]
            axes.errorbar(x, y, [row.capacity.half or 0.0 for row in own], linestyle="", marker="o", color=colour, capsize=2.5, label=label)
            for row in own:
                axes.annotate(
                    row.finalist.candidate.layout_words, (row.tpot_s or 0.0, row.capacity.mean), (6, 4), textcoords="offset points"
                )
        limit_line(axes, plan.base.slo.tpot_s)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("TPOT p99 at 80 % of capacity, s")
        axes.set_ylabel("capacity, requests/s")
        axes.legend(loc="lower left")
        return figure
