"""`pdlab validate --vllm`, a few requests of it: calibrated, run and simulated, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pdlab.core.file_kinds import TWO_WORLDS
from pdlab.cost.profile import load_instance_profile
from pdlab.experiment.yaml import read_yaml
from pdlab.results.run_store import RunStore
from tests.interop.test_cluster import needs_redis

pytestmark = [pytest.mark.interop, needs_redis]
FILE = Path(__file__).parents[2] / "experiments" / "two_worlds_vllm.yaml"


def command(python: Path, folder: Path) -> list[str]:
    plan = read_yaml(FILE, TWO_WORLDS)
    plan["experiment"]["workload"]["requests"] = 6
    plan["experiment"]["engine"]["max_seqs"] = 2
    small = {"repeats": 1, "calibrate_s": 5, "policies": {"round_robin": "round_robin"}}
    (folder / "small.yaml").write_text(yaml.safe_dump({**plan, **small}))
    return [sys.executable, "-m", "pdlab", "validate", str(folder / "small.yaml"), "--vllm", str(python), "--out", str(folder / "out")]


def left(folder: Path) -> list[str]:
    """Processes whose output goes into `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found += [entry.name] if os.readlink(entry / "fd/1").startswith(f"{folder}/") else []
    return found


def test_a_few_requests_go_through_from_calibration_to_verdict(vllm_python: Path, tmp_path: Path) -> None:
    ended = subprocess.run(command(vllm_python, tmp_path), capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    assert "of 6 figures are within their bar" in ended.stdout
    profile = load_instance_profile(tmp_path / "out" / "profile.json")
    assert profile.engine.block_tokens == 32 and profile.engine.kv_blocks == 400
    assert profile.transfer is not None and profile.overheads.request_s > 0
    (measured,) = (run for run in RunStore.load(tmp_path / "out").runs.values() if run.world == "real")
    assert measured.result.summary["completed"] == 6
    assert not left(tmp_path)


def test_when_it_is_interrupted_its_servers_end_with_it(vllm_python: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(vllm_python, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        log = tmp_path / "out" / "vllm-decode.log"
        until_s = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    assert process.returncode, said
    assert not left(tmp_path)
