"""A real Prometheus: Debian's, on a free port, that scrapes a cluster."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.ports import free_port
from tests.support.waiting import until

SCRAPE_S = 0.4
WINDOW = "8s"  # for $__rate_interval


def need(*programs: str) -> None:
    """Skips where one is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian's prometheus has it)")


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series that an instant query finds, each its `metric` and `value`. Raises AssertionError with what Prometheus says."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", f"{expr}: {answer}"
        return list(answer["data"]["result"])

    def numbers(self, expr: str) -> list[float]:
        """Of those series, what is a number."""
        values = [float(series["value"][1]) for series in self.query(expr)]
        return [value for value in values if value == value]

    def rules(self) -> dict[str, str]:
        """The health of each alert: `ok`, or what is wrong."""
        groups = httpx.get(f"{self.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
        return {rule["name"]: rule.get("lastError") or rule["health"] for group in groups for rule in group["rules"]}


@contextlib.contextmanager
def scraping(folder: Path, router: str, rules: Path) -> Iterator[Prometheus]:
    """It watches the router at that URL and, from its list, the instances. In the end it is gone."""
    port = free_port()
    config = {
        "global": {"scrape_interval": f"{int(1000 * SCRAPE_S)}ms", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": "router", "honor_labels": True, "static_configs": [{"targets": [router.removeprefix("http://")]}]},
            {
                "job_name": "instances",
                "honor_labels": True,
                "http_sd_configs": [{"url": f"{router}/metrics/targets", "refresh_interval": "1s"}],
            },
        ],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={folder / 'prometheus.json'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
        time.sleep(0.1)
        return False

    try:
        until(ready, 60)
        yield Prometheus(url)
    finally:
        process.kill()
        process.wait()
