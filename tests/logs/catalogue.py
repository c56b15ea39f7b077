"""What is recorded: seven simulations, one for each family of policy, and the live world on the virtual clock."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate
from tests.logs import live
from tests.logs.recording import Recording


def simulated(experiment: Experiment, path: Path) -> None:
    simulate(experiment, trace_events=path)


RECORDINGS = [
    Recording(
        "load", simulated, {"Dispatch": 240, "Left": 2, "Evict": 1, "Refused": 20, "priority": 40, "own objective": 240, "preempted": 5}
    ),
    Recording("prefix", simulated, {"prefix": 240, "cached": 150, "evicted": 100, "stays": 20, "Left": 1, "again": 1}),
    Recording("fetches", simulated, {"Fetch": 20, "Fetched": 20, "prefix": 100, "cached": 80, "Left": 1}),
    Recording("flips", simulated, {"Switch": 5, "Switched": 5, "paired": 280, "Left": 1, "goes on": 1}),
    Recording(
        "migrations",
        simulated,
        {"Migrate": 20, "Migrated": 20, "TransferFailed": 2, "Unreachable": 1, "Left": 1, "preempted": 20, "priority": 10},
    ),
    Recording("best_of", simulated, {"best_of": 200, "paired": 200, "Refused": 100, "preempted": 20, "Left": 1}),
    Recording("autoscale", simulated, {"Scale": 5, "Stop": 5, "Left": 5, "Joined": 8, "End": 20}),
    Recording(
        "live_moves",
        partial(live.serve, trouble=live.moves),
        {
            "Migrate": 8,
            "Migrated": 8,
            "Unreachable": 1,
            "Lost": 1,
            "Cancelled": 3,
            "Left": 3,
            "Evict": 1,
            "Scale": 2,
            "Stop": 2,
            "cached": 20,
        },
    ),
    Recording(
        "live_flips",
        partial(live.serve, trouble=live.flips),
        {"Switch": 3, "Switched": 3, "paired": 250, "Leads": 3, "Suspected": 2, "RegistryAway": 2, "Drained": 2, "Failed": 1, "Left": 1},
    ),
]
BY_NAME = {recording.name: recording for recording in RECORDINGS}
