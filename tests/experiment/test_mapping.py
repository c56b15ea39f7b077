"""docs/reference/mapping.md and docs/reference/metrics.md name flags, keys and metrics of pdlab that exist."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from pdlab.cli.main import command
from pdlab.experiment.aliases import ALIASES
from pdlab.experiment.schema import schema
from pdlab.experiment.spellings import FLAGS
from tests.real.router.test_cluster_engine import LiveWorld, served
from tests.support import echo_engine
from tests.support.local_instances import instance

ROOT = Path(__file__).resolve().parents[2]
MAPPING, METRICS = ((ROOT / "docs" / "reference" / name).read_text() for name in ("mapping.md", "metrics.md"))


def column(section: str, *places: int) -> str:
    part = MAPPING.split(f"## {section}")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return "\n".join(row[place] for row in rows[2:] for place in places)


def flags(name: str) -> set[str]:
    return {flag for one in command(name).params for flag in (*one.opts, *one.secondary_opts)}


@pytest.mark.parametrize(("section", "command"), [("Serving", "serve"), ("Benchmarks", "bench")])
def test_flags_are_those_of_the_command_and_others_are_taken_or_hinted_at(section: str, command: str) -> None:
    ours = set(re.findall(r"`(--[\w-]+)`", column(section, 0)))
    assert ours and ours <= flags(command)
    if command == "serve":
        theirs = set(re.findall(r"`(--[\w-]+)`", column(section, 2, 3)))
        unknown = theirs - flags(command) - FLAGS[command].keys() - ALIASES.keys() - {"--max-queued-requests"}
        assert not unknown


@pytest.mark.parametrize(("section", "place"), [("Serving", 1), ("Benchmarks", 0)])
def test_keys_are_those_of_the_experiment_file(section: str, place: int) -> None:
    whole = schema()
    for key in re.findall(r"`((?:engine|cluster|workload|cost|transfer|slo|model)(?:\.\w+)*)`", column(section, place)):
        node = whole
        for part in key.split("."):
            node = node["properties"][part]
            node = whole["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def test_metrics_are_those_of_the_servers(tmp_path: Path) -> None:
    pages: list[str] = []

    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        pages.append((await http.get("/metrics")).text)

    async def play() -> None:
        async with instance(tmp_path, "p") as p:
            pages.append((await p.http.get("/metrics")).text)

    echo_engine.byte_tokenizer(tmp_path)
    served(tmp_path, test)
    asyncio.run(play())
    there = set(re.findall(r"^# TYPE (\S+) ", "\n".join(pages), re.MULTILINE))
    router = {name for name in there if name.startswith("pdlab:router_")}
    named = set(re.findall(r"`((?:vllm|pdlab):\w+)`", column("Metrics", 0) + METRICS)) - {"pdlab:router_"}
    missing = {name for name in named if name not in there}
    assert named and not missing
    untold = {name for name in router if name not in METRICS and name.replace("pdlab:router_", "vllm:") not in MAPPING}
    assert all(re.search("time|latency|tokens|request_params", name) for name in untold), untold
