"""Every policy on five workloads at three loads, by `make policy-table`: five sweeps of policy_table.yaml, and docs/results/policies.md.

A second start computes what is missing, as any `pdlab sweep` does. With `--page` alone the page is written of what is there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pdlab.policies.load import names
from pdlab.results.statistics import MeanInterval, mean_interval, paired_difference

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "policy-table"
PAGE = ROOT / "docs" / "results" / "policies.md"
SEEDS = 3
BASE = "least_loaded"
SIZES_ALONE = ("autoscale_sla",)  # which decide nothing on a fixed cluster
LOADS = ("light", "middle", "heavy")
WORKLOADS: dict[str, tuple[str, str, tuple[float, float, float]]] = {  # words, in YAML, requests/s
    "conversation": (
        "chats of six turns on average, one of four system prompts of 1,500 tokens, 5 s of thought",
        "{source: synthetic, requests: 600, prompt: {lognormal: {median: 500, cv: 1.2, max: 6000}}, "
        "output: {lognormal: {median: 250, cv: 0.8, max: 1500}}, "
        "sessions: {turns: 6, think_s: 5, system_prompt_tokens: 1500, groups: 4, max_context_tokens: 16000}}",
        (10, 20, 40),
    ),
    "code": (
        "Azure's code completions of 2023: prompts of 2,000 tokens on average that share nothing, answers of 30; Poisson",
        "{source: azure-code-2023, requests: 1000, arrival: {process: poisson}}",
        (8, 11, 14),
    ),
    "agentic": (
        "sessions of fifteen calls on average that grow to 32,000 tokens, one of three system prompts of 3,000, 2 s between",
        "{source: synthetic, requests: 600, prompt: {lognormal: {median: 500, cv: 1.2, max: 8000}}, "
        "output: {lognormal: {median: 100, cv: 0.8, max: 800}}, "
        "sessions: {turns: 15, think_s: 2, system_prompt_tokens: 3000, groups: 3, max_context_tokens: 32000}}",
        (6, 12, 24),
    ),
    "long-context": (
        "prompts of 9,000 tokens in the middle and up to 48,000, that share nothing; Poisson; TTFT objective 5 s",
        "{source: synthetic, requests: 1000, prompt: {lognormal: {median: 9000, cv: 0.8, max: 48000}}, "
        "output: {lognormal: {median: 250, cv: 0.8, max: 1000}}, ttft_slo_s: {0: 5.0}}",
        (1.0, 1.6, 2.0),
    ),
    "bursty": (
        "Azure's chats of 2023, gamma arrivals with a coefficient of variation of 4",
        "{source: azure-conv-2023, requests: 1000, arrival: {process: gamma, cv: 4}}",
        (6, 12, 18),
    ),
}
Figures = dict[tuple[str, float], dict[int, float]]  # by policy and rate, of each seed


def policies() -> list[str]:
    return [name for name in names() if name not in SIZES_ALONE]


def sweep(workload: str) -> None:
    _, spec, rates = WORKLOADS[workload]
    command = [sys.executable, "-m", "pdlab", "sweep", str(ROOT / "experiments" / "policy_table.yaml"), "--quiet"]
    command += ["--set", f"workload={spec[:-1]}, rate: 1}}", "--seeds", str(SEEDS), "--out", str(OUT / workload)]
    command += ["--grid", f"workload.rate={','.join(map(str, rates))}", "--grid", f"policy={','.join(policies())}"]
    subprocess.run(command, check=True, cwd=ROOT)


def figures(workload: str, name: str) -> Figures:
    runs = pd.read_parquet(OUT / workload / "sweep.parquet")
    found: Figures = {}
    for row in runs.to_dict("records"):
        if not row["failure"] and pd.notna(row[name]):
            found.setdefault((row["policy"], float(row["workload.rate"])), {})[int(row["seed"])] = float(row[name])
    return found


def cell(attained: MeanInterval | None, ttft: MeanInterval | None, mark: str) -> str:
    if attained is None or ttft is None:
        return "-"
    half = 0.0 if attained.half is None else 100 * attained.half
    return f"{100 * attained.mean:.0f} ±{half:.0f} %, {ttft.mean:.2f} s{mark}"


def against_base(attained: Figures, policy: str, rate: float) -> int:
    """1 and -1: more, and fewer, requests in time than the base, seed by seed, by more than the difference's interval."""
    found = paired_difference(attained.get((policy, rate), {}), attained.get((BASE, rate), {}))
    if found is None or found.half is None or abs(found.mean) <= found.half or abs(found.mean) < 0.005:
        return 0
    return 1 if found.mean > 0 else -1


