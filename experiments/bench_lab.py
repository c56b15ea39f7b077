"""A lab's pages with many runs, in a browser: `make bench-lab`. Each page is loaded once to warm up, then ten times.

| what | from |
|---|---|
| wall | the address to the last row in the table, ms |
| lab CPU | of the lab's process in that time, ms |
| browser | CPU of the page's main thread, of which scripts and layout; ms |
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page

from experiments.bench_cluster import cpu_s
from pdlab.lab.database import Database
from pdlab.lab.store import JobKind, JobOrder, JobState, LabStore
from tests.support.browser import chromium, tab
from tests.support.lab_world import lab, small

TIMES = 10
POLICIES = ("round_robin", "least_loaded", "prefix_aware", "p2p_prefix")


def fill(url: str, runs: int) -> None:
    """With runs that have ended, two tags each."""
    database = Database(url)
    store = LabStore(database)
    for i in range(runs):
        policy = POLICIES[i % len(POLICIES)]
        asked = {"experiment": small(seed=i), "seeds": 1, "options": {}}
        order = JobOrder(f"{i:016x}", JobKind.EXPERIMENT, f"run {i}", policy, "llama-3.1-8b", 1, asked)
        store.put(order, ("bench", f"group {i % 20}"), runs + 1)
        figures = {"requests": 60, "slo_attainment": 0.9, "goodput_rps": 18.5, "ttft_p99_s": 0.2 + i / runs, "tpot_p99_s": 0.01}
        store.ended(order.id, JobState.DONE, "", figures)
    database.close()


def loads(page: Page, path: str, rows: int, pid: int) -> dict[str, float]:
    """ms, of one load."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto("about:blank")

    def spent() -> dict[str, float]:
        return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}

    before_s, began_s = cpu_s(pid), time.perf_counter()
    page.goto(path, wait_until="commit")
    page.locator("tbody tr").nth(rows - 1).wait_for(state="attached")
    took_s, used_s, browser = time.perf_counter() - began_s, cpu_s(pid) - before_s, spent()
    session.detach()
    kinds = {"scripts": browser["ScriptDuration"], "layout": browser["LayoutDuration"] + browser["RecalcStyleDuration"]}
    found = {"wall": took_s, "lab CPU": used_s, "browser": browser["TaskDuration"], **kinds}
    return {name: 1e3 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--times", type=int, default=TIMES)
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print("| page | wall, median and worst, ms | lab CPU, ms | browser, ms | scripts | layout |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fill(f"sqlite:///{folder}/lab.db", given.runs)
        with lab(Path(folder)) as world, chromium() as browser, tab(browser, world.url) as page:
            assert world.process is not None, "it runs"
            for rows in dict.fromkeys((min(100, given.runs), given.runs)):
                path = f"{world.url}/?limit={rows}"
                found = [loads(page, path, rows, world.process.pid) for _ in range(given.times + 1)][1:]
                medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
                rest = " | ".join(f"{value:.0f}" for name, value in medians.items() if name != "wall")
                print(
                    f"| {rows:,} of {given.runs:,} runs | {medians['wall']:.0f}, {max(one['wall'] for one in found):.0f} | {rest} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
