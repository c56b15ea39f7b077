"""Every policy on five workloads at three loads, by `make policy-table`: five sweeps of policy_table.yaml, and docs/results/policies.md.

A second start computes what is missing, as any `pdlab sweep` does. With `--page` alone the page is written of what is there. With
`--policy NAME` only that policy runs, beside the one that it is compared with, and its rows of the page are replaced.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from pdlab.policies.load import names
from pdlab.results.statistics import MeanInterval, mean_interval, paired_difference

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "policy-table"
OUT_SOME = ROOT / "out" / "policy-table-some"
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
Rows = dict[str, list[str]]  # of a workload: the cells of each policy, by loads
WINS, LOSES = "▲", "▼"


def policies() -> list[str]:
    return [name for name in names() if name not in SIZES_ALONE]


def sweep(workload: str, some: Sequence[str], out: Path) -> None:
    _, spec, rates = WORKLOADS[workload]
    command = [sys.executable, "-m", "pdlab", "sweep", str(ROOT / "experiments" / "policy_table.yaml"), "--quiet"]
    command += ["--set", f"workload={spec[:-1]}, rate: 1}}", "--seeds", str(SEEDS), "--out", str(out / workload)]
    command += ["--grid", f"workload.rate={','.join(map(str, rates))}", "--grid", f"policy={','.join(some)}"]
    subprocess.run(command, check=True, cwd=ROOT)


def figures(workload: str, name: str, out: Path) -> Figures:
    runs = pd.read_parquet(out / workload / "sweep.parquet")
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


def computed(workload: str, some: Sequence[str], out: Path) -> Rows:
    attained, ttft = figures(workload, "slo_attainment", out), figures(workload, "ttft_s.mean", out)
    rates, found = WORKLOADS[workload][2], Rows()
    best_first = {
        name: -one.mean if (one := mean_interval(list(attained.get((name, rates[-1]), {}).values()))) is not None else 0.0 for name in some
    }
    for name in sorted(some, key=lambda name: best_first[name]):
        for rate in rates:
            sign = against_base(attained, name, rate)
            shares, times = (mean_interval(list(of.get((name, rate), {}).values())) for of in (attained, ttft))
            found.setdefault(name, []).append(cell(shares, times, f" {WINS}" if sign > 0 else f" {LOSES}" if sign < 0 else ""))
    return found


def written(workload: str, page: str) -> Rows:
    """Those that the page has."""
    part = page.partition(f"## {workload.capitalize()}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}


def in_time(cells: Sequence[str]) -> float:
    """Per cent, at the heaviest load."""
    figure = cells[-1].partition(" ")[0]
    return 0.0 if figure == "-" else float(figure)


def tables(rows: dict[str, Rows]) -> Iterator[str]:
    for workload, (words, _, rates) in WORKLOADS.items():
        yield f"## {workload.capitalize()}\n\n{words[0].upper()}{words[1:]}.\n"
        yield f"| policy | {' | '.join(f'{load}: {rate:g} requests/s' for load, rate in zip(LOADS, rates, strict=True))} |"
        yield f"|---|{'---|' * len(rates)}"
        for name, cells in sorted(rows[workload].items(), key=lambda one: -in_time(one[1])):  # stable: equals stay as they are
            yield f"| `{name}` | {' | '.join(cells)} |"
        yield ""


def reading(rows: dict[str, Rows]) -> Iterator[str]:
    yield "| policy | more requests in time than `least_loaded` | fewer |"
    yield "|---|---|---|"
    for name in sorted(set().union(*rows.values()) - {BASE}):
        yield f"| `{name}` | {' | '.join(gathered(marked(rows, name, mark)) for mark in (WINS, LOSES))} |"


def marked(rows: dict[str, Rows], name: str, mark: str) -> list[str]:
    cells = ((workload, load, text) for workload in WORKLOADS for load, text in zip(LOADS, rows[workload].get(name, []), strict=False))
    return [f"{workload}, {load}" for workload, load, text in cells if text.endswith(mark)]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone, of what was computed")
    parser.add_argument("--policy", action="append", choices=policies(), help="this one's rows alone; several times")
    given = parser.parse_args()
    some = list(dict.fromkeys([BASE, *given.policy])) if given.policy else policies()
    out = OUT_SOME if given.policy else OUT
    if not given.page:
        for workload in WORKLOADS:
            sweep(workload, some, out)
    there = PAGE.read_text(encoding="utf-8") if given.policy else ""
    rows = {workload: written(workload, there) | computed(workload, given.policy or some, out) for workload in WORKLOADS}
    words = (ROOT / "experiments" / "policy_table.md").read_text(encoding="utf-8")
    PAGE.write_text("\n".join([HEAD.format(seeds=SEEDS, minutes=15), *reading(rows), "", words, *tables(rows)]), encoding="utf-8")


if __name__ == "__main__":
    main()
