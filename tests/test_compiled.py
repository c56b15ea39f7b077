"""The compiled build (`make compile`) of the same source makes the same simulations, event for event."""

from __future__ import annotations

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


def simulated(name: str, out: Path, path: str) -> tuple[bytes, str]:
    """(event log, where the scheduler was imported from)."""
    sets = [part for value in RUNS[name] for part in ("--set", value)]
    command = ["sim", str(ROOT / "experiments" / f"{name}.yaml"), *sets, "--out", str(out), "--trace-events", "--quiet"]
    code = "import sys, pdlab.core.scheduler as s; print(s.__file__); from pdlab.cli.main import main; main(sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=out
    )
    assert ended.returncode == 0, ended.stderr
    (log,) = out.rglob("events*")
    return log.read_bytes(), ended.stdout.splitlines()[0]


def test_compiled_and_pure_python_write_the_same_log(compiled: Path, tmp_path: Path) -> None:
    for name in RUNS:
        for kind in ("pure", "fast"):
            (tmp_path / name / kind).mkdir(parents=True)
        pure, source = simulated(name, tmp_path / name / "pure", str(ROOT))
        fast, binary = simulated(name, tmp_path / name / "fast", str(compiled))
        assert source.endswith(".py")
        assert binary.endswith(".so")
        assert fast == pure, name
        assert len(pure.splitlines()) > 500
