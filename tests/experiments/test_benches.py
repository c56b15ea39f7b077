"""The benchmarks run: on small worlds, for their form and not for their figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def said(script: str, *words: str) -> str:
    ended = subprocess.run([sys.executable, str(EXPERIMENTS / script), *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_gpu_script_is_rehearsed_on_a_cpu() -> None:
    small = ("--models", str(EXPERIMENTS / "tiny"), "--batches", "1", "3", "--contexts", "32", "--prompt", "64", "--steps", "1")
    found = said("bench_gpu.py", "--device", "cpu", "--only", "experts", "engine", *small)
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|$", found, re.MULTILINE)
    assert [name for name, *_ in rows] == ["decode of 1 at 32", "decode of 3 at 32", "prompt of 64"]
    assert len(re.findall(r"^tiny (?:bfloat16|int8|int4), [13] tokens .* GB/s", found, re.MULTILINE)) == 6
    assert all(float(bound) > 0 and 0 < int(share) <= 150 for _, _, bound, share in rows)


@pytest.mark.slow  # a minute of decoding
def test_the_engine_benchmark_gives_a_row() -> None:
    found = said("bench_engine.py", "--quick", "--threads", "1", "--dtypes", "float32", "--engines", "pdlab")
    assert re.search(r"^\| pdlab \| float32 \| 1 \| [\d.]+ / [\d.]+ \| \d+% \| \d+ / \d+ \|", found, re.MULTILINE), found
