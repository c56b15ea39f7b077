"""The Triton kernels, in Triton's interpreter where there is no CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
def test_the_triton_kernels_agree_with_the_references() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_cases.py"))],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "well"
