"""The documents that pdlab was asked to implement: their commands are imported, and what comes of it is run, line by line, and asked.

One prefill and one decode instance a deployment. xLLM's run with the embedded model; the others, whose form is the same whatever the
weights, with a tiny one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from pdlab.cli.main import app
from pdlab.experiment.deployment import Deployment
from tests.support import served
from tests.support.ports import free_port
from tests.support.served_cluster import until

SEEDS = Path(__file__).resolve().parents[2].parent / "shared" / "seeds"
pytestmark = pytest.mark.skipif(not SEEDS.is_dir(), reason=f"{SEEDS} is not here")
XLLM = ("xllm-disagg-pd-v1.md", "xllm-disagg-pd-v2.md", "xllm-pd-deployment.zh.md")
FASTDEPLOY, LLUMNIX = "fastdeploy-disaggregated.md", "llumnix-pdd.md"
PORT = re.compile(r"(?<![\d.])(?:[2-9]\d{3}|[1-3]\d{4})(?![\d.])")  # in what is started
START_S = 150.0


def imported(text: str, folder: Path, name: str, *options: str) -> list[str]:
    """What `pdlab import` says of a document."""
    (folder / name).write_text(text)
    (folder / "exp.yaml").unlink(missing_ok=True)
    words = ["--from-file", str(folder / name), "--to", str(folder / "exp.yaml"), "--device", "cpu", *options]
    said = CliRunner().invoke(app, ["import", *words])
    assert said.exit_code == 0, said.output
    return said.output.splitlines()


def started_by(lines: list[str]) -> list[str]:
    begin = lines.index("# Start it:") + 1
    return lines[begin : lines.index("", begin)]


def on_free_ports(text: str, folder: Path, name: str) -> str:
    """The document with other ports in the place of its own: tests share this machine."""
    ports = sorted({port for line in started_by(imported(text, folder, name)) for port in PORT.findall(line)})
    fresh: dict[str, str] = {}
    while len(fresh) < len(ports):
        if (free := str(free_port())) not in fresh.values():
            fresh[ports[len(fresh)]] = free
    return PORT.sub(lambda found: fresh.get(found[0], found[0]), text)


@contextlib.contextmanager
def running(lines: list[str], folder: Path) -> Iterator[list[Path]]:
    """Each as a shell's command, all at once: `pdlab` is this one. Their logs."""
    (folder / "bin").mkdir()
    shim = folder / "bin" / "pdlab"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m pdlab "$@"\n')
    shim.chmod(0o755)
    peers = f"http://127.0.0.1:{free_port()}"  # of etcd, where no command says them
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "ETCD_LISTEN_PEER_URLS": peers,
        "ETCD_INITIAL_ADVERTISE_PEER_URLS": peers,
        "ETCD_INITIAL_CLUSTER": f"default={peers}",
    }
    processes, logs = [], []
    try:
        for at, line in enumerate(lines):
            log = folder / f"{at}.log"
            with log.open("wb") as out:
                words = ["bash", "-c", f"exec {line}"]
                processes.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True))
            logs.append(log)
        yield logs
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def asked(url: str, logs: list[Path], **fields: Any) -> Any:
    """An answer, once all are ready."""

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready").status_code == 200 and len(httpx.get(f"{url}/pdlab/v1/cluster").json()["rows"]) >= 2
        return False

    until(ready, START_S, lambda: "all are ready: " + "\n".join(log.read_text(errors="replace")[-1500:] for log in logs))
    answer = httpx.post(f"{url}/v1/completions", json=fields, headers={"X-PDLab-Timeline": "1"}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def router_of(lines: list[str]) -> str:
    line = next(line for line in lines if "--role router" in line or "--role all" in line)
    return f"http://127.0.0.1:{line.split('--port ')[1].split()[0]}"


def handed_over(answer: Any) -> None:
    line = answer["pdlab"]["timeline"]
    assert (line["prefill_instance"], line["decode_instance"], line["status"]) == ("prefill-0", "decode-0", "done")
    assert line["transfer_bytes"] > 0 and line["attempts"] == 1


def needs(binary: str) -> None:
    if shutil.which(binary) is None:
        pytest.skip(f"no {binary} on the PATH: apt-get install {binary.removesuffix('-server')}-server")


def test_the_guide_has_a_row_for_each_flag_and_variable() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "import.md").read_text()
    text = "\n".join(path.read_text() for path in SEEDS.glob("*.md"))
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][A-Za-z_-]+", text)) | set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text))
    assert len(named) > 40
    assert not {name for name in named if name not in guide}


