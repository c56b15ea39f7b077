"""How fast the simulator is: one row of docs/lab-notes/benchmarks.md, or the whole table.

    python experiments/bench_sim.py --requests 100000 --policy round_robin
    python experiments/bench_sim.py --table --sketch ../shared/reference/macro_step_sketch.py --dynamo /tmp/dynamo/bin/python

2P+2D of llama-3.1-8b on h100-sxm, Poisson arrivals: 30 requests/s of 1024 prompt and 128 output tokens (`constant`), azure-conv-2023
lengths at 8 requests/s (`azure`), or mooncake-conversation at 2 requests/s (`mooncake`). Prompts of the first two carry no prefix
hashes, so there `prefix_aware` matches nothing; in `mooncake` it does. KV is pulled after prefill over 25 GB/s. CPU seconds are the
whole process's user time, imports and results included; `run` is the simulation alone. A row is divided by the sketch run alone to run
alone, since that is how the sketch times itself, and by Dynamo process to process. With PYTHONPATH=build/compiled (see `make compile`)
the compiled modules are measured; the sketch is never compiled.
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
import tempfile
from pathlib import Path

WORKLOADS = {
    "constant": {"source": "synthetic", "rate": 30.0, "prompt": 1024, "output": 128},
    "azure": {"source": "azure-conv-2023", "rate": 8.0},
    "mooncake": {"source": "mooncake-conversation", "rate": 2.0},
}
POLICIES = {"round_robin": "round_robin", "prefix_aware": {"dispatch": "prefix_aware", "handoff": "least_kv"}}


def one(requests: int, policy: str, workload: str) -> dict[str, float]:
    """Simulate in this process. It imports pdlab here: a child starts with its parent's peak memory, so `--table` stays small."""
    from pdlab.experiment.experiment import Experiment
    from pdlab.sim import simulate

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
        "output_tokens_per_cpu_s": summary["output_tokens"] / usage.ru_utime,
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


def dynamo(python: Path, requests: int) -> float:
    """Requests per user CPU second of Dynamo's offline replay of `constant`, a whole process: round robin, a KV transfer of the same size
    and rate, no prefix cache since nothing is shared (which makes it quicker), its own blocks of 64 tokens and step times."""
    engine = {"enable_prefix_caching": False, "kv_bytes_per_token": 131_072, "kv_transfer_bandwidth": 25.0}
    roles = [f"--{role}-engine-args={json.dumps({**engine, 'worker_type': role})}" for role in ("prefill", "decode")]
    load = ["--input-tokens=1024", "--output-tokens=128", f"--request-count={requests}", "--request-rate=30"]
    size = ["--num-prefill-workers=2", "--num-decode-workers=2", "--router-mode=round_robin", "--replay-mode=offline"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(
            [str(python), "-m", "dynamo.replay", *load, *size, *roles, f"--report-json={report}"], check=True, capture_output=True
        )
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        assert json.loads(report.read_text())["completed_requests"] == requests
    return requests / seconds


def table(sketch_path: Path | None, dynamo_python: Path | None, repeats: int, million: bool) -> None:
    """Every row; the yardsticks run before each of its runs, and ratios are of neighbours."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {'compiled' if _compiled() else 'pure Python'}\n")
    columns = ("workload", "policy", "requests", "user s", "requests / CPU s, process", "run alone", "of the sketch", "of Dynamo")
    print(f"| {' | '.join(columns)} | M output tokens / CPU s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    sizes = [1_000, 10_000, 100_000]
    rows = [(w, p, n) for w in WORKLOADS for p in POLICIES for n in sizes] + ([("constant", "round_robin", 1_000_000)] if million else [])
    sketches: list[float] = []
    dynamos: list[float] = []
    for workload, policy, requests in rows:
        runs, ratios, to_dynamo = [], [], []
        beside = dynamo_python if (workload, policy, requests) == ("constant", "round_robin", 100_000) else None
        for _ in range(repeats if requests < 1_000_000 else 1):
            if sketch_path is not None:
                sketches.append(sketch(sketch_path, 100_000))
            if beside is not None:
                dynamos.append(dynamo(beside, requests))
            runs.append(fresh(requests, policy, workload))
            if sketch_path is not None:
                ratios.append(runs[-1]["run_requests_per_cpu_s"] / sketches[-1])
            if beside is not None:
                to_dynamo.append(runs[-1]["requests_per_cpu_s"] / dynamos[-1])
        m = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        figures = (
            f"{requests:,}",
            f"{m['user_s']:.2f}",
            f"{m['requests_per_cpu_s']:,.0f}",
            f"{m['run_requests_per_cpu_s']:,.0f}",
            f"{statistics.median(ratios):.2f}" if ratios else "no sketch",
            f"{statistics.median(to_dynamo):.2f}" if to_dynamo else "",
            f"{m['output_tokens_per_cpu_s'] / 1e6:.2f}",
            f"{m['peak_rss_mib']:.0f}",
        )
        print(f"| {workload} | {policy} | {' | '.join(figures)} |", flush=True)
    for name, seen in (("sketch, run alone", sketches), ("Dynamo, process", dynamos)):
        if seen:
            middle, least, most = (f"{figure:,.0f}" for figure in (statistics.median(seen), min(seen), max(seen)))
            print(f"\n{name}: {middle} requests per CPU second, {least} to {most} in {len(seen)} runs")


def _compiled() -> bool:
    import pdlab.core.scheduler

    return not str(pdlab.core.scheduler.__file__).endswith(".py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--policy", choices=POLICIES, default="round_robin")
    parser.add_argument("--workload", choices=WORKLOADS, default="constant")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sketch", type=Path, help="the sketch to take as yardstick, run beside every row")
    parser.add_argument("--dynamo", type=Path, help="the Python of an environment with ai-dynamo, run beside the row it compares with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="with --table: a row of a million requests")
    asked = parser.parse_args()
    if asked.table:
        table(asked.sketch, asked.dynamo, asked.repeats, asked.million)
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
