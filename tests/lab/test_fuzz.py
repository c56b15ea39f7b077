"""Whatever the API is sent, it is answered, and never with a 500: schemathesis, which `make fuzz-lab` installs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.lab_world import lab

MINUTES = float(os.environ.get("PDLAB_FUZZ_MINUTES", "1"))


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed: make fuzz-lab")
    with lab(tmp_path, "--job-time-s", "5", "--max-queued", "50") as world:
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{world.url}/openapi.json", "--checks", "not_a_server_error"]
        more = ["--exclude-path-regex", "events", "--request-timeout", "30", "--max-examples", "50", "--no-color"]
        ends_s, seed = time.monotonic() + 60 * MINUTES, 0
        while not seed or time.monotonic() < ends_s:
            seed += 1
            done = subprocess.run([*command, *more, "--seed", str(seed)], capture_output=True, text=True, check=False, cwd=tmp_path)
            assert "Server error" not in done.stdout, done.stdout[-4000:]
            assert "Tested: " in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
        assert httpx.get(f"{world.url}/healthz").json()["status"] == "ok"
