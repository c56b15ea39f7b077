"""The pictures of the lab in the docs, drawn anew: `make docs-pictures`. A lab of its own runs a few experiments; chromium looks at it."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pdlab.lab import Client
from tests.support.browser import chromium, tab
from tests.support.lab_world import lab
from tests.support.small_cluster import SmallCluster

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
WIDTH, MOST_HEIGHT = 1280, 1500
DRAWN = ".js-plotly-plot .main-svg"


def main() -> None:
    base = yaml.safe_load((ROOT / "experiments" / "quickstart.yaml").read_text(encoding="utf-8"))
    busy = {**base, "workload": {**base["workload"], "rate": 48.0}}
    with tempfile.TemporaryDirectory() as folder, lab(Path(folder)) as world, Client(world.url) as client, chromium() as browser:
        runs = [
            client.submit({**busy, "name": str(policy), "policy": policy}, tags=["48 req/s"]).wait().id
            for policy in ("round_robin", "least_loaded", "random")
        ]
        client.submit(base, tags=["first"]).wait()
        sweep = client.submit(
            {**base, "name": "rates"}, kind="sweeps", seeds=3, grid=["workload.rate=16,32,48", "policy=round_robin,least_loaded"]
        )
        plan = client.submit({**base, "name": "eight", "plan": {"tp": [1]}}, kind="plans", gpus="4", requests=600, seeds=3)
        shown = {
            "runs": ("/", "tbody tr"),
            "new": ("/new", "#mistakes > *"),
            "run": (f"/runs/{runs[0]}", DRAWN),
            "compare": (f"/compare?ids={','.join(runs)}", DRAWN),
            "sweep": (f"/sweeps/{sweep.wait().id}", DRAWN),
            "plan": (f"/plans/{plan.wait().id}", DRAWN),
        }
        for name, (path, sign) in shown.items():
            with tab(browser, world.url, width=WIDTH) as page:
                page.goto(path)
                page.locator(sign).first.wait_for()
                page.wait_for_timeout(2500)
                _write(page, PICTURES / f"lab-{name}.png")
                print(PICTURES / f"lab-{name}.png")


def cluster() -> None:
    """Of a real one, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # where it keeps its token
        served = SmallCluster(Path(folder), "--trace-events", str(Path(folder) / "events.jsonl"))
        try:
            options = ("--router", f"chats={served.url}")
            with lab(Path(folder) / "lab", *options) as world, chromium() as browser, tab(browser, world.url, width=WIDTH) as page:
                page.goto("/clusters/chats")
                page.get_by_label("policy", exact=True).fill("least_loaded")
                page.get_by_role("button", name="Ask it beside").click()
                for _ in range(30):
                    served.ask(60)
                page.wait_for_timeout(1500)
                _write(page, PICTURES / "lab-cluster.png")
                print(PICTURES / "lab-cluster.png")
        finally:
            served.stop()


def _write(page: Any, path: Path) -> None:
    """In 256 colours, as far down as a reader looks."""
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as drawn:
        cut = drawn.convert("RGB").crop((0, 0, drawn.width, min(drawn.height, MOST_HEIGHT)))
        cut.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


if __name__ == "__main__":
    main()
    cluster()
