"""A lab in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from tests.support.ports import free_port

SMALL: dict[str, Any] = {
    "name": "small",
    "model": "llama-3.1-8b",
    "workload": {"source": "synthetic", "requests": 60, "rate": 20.0, "prompt": 256, "output": 8},
    "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "hardware": "h100-sxm"}]},
}


def small(**changes: Any) -> dict[str, Any]:
    """An experiment that takes some milliseconds; `workload__rate` is within `workload`."""
    made: dict[str, Any] = {**SMALL, "workload": dict(SMALL["workload"])}
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            made[outer][inner] = value
        else:
            made[outer] = value
    return made


def long(**changes: Any) -> dict[str, Any]:
    """One that takes minutes."""
    return small(workload__requests=3_000_000, **changes)


@dataclass(slots=True)
class LabProcess:
    folder: Path
    options: tuple[str, ...] = ()
    token: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        headers = {b"authorization": f"Bearer {self.token}".encode()} if self.token else {}
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=60.0)

    def start(self) -> None:
        """Returns when it listens."""
        command = [sys.executable, "-m", "pdlab", "lab", "--port", str(self.port), "--out", str(self.folder), *self.options]
        environment = {**os.environ, **self.environment} | ({"PDLAB_LAB_TOKEN": self.token} if self.token else {})
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None, "it is a pipe"
        if not self.process.stdout.readline().startswith("lab: "):
            raise AssertionError(self.process.communicate()[1])

    def workers(self) -> list[int]:
        """The processes that simulate, which the lab's forkserver has forked."""
        assert self.process is not None, "it was started"
        return [pid for server in _children(self.process.pid) for pid in _children(server)]

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Its status; what it said on stderr is nothing, but of what was no HTTP."""
        assert self.process is not None, "it was started"
        said = [line for line in self._end(signal.SIGTERM).splitlines() if line != "WARNING:  Invalid HTTP request received."]
        assert not said, said
        return self.process.returncode

    def _end(self, how: signal.Signals) -> str:
        assert self.process is not None, "it was started"
        self.process.send_signal(how)
        return self.process.communicate(timeout=120)[1]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended meanwhile had none
                found += map(int, (task / "children").read_text().split())
    return found


@contextmanager
def lab(folder: Path, *options: str, token: str = "", environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[LabProcess]:
    world = LabProcess(folder, options, token, environment)
    world.start()
    try:
        yield world
    finally:
        if world.process is not None and world.process.poll() is None:
            world.stop()
