"""The compiled build (`make compile`) of the same source makes the same simulations, event for event."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "quickstart": ["workload.requests=300"],
    "llumnix_migration": ["workload.requests=200"],
    "xllm_role_flip": ["workload.requests=200"],
    "mooncake_dispatch": ["workload.requests=150", "policy.dispatch=prefix_aware"],
}
IN_ONE_PROCESS = """
import json, sys
import pdlab.core.scheduler
from pdlab.cli.main import main

print(pdlab.core.scheduler.__file__)
for command in json.load(sys.stdin):
    try:
        main(command)
    except SystemExit as ended:
        if ended.code:
            raise
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package whose hot modules are compiled."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: the compiled build cannot be made here")
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(ROOT / "pdlab", folder / "pdlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(
        command, cwd=folder, env={**os.environ, "PDLAB_COMPILE": "1", "MYPYC_OPT_LEVEL": "0"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


def simulated(out: Path, path: str) -> tuple[dict[str, bytes], str]:
    """(event log of each run, where the scheduler was imported from). All in one process."""
    commands = []
    for name, values in RUNS.items():
        sets = [part for value in values for part in ("--set", value)]
        (out / name).mkdir(parents=True)
        commands.append(["sim", str(ROOT / "experiments" / f"{name}.yaml"), *sets, "--out", str(out / name), "--trace-events", "--quiet"])
    ended = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input=json.dumps(commands),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert ended.returncode == 0, ended.stderr
    logs = {}
    for name in RUNS:
        (log,) = (out / name).rglob("events*")
        logs[name] = log.read_bytes()
    return logs, ended.stdout.splitlines()[0]


def test_compiled_and_pure_python_write_the_same_log(compiled: Path, tmp_path: Path) -> None:
    pure, source = simulated(tmp_path / "pure", str(ROOT))
    fast, binary = simulated(tmp_path / "fast", str(compiled))
    assert source.endswith(".py")
    assert binary.endswith(".so")
    for name in RUNS:
        assert fast[name] == pure[name], name
        assert len(pure[name].splitlines()) > 500
