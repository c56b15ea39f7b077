"""An instance of two ranks on two nodes, which are network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support import served
from tests.support.namespaces import inside, spaces

PORT = 29511
TOKEN = "a-token-of-the-tests"


def tokens(url: str) -> list[int]:
    """What it makes of a prompt, greedily."""
    asked = {"prompt": list(range(40)), "max_tokens": 12, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=asked, headers={"x-pdlab-token": TOKEN}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@pytest.mark.slow
def test_two_nodes_answer_as_one_and_ready_names_the_rank_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDLAB_INTERNAL_TOKEN", TOKEN)
    model = served.make(tmp_path, "qwen3")
    with served.server(model) as (url, _):
        expected = tokens(url)
    with spaces(("n0", "n1")) as addresses:
        spread = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master", f"{addresses['n0']}:{PORT}")
        other = [
            *inside("n1"),
            sys.executable,
            "-m",
            "pdlab",
            "serve",
            "--model",
            str(model),
            "--threads",
            "1",
            *spread,
            "--node-rank",
            "1",
        ]
        with subprocess.Popen(other, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as node:
            try:
                with served.server(model, *spread, "--node-rank", "0", "--host", addresses["n0"], inside=inside("n0")) as (url, _):
                    assert tokens(url) == expected
                    (rank,) = psutil.Process(node.pid).children()
                    os.kill(rank.pid, signal.SIGKILL)
                    until_s = time.monotonic() + 60
                    while (ready := httpx.get(f"{url}/ready")).status_code == 200:
                        assert time.monotonic() < until_s
                        time.sleep(0.02)
                    assert any("rank 1" in reason for reason in ready.json()["reasons"]), ready.text
                    said, _ = node.communicate(timeout=120)
                    assert node.returncode == 2 and "so does this node" in said
            finally:
                node.kill()