def test_xllms_documents_start_one_and_the_same_cluster(tmp_path: Path) -> None:
    """But for how they start etcd, and for the address of an NPU."""
    found = {}
    for name in XLLM:
        text = (SEEDS / name).read_text().replace("path/to/Qwen2", "Qwen2")
        lines = imported(text, tmp_path, name, "--model", "smollm2-135m")
        found[name] = [Deployment.load(tmp_path / "exp.yaml").resolved(), *(line for line in started_by(lines) if line.startswith("pdlab"))]
        assert any("listens at" in line for line in lines), "etcd is asked at a port where it is not"
    assert found[XLLM[0]] == found[XLLM[1]] == found[XLLM[2]]


@pytest.mark.parametrize("name", XLLM[:1])
def test_xllms_commands_serve(name: str, tmp_path: Path) -> None:
    needs("etcd")
    text = on_free_ports((SEEDS / name).read_text(), tmp_path, name)
    lines = started_by(imported(text, tmp_path, name, "--model", "smollm2-135m"))
    assert [line.split()[0] for line in lines] == ["etcd", "pdlab", "pdlab", "pdlab"]
    with running(lines, tmp_path) as logs:
        answer = asked(router_of(lines), logs, prompt="The capital of France is", max_tokens=6, temperature=0, model="Qwen2-7B-Instruct")
    handed_over(answer)
    assert "Paris" in answer["choices"][0]["text"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


def test_fastdeploys_commands_serve(tiny: Path, tmp_path: Path) -> None:
    needs("redis-server")
    text = on_free_ports((SEEDS / FASTDEPLOY).read_text(), tmp_path, FASTDEPLOY)
    lines = started_by(imported(text, tmp_path, FASTDEPLOY, "--model", str(tiny)))
    written = (tmp_path / "exp.yaml").read_text()  # with the way of answers that is the default nowhere
    (tmp_path / "exp.yaml").write_text(written.replace("transfer:\n", "transfer:\n  response_path: via_prefill\n"))
    assert Deployment.load(tmp_path / "exp.yaml").transfer.response_path == "via_prefill"
    assert [line.split()[0] for line in lines] == ["redis-server", "env", "env", "pdlab"]
    with running(lines, tmp_path) as logs:
        url = router_of(lines)
        answer = asked(url, logs, prompt="x" * 40, max_tokens=6, ignore_eos=True, model="ERNIE-4.5-300B-A47B-BF16")
        metrics = [line.split("--metrics-port ")[1].split()[0] for line in lines if "--metrics-port" in line]
        assert len(metrics) == 2
        for port in metrics:
            assert "vllm:prompt_tokens_total" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    handed_over(answer)


@pytest.mark.slow  # twelve CPU seconds for what tests/real/launch/test_all.py does with other flags
def test_llumnix_flags_serve(tiny: Path, tmp_path: Path) -> None:
    """The document has two flags and no command: they stand in the one that its project starts a server with."""
    flags = sorted(set(re.findall(r"--enable-pd-disagg True|--num-available-dispatch-instances", (SEEDS / LLUMNIX).read_text())))
    assert len(flags) == 2
    script = f"python -m llumnix.entrypoints.vllm.api_server --model m --initial-instances 2 --port {free_port()} {' '.join(flags)} 1\n"
    lines = started_by(imported(script, tmp_path, "run.sh", "--model", str(tiny)))
    assert len(lines) == 1
    with running(lines, tmp_path) as logs:
        answer = asked(router_of(lines), logs, prompt="x" * 40, max_tokens=6, ignore_eos=True)
    handed_over(answer)
