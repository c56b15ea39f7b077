"""What a plan leaves in its folder: the page, the winner's experiment, the commands that start it, and all of it for programs."""

from __future__ import annotations

from typing import Any

from pdlab.experiment.experiment import Experiment
from pdlab.search.plan import Plan
from pdlab.search.plan_commands import script
from pdlab.search.plan_page import plan_page
from pdlab.search.plan_rows import PlanRow, verdict
from pdlab.search.plan_search import COMFORT
from pdlab.search.plan_store import BEST, COMMANDS, PAGE, PlanStore


def write_plan(planned: Plan, found: list[PlanRow], store: PlanStore) -> Experiment:
    """The winner's experiment, which is kept, too."""
    best = at_comfort(planned, found[0])
    commands = script(best, BEST)
    store.write(BEST, (_head(planned, found) + best.to_yaml()).encode())
    store.write(COMMANDS, commands.encode())
    store.write(PAGE, plan_page(planned, found, best, commands).encode())
    store.write_found(_plain(planned, found))
    return best


def at_comfort(planned: Plan, row: PlanRow) -> Experiment:
    """A row's experiment, at 80 % of its capacity."""
    whole = planned.judge.experiment(row.finalist.candidate)
    changes: dict[str, Any] = {"name": f"{planned.base.name}-best", "workload.rate": round(COMFORT * row.capacity.mean, 3)}
    return whole.with_(changes)


def _head(planned: Plan, found: list[PlanRow]) -> str:
    lines = [
        verdict(planned, found),
        f"pdlab plan {planned.base.name}.yaml: {planned.question.words}",
        f"workload.rate is {COMFORT:.0%} of its capacity.",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _plain(planned: Plan, found: list[PlanRow]) -> dict[str, Any]:
    question = planned.question
    return {
        "experiment": planned.base.resolved(),
        "question": {
            "gpus": question.gpus,
            "rate": question.rate,
            "usd_per_h": question.usd_per_h,
            "objective": question.objective,
            "failures": question.lost,
            "seeds": list(planned.seeds),
            "requests": planned.judge.requests,
        },
        "considered": planned.considered,
        "not_possible": dict(planned.space.pruned),
        "left_out": {**planned.ruled_out, **planned.search.left},
        "finalists": [row.plain for row in found],
    }