def tables(wins: dict[str, list[str]], losses: dict[str, list[str]]) -> Iterator[str]:
    for workload, (words, _, rates) in WORKLOADS.items():
        attained, ttft = figures(workload, "slo_attainment"), figures(workload, "ttft_s.mean")
        yield f"## {workload.capitalize()}\n\n{words[0].upper()}{words[1:]}.\n"
        yield f"| policy | {' | '.join(f'{load}: {rate:g} requests/s' for load, rate in zip(LOADS, rates, strict=True))} |"
        yield f"|---|{'---|' * len(rates)}"
        heaviest = {name: mean_interval(list(attained.get((name, rates[-1]), {}).values())) for name in policies()}
        for name in sorted(policies(), key=lambda name: -(one.mean if (one := heaviest[name]) is not None else 0.0)):
            cells = []
            for load, rate in zip(LOADS, rates, strict=True):
                sign = against_base(attained, name, rate)
                (wins if sign > 0 else losses if sign < 0 else {}).setdefault(name, []).append(f"{workload}, {load}")
                values = (mean_interval(list(of.get((name, rate), {}).values())) for of in (attained, ttft))
                cells.append(cell(*values, " ▲" if sign > 0 else " ▼" if sign < 0 else ""))
            yield f"| `{name}` | {' | '.join(cells)} |"
        yield ""


def reading(wins: dict[str, list[str]], losses: dict[str, list[str]]) -> Iterator[str]:
    yield "| policy | more requests in time than `least_loaded` | fewer |"
    yield "|---|---|---|"
    for name in policies():
        if name != BASE:
            yield f"| `{name}` | {gathered(wins.get(name, []))} | {gathered(losses.get(name, []))} |"


def gathered(places: list[str]) -> str:
    """agentic (light, middle); code (heavy)"""
    found: dict[str, list[str]] = {}
    for place in places:
        workload, load = place.split(", ")
        found.setdefault(workload, []).append(load)
    return "; ".join(f"{workload} ({', '.join(loads)})" for workload, loads in found.items()) or "-"


HEAD = """# Every policy on five workloads

<!-- written by experiments/policy_table.py: make policy-table -->

Llama-3.1-8B on six simulated A100s: three prefill, three decode, NICs of 25 GB/s. A request is in time when its first token comes within
1 s, and each further one within 25 ms on average.

Each workload has three loads. Each cell is the share of requests in time, with its 95 % interval over {seeds} seeds, and the mean TTFT.
▲ and ▼ mark where a policy has more, or fewer, requests in time than `least_loaded`: the difference is taken seed by seed, and is outside
its interval.

`make policy-table` computes it all, in about {minutes} minutes of one core. Policies have their default parameters. `autoscale_sla` decides
nothing on a fixed cluster, and is left out. What policies need beside these workloads, such as offline requests, priorities or loads that
shift, is in [their own experiments](../reference/policies.md#when-each-wins).

## Where each wins and loses
"""


def main() -> None:
    if "--page" not in sys.argv:
        for workload in WORKLOADS:
            sweep(workload)
    wins: dict[str, list[str]] = {}
    losses: dict[str, list[str]] = {}
    body = list(tables(wins, losses))
    words = (ROOT / "experiments" / "policy_table.md").read_text(encoding="utf-8")
    PAGE.write_text("\n".join([HEAD.format(seeds=SEEDS, minutes=15), *reading(wins, losses), "", words, *body]), encoding="utf-8")


if __name__ == "__main__":
    main()
