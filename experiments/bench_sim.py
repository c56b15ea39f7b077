"""How fast the simulator is: one row of docs/benchmarks.md, or the whole table.

    python experiments/bench_sim.py --requests 100000 --policy round_robin
    python experiments/bench_sim.py --table --sketch ../shared/reference/macro_step_sketch.py

2P+2D of llama-3.1-8b on h100-sxm, Poisson arrivals: 30 requests/s of 1024 prompt and 128 output tokens (`constant`), or
azure-conv-2023 lengths at 8 requests/s (`azure`). KV is pulled after prefill over
25 GB/s. CPU seconds are the whole process's user time, imports and results
included; `run` is the simulation alone. With PYTHONPATH=build/compiled (see `make compile`) the compiled modules are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

WORKLOADS = {
    "constant": {"source": "synthetic", "rate": 30.0, "prompt": 1024, "output": 128},
    "azure": {"source": "azure-conv-2023", "rate": 8.0},
}
POLICIES = {"round_robin": "round_robin", "prefix_aware": {"dispatch": "prefix_aware", "handoff": "least_kv"}}


def one(requests: int, policy: str, workload: str) -> dict[str, float]:
    """Simulate in this process."""
    from pdlab.sim import simulate
    from pdlab.spec import Experiment

    instances = [{"role": role, "count": 2, "hardware": "h100-sxm"} for role in ("prefill", "decode")]
    experiment = Experiment.parse(
        {
            "name": "bench",
            "seed": 1,
            "model": "llama-3.1-8b",
            "workload": {**WORKLOADS[workload], "requests": requests},
            "cluster": {"instances": instances, "network": {"gbytes_per_s": 25}},
            "transfer": {"mode": "pull"},
            "policy": POLICIES[policy],
        }
    )
    summary = simulate(experiment).summary
    assert summary["completed"] == requests, summary["completed"]
    assert summary["leaked_blocks"] == 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": requests,
        "user_s": usage.ru_utime,
        "run_s": summary["run"]["cpu_s"],
        "requests_per_cpu_s": requests / usage.ru_utime,
        "run_requests_per_cpu_s": summary["run"]["requests_per_cpu_s"],
        "output_tokens_per_cpu_s": summary["output_tokens_per_s"] * summary["duration_s"] / usage.ru_utime,
        "peak_rss_mib": usage.ru_maxrss / 1024,
    }


def fresh(requests: int, policy: str, workload: str) -> dict[str, float]:
    """Simulate in a process of its own."""
    command = [sys.executable, __file__, "--requests", str(requests), "--policy", policy, "--workload", workload, "--json"]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def sketch(path: Path, requests: int) -> float:
    """Requests per CPU-second of the bare SimPy sketch, as it says itself."""
    said = subprocess.run([sys.executable, str(path), str(requests)], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\d+) requests and", said)
    assert found is not None, said
    return float(found[1])


def table(sketch_path: Path | None, repeats: int, million: bool) -> None:
    """Every row; the sketch runs before each, and ratios are of neighbours."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {'compiled' if _compiled() else 'pure Python'}\n")
    columns = ("workload", "policy", "requests", "user s", "requests / CPU s, process", "run alone", "of the sketch")
    print(f"| {' | '.join(columns)} | M output tokens / CPU s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    sizes = [1_000, 10_000, 100_000]
    rows = [(w, p, n) for w in WORKLOADS for p in POLICIES for n in sizes] + ([("constant", "round_robin", 1_000_000)] if million else [])
    for workload, policy, requests in rows:
        runs, ratios = [], []
        for _ in range(repeats if requests < 1_000_000 else 1):
            yardstick = sketch(sketch_path, 100_000) if sketch_path is not None else None
            runs.append(fresh(requests, policy, workload))
            if yardstick is not None:
                ratios.append(runs[-1]["run_requests_per_cpu_s"] / yardstick)
        m = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        figures = (
            f"{requests:,}",
            f"{m['user_s']:.2f}",
            f"{m['requests_per_cpu_s']:,.0f}",
            f"{m['run_requests_per_cpu_s']:,.0f}",
            f"{statistics.median(ratios):.2f}" if ratios else "no sketch",
            f"{m['output_tokens_per_cpu_s'] / 1e6:.2f}",
            f"{m['peak_rss_mib']:.0f}",
        )
        print(f"| {workload} | {policy} | {' | '.join(figures)} |", flush=True)


def _compiled() -> bool:
    import pdlab.scheduler

    return not str(pdlab.scheduler.__file__).endswith(".py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--policy", choices=POLICIES, default="round_robin")
    parser.add_argument("--workload", choices=WORKLOADS, default="constant")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sketch", type=Path, help="the sketch to take as yardstick, run beside every row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="with --table: a row of a million requests")
    asked = parser.parse_args()
    if asked.table:
        table(asked.sketch, asked.repeats, asked.million)
        return
    found = one(asked.requests, asked.policy, asked.workload)
    if asked.json:
        print(json.dumps(found))
        return
    kind = "compiled" if _compiled() else "pure Python"
    print(f"{asked.requests:,} requests, {asked.workload}, {asked.policy}, {kind}")
    print(f"user {found['user_s']:.2f} s, of it the run {found['run_s']:.2f} s")
    print(" ".join(f"{key}={found[key]:.0f}" for key in ("requests_per_cpu_s", "output_tokens_per_cpu_s", "peak_rss_mib")))


if __name__ == "__main__":
    main()
