"""Compiling at first use: one OpenMP runtime, a cache that knows its machine, and references where nothing can be compiled."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdlab.kernels import cpu_build
from pdlab.kernels.paged_attention import cpu

SOURCES = sorted(Path(cpu_build.__file__).parent.glob("*/cpu.cpp"))
COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
compiled = pytest.mark.skipif(COMPILER is None or os.environ.get("PDLAB_KERNELS") == "reference", reason="nothing is to be compiled")

# In processes that are forked once torch is there, each with what is set for it.
REFERENCE = """
import json, logging, os, sys, torch
from pdlab.kernels.fused import rms_norm, silu_and_mul
from pdlab.kernels.kv_blocks import gather_blocks
from pdlab.kernels.linear import matvec
for each in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        os.environ |= each
        break
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
else:
    sys.exit()
logging.basicConfig(level=logging.WARNING, format="%(message)s")
x = torch.ones(2, 64)
rms_norm(x, x[0], 1e-5); silu_and_mul(x); silu_and_mul(x)
matvec(x, torch.ones(3, 64))
assert torch.equal(gather_blocks(torch.ones(1, 2, 3, 1, 4, 8), torch.tensor([1])), torch.ones(1, 1, 2, 1, 4, 8))
"""


@compiled
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_every_kernel_compiles(source: Path) -> None:
    assert cpu_build.library(source.parent.name, source) is not None


@compiled
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_every_kernel_is_valid_for_lesser_cpus(source: Path, march: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("names x86 CPUs")
    flags = [flag for flag in cpu_build.FLAGS if not flag.startswith(("-march", "-O"))]
    subprocess.run(
        [str(COMPILER), *flags, f"-march={march}", "-fsyntax-only", f"-I{source.parents[1]}", str(source)], check=True, timeout=300
    )


def test_the_reference_serves_where_nothing_can_be_compiled_and_says_so_once() -> None:
    settings = json.dumps([{"CXX": "/nowhere/c++"}, {"PDLAB_KERNELS": "reference"}])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REFERENCE, settings], capture_output=True, text=True, timeout=300, check=True
    )
    without, asked, nothing = done.stderr.split("ended with 0\n")
    assert without.count("fused runs in plain PyTorch") == without.count("kv_blocks runs in plain PyTorch") == 1
    assert asked.count("PDLAB_KERNELS=reference: fused runs in plain PyTorch") == 1
    assert not nothing


@compiled
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    assert cpu.available(torch.empty(0))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    loaded = {line.split()[-1] for line in maps.read_text(encoding="utf-8").splitlines() if "gomp" in line or "libomp" in line}
    ours = {path for path in loaded if "/torch" in path}
    if not ours:
        pytest.skip(f"this torch brings no OpenMP runtime of its own: {loaded}")
    assert loaded == ours and len(ours) == 1


@compiled
def test_a_source_is_compiled_once_and_again_when_cpu_or_source_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }', encoding="utf-8")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    built = cpu_build.library.__wrapped__
    for _ in range(2):
        lib = built("one", source)
        assert lib is not None and lib.one() == 1
    assert len(list(tmp_path.glob("cache/pdlab/*.so"))) == 1
    monkeypatch.setattr(cpu_build, "_cpu", lambda: "another machine")
    built("one", source)
    source.write_text(source.read_text(encoding="utf-8").replace("1;", "2;"), encoding="utf-8")
    lib = built("one", source)
    assert lib is not None and lib.one() == 2
    assert sorted(path.suffix for path in tmp_path.glob("cache/pdlab/*")) == [".lock", ".so", ".so", ".so"]
    source.write_text("this is no C++", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert built("one", source) is None
    assert "one did not compile" in caplog.text
