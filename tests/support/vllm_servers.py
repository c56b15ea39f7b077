"""Real vLLM servers, each a process of its own, as ../../docs/lab-notes/interop.md has them: CPU, one thread, float32, NIXL over UCX.

Each has a core, and its progress thread waits: else both compute on the last core, beside threads that never sleep, and a hand-off may last
half a minute.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pdlab.real.host import processes
from tests.support.ports import free_port

NAME = "smol"
READY_S = 360.0
SERVE = Path(__file__).parents[2] / "pdlab" / "proof" / "vllm_serve.py"
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


class VllmServer:
    """Keeps its ports when it is started again. `python` is that of vLLM's environment, `cores` are where all its threads run once it
    serves: its connector puts those that compute on the machine's last one. `tp`: ranks that share each layer."""

    def __init__(self, python: Path, model: Path, log: Path, cores: set[int], tp: int = 1) -> None:
        self.python, self.model, self.log, self.cores, self.tp = python, model, log, cores, tp
        self.port, self.side_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        told = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_port),
            "UCX_TLS": "tcp,sm,self",
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
        }
        command = ["nice", "-n", "10", str(self.python), str(SERVE), "serve", str(self.model), "--served-model-name", NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "4096", "--dtype", "float32", "--enforce-eager"]
        command += ["--kv-transfer-config", json.dumps(NIXL), "--tensor-parallel-size", str(self.tp)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | told, start_new_session=True)

    def wait(self) -> None:
        until_s = time.monotonic() + READY_S
        while not self.healthy():
            assert self.process is not None and self.process.poll() is None, f"vLLM has ended: see {self.log}"
            assert time.monotonic() < until_s, f"vLLM is not ready after {READY_S:g} s: see {self.log}"
            time.sleep(0.5)
        for pid in [self.process.pid, *processes.descendants(self.process.pid)] if self.process is not None else ():
            processes.run_on(pid, self.cores)

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """The front, its engine and its worker, at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples, of those with these labels where some are given."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples if one.name == name]
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy, by this server alone."""
        asked = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=300).raise_for_status().json()
        return list(answer["choices"][0]["token_ids"])
