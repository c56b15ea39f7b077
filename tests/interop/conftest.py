"""`make interop`: PDLAB_INTEROP names the python of vLLM's environment, beside whose folder the model's lies (experiments/interop_env.sh
makes both)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vllm_servers import VllmServer


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    given = os.environ.get("PDLAB_INTEROP", "")
    if not given:
        pytest.skip("PDLAB_INTEROP does not name the python of a vLLM environment: make interop")
    python = Path(given).absolute()
    assert (python.parent / "vllm").is_file(), f"PDLAB_INTEROP={given}: no vllm there; experiments/interop_env.sh makes that environment"
    return python


@pytest.fixture(scope="session")
def model(vllm_python: Path) -> Path:
    folder = vllm_python.parents[2] / "model"
    assert (folder / "config.json").is_file(), f"no model in {folder}: experiments/interop_env.sh makes it"
    return folder


@pytest.fixture(scope="session")
def pair(vllm_python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, VllmServer]]:
    """(prefill, decode): two servers for all tests, whoever kills one starts it again."""
    logs = tmp_path_factory.mktemp("vllm")
    cores = sorted(os.sched_getaffinity(0))
    prefill, decode = (
        VllmServer(vllm_python, model, logs / f"{role}.log", {core}) for role, core in (("prefill", cores[0]), ("decode", cores[-1]))
    )
    servers = prefill, decode
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()
