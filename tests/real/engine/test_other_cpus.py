"""Paths that a CPU's flags decide, each tried on whatever machine this is: pytest once more, in a process that is told to do without."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdlab.real.engine import load as loading
from pdlab.real.engine.options import EngineOptions
from pdlab.real.models import linear

ROOT = Path(__file__).resolve().parents[3]
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PDLAB_KERNELS": "x86-64-v3"}
NEITHER = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "PDLAB_KERNELS": "x86-64-v2"}
KERNELS = [f"tests/kernels/test_{name}.py" for name in ("linear", "fused", "paged_attention", "kv_blocks")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 CPUs")
@pytest.mark.parametrize("cpu", [pytest.param(AVX2_ALONE, id="avx2 alone"), pytest.param(NEITHER, id="neither", marks=pytest.mark.slow)])
def test_the_kernels_and_bfloat16_are_right_on_a_lesser_cpu(cpu: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *KERNELS,
        "tests/real/engine/test_model_files.py",
    ]
    done = subprocess.run(
        [*command, "-k", "not test_model_files or bfloat16"],
        cwd=ROOT,
        env={**os.environ, **cpu},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_a_cpu_without_bfloat16_is_said_once_and_keeps_weights_as_they_are(
    tiny: Callable[[str], tuple[Path, PreTrainedModel]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (loading, linear):
        monkeypatch.setattr(module, "bfloat16_products", lambda: False)
    with caplog.at_level(logging.WARNING):
        loaded = loading.load(EngineOptions(model=str(tiny("llama")[0]), kv_blocks=50, dtype="bfloat16"))
    assert [record.message for record in caplog.records if "bfloat16" in record.message] == [
        "this CPU cannot multiply bfloat16 (it has no AVX-512): prompts are computed in float32, at about its speed"
    ]
    assert type(loaded.engine.runner.model.head) is linear.Dense
