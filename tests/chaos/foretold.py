"""The same rounds in the simulator: what it foretells beside what was measured."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate
from tests.chaos.dice import Round
from tests.chaos.schedule import INSTANCES, faults

TTFT_S, TPOT_S = 2.0, 0.1  # an objective that a cluster at peace meets
CALIBRATE_S = 30
DETECT_S = 0.02  # on one machine who does not listen refuses at once, twice


@dataclass(frozen=True, slots=True)
class Told:
    """Of each request of a round that one of the clients of router r0 sent and did not hang up on: attempts, TTFT and TPOT in seconds."""

    attempts: list[int]
    ttft_s: list[float]
    tpot_s: list[float]


def calibrate(folder: Path, experiment: Path, model: Path) -> Path:
    """A profile of this machine's engine, while nothing else runs. Steps are timed by CPU time."""
    profile = folder / "profile.json"
    command = [sys.executable, "-m", "pdlab", "calibrate", str(experiment), "--model", str(model), "--threads", "1", "--clock", "cpu"]
    command += ["--seconds", str(CALIBRATE_S), "--no-beside", "--transport", "tcp", "--out", str(profile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert profile.exists(), done.stderr
    return profile


def measured(played: Round) -> Told:
    rows = [c for n, c in enumerate(played.clients) if _counts(played, n)]
    return Told(
        [int(client.timeline.get("attempts", 0)) or 1 for client in rows],
        [client.first_s - client.asked_s if client.tokens else math.inf for client in rows],
        [(client.ended_s - client.first_s) / (len(client.tokens) - 1) if client.error is None else math.inf for client in rows],
    )


def foretold(played: Round, base: dict[str, Any], folder: Path, profile: Path) -> Told:
    """All requests of router r0 are simulated, since a router finds out by its own requests who is dead; those that `measured` tells of are
    told."""
    trace = folder / "trace.csv"
    numbers = [n for n, router in enumerate(played.of_router) if router == "r0"]
    clients = [played.clients[n] for n in numbers]
    lines = [f"{c.asked_s - played.began_s},{len(c.prompt)},{len(c.expected)}" for c in clients]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    plain = {key: value for key, value in base.items() if key != "cluster"}
    experiment = Experiment.parse(
        {
            **plain,
            "name": "dice",
            "workload": {"source": str(trace)},
            "cluster": {
                "instances": [{"name": name, "role": role, "hardware": str(profile), "host": "here"} for name, role in INSTANCES.items()],
                "reports": base["cluster"]["reports"],
                "detect_s": DETECT_S,
            },
            "slo": {"ttft_s": TTFT_S, "tpot_s": TPOT_S},
            "faults": faults(played.troubles, played.back_s),
        },
        str(folder / "dice.yaml"),
    )
    (folder / "dice.yaml").write_text(experiment.to_yaml())
    rows = simulate(experiment).requests
    kept = rows[[_counts(played, n) for n in numbers]]
    return Told([int(x) for x in kept.attempts], [float(x) for x in kept.ttft_s], [float(x) for x in kept.tpot_s])


def _counts(played: Round, number: int) -> bool:
    return played.of_router[number] == "r0" and number not in played.hung_up


def beside(rounds: Sequence[tuple[Told, Told]]) -> list[tuple[str, str, str]]:
    """Rows of a table: figure, simulated, measured."""

    def sides(figure: Any) -> list[str]:
        return [figure([pair[side] for pair in rounds]) for side in (0, 1)]

    def retried(told: Sequence[Told]) -> str:
        return str(sum(attempts > 1 for one in told for attempts in one.attempts))

    def wait(share: float) -> Any:
        def figure(told: Sequence[Told]) -> str:
            found = sorted(ttft for one in told for ttft in one.ttft_s)
            return f"{found[min(len(found) - 1, int(share * len(found)))]:.2f} s"

        return figure

    def attainment(told: Sequence[Told]) -> str:
        good = [t <= TTFT_S and not p > TPOT_S for one in told for t, p in zip(one.ttft_s, one.tpot_s, strict=True)]
        return f"{statistics.mean(good):.1%}"

    both = sum(a > 1 and b > 1 for x, y in rounds for a, b in zip(x.attempts, y.attempts, strict=True))
    table = [("requests retried", *sides(retried)), ("the same requests in both", str(both), str(both))]
    table += [(f"TTFT, p{share * 100:.0f}", *sides(wait(share))) for share in (0.5, 0.9, 0.99)]
    return [*table, (f"attainment of TTFT {TTFT_S:g} s and TPOT {TPOT_S:g} s", *sides(attainment))]  # type: ignore[list-item]
