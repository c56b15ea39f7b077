"""The Triton kernels, in Triton's interpreter where there is no CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")


@needs_triton
def test_the_triton_kernels_agree_with_the_references() -> None:
    said = run("triton_cases.py", {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    assert said.strip() == "well"


@needs_triton
@pytest.mark.slow  # a minute of compiling
def test_the_triton_kernels_compile_for_hopper_without_spilled_registers() -> None:
    said = run("triton_compiled.py", {"TRITON_DEFAULT_FP_FUSION": "1"}).splitlines()
    assert said[-1] == "well" and len(said) > 30
    assert not [line for line in said[:-1] if not line.endswith("STACK:0")]


def run(script: str, environment: dict[str, str]) -> str:
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
