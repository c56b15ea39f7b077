"""`pdlab serve --role all`: the instances are children that come back when they die, and none outlives the cluster."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from pdlab.cli.main import app
from tests.support.served import still
from tests.support.waiting import until

GROWS = """\
from pdlab import Policy
from pdlab.core.types import Role, Scale


class Grows(Policy):
    tick_s = 0.1

    def dispatch(self, request, cluster):
        return cluster.prefill[0] if len(cluster.decode) > 1 else None

    def handoff(self, request, cluster):
        return cluster.decode[-1]

    def resize(self, cluster):
        return [Scale(1 if cluster.live else -1, Role.DECODE)]
"""


class Cluster:
    """The process, and what it has said."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        policy: object,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        **more: object,
    ) -> None:
        experiment = {
            "model": str(model),
            "workload": {"source": "azure-conv-2023", "requests": 10, "rate": 1.0},
            "cluster": {"instances": [{"role": "prefill", "hardware": "l4"}, {"role": "decode", "hardware": "l4"}], **more},
            "engine": {"block_tokens": 4, "kv_blocks": 300, "max_seqs": 8, "max_batch_tokens": 128},
            "transfer": {"mode": "push", "granularity": "layer"},
            "policy": policy,
        }
        (folder / "tiny.yaml").write_text(json.dumps(experiment))
        self.log = folder / "events.jsonl"
        self.said = ""
        command = [sys.executable, "-m", "pdlab", "serve", str(folder / "tiny.yaml"), "--role", "all", "--port", "0", "--threads", "2"]
        self.process = subprocess.Popen(
            [*command, "--trace-events", str(self.log), "--allowed-origins", "https://page.example", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        self.url = ""

    def hear(self, pattern: str, within_s: float = 180.0) -> str:
        """Wait until it says that."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + within_s
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < deadline_s, f"it did not say {pattern}: {self.said}"
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                part = os.read(self.process.stdout.fileno(), 4096).decode()
                assert part, f"ended with {self.process.wait()}: {self.said}"
                self.said += part
        return found[found.lastindex or 0]

    def rows(self, token: str = "") -> dict[str, dict[str, object]]:
        found = httpx.get(f"{self.url}/pdlab/v1/cluster", headers={"X-PDLab-Token": token}).json()
        return {row["spec"]["name"]: row["spec"] for row in found["rows"]}

    def descendants(self) -> list[int]:
        return [pid for child in children(self.process.pid) for pid in (child, *children(child))]

    def child(self, name: str) -> int:
        asked = f"--instance-name\0{name}\0".encode()
        return next(pid for pid in children(self.process.pid) if asked in Path(f"/proc/{pid}/cmdline").read_bytes())


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def cluster(tmp_path: Path, model: Path) -> Iterator[Cluster]:
    with running(Cluster(tmp_path, model, {"dispatch": "prefix_aware", "handoff": "least_kv"})) as made:
        yield made


@contextmanager
def running(made: Cluster) -> Iterator[Cluster]:
    """Until it is ready; killed in the end."""
    try:
        made.url = made.hear(r"ready after .*: (http://\S+)/v1")
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


def complete(cluster: Cluster, prompt: str) -> httpx.Response:
    asked = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    return httpx.post(f"{cluster.url}/v1/completions", json=asked, headers={"X-PDLab-Timeline": "1"}, timeout=300)


def replays(cluster: Cluster) -> None:
    replayed = CliRunner().invoke(app, ["replay", str(cluster.log)])
    assert replayed.exit_code == 0 and " 0 differ" in replayed.output, replayed.output


def test_a_cluster_serves_heals_and_ends_whole(cluster: Cluster) -> None:
    answer = complete(cluster, "x" * 40).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert complete(cluster, "x" * 40).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{cluster.url}/v1/chat/completions", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://page.example")
    scored = httpx.post(f"{cluster.url}/v1/completions", json={"prompt": "xyz", "max_tokens": 0, "echo": True, "logprobs": 0}).json()
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) == 3

    def status() -> str:
        return CliRunner().invoke(app, ["status", "--router", cluster.url]).output

    until(lambda: "no router leads" not in status())
    assert "prefill-0" in status() and "shm" in status()

    os.kill(cluster.child("decode-0"), signal.SIGKILL)
    cluster.hear("decode-0 was killed by SIGKILL: starting it again")
    assert complete(cluster, "y" * 40).status_code == 200  # the other role serves meanwhile
    until(lambda: cluster.rows().get("decode-0", {}).get("incarnation") == 2)

    everybody = cluster.descendants()
    assert len(everybody) == 4
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(120) == 0
    until(lambda: all(ended(pid) for pid in everybody))
    replays(cluster)


def test_no_secret_is_on_any_command_line_and_instances_ask_for_one_that_is_made_anew(tmp_path: Path, model: Path) -> None:
    keys = {"PDLAB_API_KEY": "key-of-clients", "PDLAB_UPSTREAM_API_KEY": "key-of-upstreams"}
    with running(Cluster(tmp_path, model, "round_robin", keys)) as cluster:
        everybody = [cluster.process.pid, *cluster.descendants()]
        environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in cluster.descendants()]
        tokens = {
            value for words in environments for key, _, value in (word.partition(b"=") for word in words) if key == b"PDLAB_INTERNAL_TOKEN"
        }
        (token,) = tokens - {b""}
        assert len(token) >= 32
        for pid in everybody:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert not any(secret in words for secret in (token, *(key.encode() for key in keys.values()))), words
        asked = {"prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{cluster.url}/v1/completions", json=asked).status_code == 401
        with_key = {"Authorization": "Bearer key-of-clients"}
        assert httpx.post(f"{cluster.url}/v1/completions", json=asked, headers=with_key, timeout=300).status_code == 200
        assert httpx.get(f"{cluster.url}/pdlab/v1/cluster").status_code == 401  # as there is a key
        for row in cluster.rows(token.decode()).values():
            for headers in ({}, with_key, {"X-PDLab-Token": "wrong"}):
                for path, body in (("/v1/completions", asked), ("/pdlab/v1/drain", {}), ("/tokenize", {"prompt": "x"})):
                    assert httpx.post(f"{row['url']}{path}", json=body, headers=headers).status_code == 401
        drained = CliRunner().invoke(app, ["switch", "decode-0", "mixed", "--router", cluster.url, "--force"])
        assert drained.exit_code == 0, drained.output  # the token lies where this user alone can read it


def test_children_end_with_a_parent_that_is_killed(cluster: Cluster) -> None:
    everybody = cluster.descendants()
    assert len(everybody) == 4
    cluster.process.kill()
    until(lambda: all(ended(pid) for pid in everybody))


@pytest.mark.slow  # three engines start, one after two
def test_an_instance_starts_when_the_policy_asks_serves_and_ends_when_it_is_to(tmp_path: Path, model: Path) -> None:
    (tmp_path / "grows.py").write_text(GROWS)
    scaled = {"enabled": True, "min": 2, "max": 3}
    with running(Cluster(tmp_path, model, "grows.py:Grows", autoscale=scaled)) as cluster, ThreadPoolExecutor() as pool:
        first = cluster.descendants()
        with still(children(cluster.child("prefill-0"))[0]):  # the request lives until then
            asked = pool.submit(complete, cluster, "x" * 40)
            cluster.hear("starting decode-1, which the policy asks for")
            cluster.hear("decode-1 is ready: decode")
            new = [pid for pid in cluster.descendants() if pid not in first]
            assert len(new) == 2
        answer = asked.result(120).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["pdlab"]["timeline"]["decode_instance"] == "decode-1"

        cluster.hear("decode-1 has drained and ended")
        until(lambda: all(ended(pid) for pid in new))
        assert cluster.rows().keys() == {"prefill-0", "decode-0"} and sorted(cluster.descendants()) == sorted(first)
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(120) == 0
        replays(cluster)
