"""A cluster of `pdlab serve` processes around one tiny model, to be killed, paused and cut apart under load; and what must hold then.

Every process leads a group of its own, so that a signal reaches its engine, too: that is how a machine dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support import served
from tests.support.ports import free_port

START_S = 150.0  # a machine may be busy
REST_S = 60.0
LOCAL = "127.0.0.1"
AFAR = "127.0.0.2"  # where a Link stands for an instance
# 16 KiB of KV a token: a prompt is some megabytes, so that a transfer can be slow
MODEL = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 2048}
NAME = "tiny"


def make_model(folder: Path) -> Path:
    return served.make(folder, **MODEL)


def prompts(count: int, tokens: int, seed: int = 1) -> list[list[int]]:
    """All different, from their first token on."""
    rng = random.Random(seed)
    return [[i % 256, *(rng.randrange(256) for _ in range(tokens - 1))] for i in range(count)]


def until(condition: Callable[[], Any], within_s: float, what: Callable[[], str]) -> None:
    """Raises AssertionError, with `what` was due, where it does not come to pass."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {within_s:g} s: {what()}"
        time.sleep(0.02)


class Process:
    """One `pdlab serve`; `log` is what it says."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.paused = False
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)

    def said(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    @property
    def url(self) -> str:
        """Empty while it starts."""
        found = re.search(r"ready after .*: (http://\S+)/v1", self.said())
        return found[1] if found else ""

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def ready(self) -> str:
        """Wait for its URL."""
        until(lambda: self.url or not self.alive, START_S, lambda: f"{self.log.name} is ready: {self.said()}")
        assert self.url, f"ended with {self.popen.wait()}: {self.said()}"
        return self.url

    def kill(self) -> None:
        """-9, its engine with it."""
        self._signal(signal.SIGKILL)
        self.popen.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self.paused = False

    def engine(self) -> int:
        """Its engine's process id."""
        (child,) = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        return int(child)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


class ServedCluster:
    """`processes` by name. `roles` are what the instances among them were started as. `token` is the internal one."""

    def __init__(self, folder: Path, model: Path, registry: str, token: str, experiment: Mapping[str, Any]) -> None:
        self.folder, self.model, self.registry, self.token = folder, model, registry, token
        self.headers = {"x-pdlab-token": token} if token else {}
        self.processes: dict[str, Process] = {}
        self.roles: dict[str, str] = {}
        self._commands: dict[str, list[str]] = {}
        self._experiment = folder / "experiment.json"
        self._experiment.write_text(json.dumps({**experiment, "model": str(model)}))

    def start(self, name: str, role: str, *options: str, inside: Sequence[str] = ()) -> Process:
        """Without waiting for it. `inside` is put before the command."""
        common = ["--registry", self.registry, "--instance-name", name, "--role", role, "--served-model-name", NAME]
        if role != "router":
            self.roles[name] = role
            common += ["--threads", "1", "--kv-transport", "tcp"]
        if self.token:
            common += ["--internal-token", self.token]
        if "--port" not in options:
            common += ["--port", "0"]
        command = [*inside, sys.executable, "-m", "pdlab", "serve", str(self._experiment), "--model", str(self.model), *common, *options]
        self._commands[name] = command
        return self.again(name)

    def again(self, name: str) -> Process:
        """Start one that was killed as it was started before."""
        self.processes[name] = Process(self._commands[name], self.folder / f"{name}.log")
        return self.processes[name]

    def url(self, name: str) -> str:
        return self.processes[name].ready()

    def present(self, router: str = "router") -> dict[str, str]:
        """Who takes part, as a router has it: states by name."""
        return {row["spec"]["name"]: row["state"] for row in self._view(router).get("rows", [])}

    def ready_roles(self, router: str = "router") -> dict[str, str]:
        """Of those that are ready, as a router has them."""
        rows = self._view(router).get("rows", [])
        return {row["spec"]["name"]: row["spec"]["role"] for row in rows if row["state"] == "ready"}

    def incarnation(self, name: str, router: str = "router") -> int:
        """0: it does not take part."""
        rows = self._view(router).get("rows", [])
        return next((int(row["spec"].get("incarnation", 0)) for row in rows if row["spec"]["name"] == name), 0)

    def leader(self, router: str = "router") -> str:
        return str(self._view(router).get("leader", ""))

    def joined(self, *names: str, router: str = "router") -> None:
        """Wait until exactly these take part."""
        for name in (router, *names):
            self.url(name)
        wanted = dict.fromkeys(names, "ready")
        until(lambda: self.present(router) == wanted, START_S, lambda: f"{names} are ready, not {self.present(router)}")

    def figures(self, name: str) -> dict[str, float]:
        """An instance's metrics, labels left out."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url(name)}/metrics", timeout=30).text.splitlines():
            if not line.startswith("#") and "_bucket" not in line:
                key, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
                found[key] = found.get(key, 0.0) + value
        return found

    def residue(self, name: str) -> dict[str, float]:
        """What an instance still holds; empty: nothing."""
        about = httpx.get(f"{self.url(name)}/pdlab/v1/instance", timeout=30, headers=self.headers).json()
        now = self.figures(name)
        held = {key: now[key] for key in ("vllm:num_requests_running", "vllm:num_requests_waiting", "pdlab:leases", "pdlab:leaked_blocks")}
        held |= {"usage": now["vllm:kv_cache_usage_perc"], "in_flight": about.get("in_flight", 0), "leaked": about.get("leaked_blocks", 0)}
        return {key: value for key, value in held.items() if value}

    def at_rest(self, within_s: float = REST_S) -> None:
        """No instance that lives holds anything."""
        living = [name for name in self.roles if self.processes[name].alive and not self.processes[name].paused]
        for name in living:
            self._rests(name, within_s)

    def _rests(self, name: str, within_s: float) -> None:
        until(lambda: not self.residue(name), within_s, lambda: f"{name} holds nothing, not {self.residue(name)}")

    def close(self) -> None:
        for process in self.processes.values():
            process.resume()
            process.kill()

    def _view(self, router: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url(router)}/pdlab/v1/cluster", timeout=30, headers=self.headers)
        return dict(answer.json())


def experiment(**changes: Any) -> dict[str, Any]:
    """No prefix cache: nothing stays in an instance's memory once it is at rest."""
    found: dict[str, Any] = {
        "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
        "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}], "reports": {"period_s": 0.3}},
        "engine": {"block_tokens": 16, "kv_blocks": 1000, "max_seqs": 32, "max_batch_tokens": 512, "prefix_cache": False},
        "limits": {"request_timeout_s": 100, "max_attempts": 6},
        "transfer": {"timeout_s": 60},
    }
    for key, value in changes.items():
        found[key] = {**found[key], **value} if isinstance(found.get(key), dict) and isinstance(value, dict) else value
    return found


@contextlib.contextmanager
def cluster(folder: Path, model: Path, registry: str, *, token: str = "", **changes: Any) -> Iterator[ServedCluster]:
    """Nothing runs in it yet; in the end nothing does. `changes` are the experiment's."""
    made = ServedCluster(folder, model, registry, token, experiment(**changes))
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def alone(folder: Path, model: Path) -> Iterator[str]:
    """A server without a cluster: its URL."""
    options = ("--model", str(model), "--served-model-name", NAME, "--port", "0", "--threads", "1", "--max-seqs", "8")
    process = Process([sys.executable, "-m", "pdlab", "serve", *options], folder / "alone.log")
    try:
        yield process.ready()
    finally:
        process.kill()


def free_ports() -> tuple[str, str]:
    """For HTTP and KV."""
    return str(free_port()), str(free_port())
