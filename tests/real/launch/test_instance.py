"""`pdlab serve` under load and in trouble: overload, clients that hang up, drains, a dead engine, and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from pdlab.cli.main import app
from pdlab.core.types import UsageError
from pdlab.experiment.deployment import Deployment
from pdlab.real.engine.options import SpeculationOptions
from pdlab.real.launch.instance import engine_options
from tests.support import served, tiny_models
from tests.support.waiting import until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hundreds of tokens take longer than a test needs to break in on them."""
    return served.make(tmp_path_factory.mktemp("slow"), **tiny_models.SLOW)


def figures(url: str) -> dict[str, float]:
    """The server's metrics, labels left out."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#") and "_bucket" not in line:
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0.0) + value
    return found


def at_rest(url: str) -> bool:
    now = figures(url)
    return now["vllm:num_requests_running"] == now["vllm:num_requests_waiting"] == now["vllm:kv_cache_usage_perc"] == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x" * 20, "max_tokens": 30, "ignore_eos": True, **fields}


async def raw_request(url: str, fields: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + payload)
    return reader, writer


def test_five_hundred_clients_half_of_which_hang_up(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"

    async def client(url: str, i: int) -> str:
        stream = i % 4 < 2
        reader, writer = await raw_request(url, body(prompt=f"client {i} " * (1 + i % 9), stream=stream, n=1 + i % 2))
        try:
            if i % 2:
                return (await reader.read()).decode()
            if i % 3:
                await reader.readline()
            else:
                await asyncio.sleep(0.001 * i)
            return ""
        finally:
            writer.close()

    async def all_of_them(url: str) -> list[str]:
        return await asyncio.gather(*(client(url, i) for i in range(500)))

    with served.server(model, "--max-seqs", "32", "--kv-gib", "0.004", "--log", str(log)) as (url, process):
        answers = asyncio.run(all_of_them(url))
        for i, answer in enumerate(answers):
            if i % 2:
                assert answer.startswith("HTTP/1.1 200"), answer[:300]
                assert "[DONE]" in answer if i % 4 < 2 else '"usage"' in answer
        until(lambda: at_rest(url))
        now = figures(url)
        assert now["pdlab:leaked_blocks"] == 0
        assert now["vllm:request_success_total"] >= 250
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    replayed = CliRunner().invoke(app, ["replay", str(log)])
    assert replayed.exit_code == 0, replayed.output
    assert "batches decided alike" in replayed.output


def test_beyond_the_bound_come_again_later(model: Path) -> None:
    async def flood(url: str, engine: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            with served.still(engine):
                asking = asyncio.gather(*(client.post(f"{url}/v1/completions", json=body(max_tokens=450)) for _ in range(40)))
                await asyncio.to_thread(until, lambda: figures(url)["pdlab:http_requests_rejected_total"] == 36)
            return await asking

    with served.server(model, "--max-requests", "4", "--max-seqs", "4") as (url, process):
        answers = asyncio.run(flood(url, engine_of(process)))
        refused = [a for a in answers if a.status_code == 429]
        assert {a.status_code for a in answers} == {200, 429}
        assert len(refused) == 36
        assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
        error = refused[0].json()["error"]
        assert error["code"] == "overloaded"
        assert "at most 4 are allowed: try again in" in error["message"]
        assert figures(url)["pdlab:http_requests_rejected_total"] == len(refused)
        assert httpx.get(f"{url}/ready").status_code == 200


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones(slow: Path) -> None:
    with served.server(slow, "--drain-s", "300") as (url, process):
        with httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=450)) as answer:
            lines = answer.iter_lines()
            next(lines)
            with served.still(engine_of(process)):
                process.send_signal(signal.SIGTERM)
                until(lambda: httpx.get(f"{url}/ready").status_code == 503)
                assert httpx.get(f"{url}/ready").json()["reasons"] == ["draining"]
                late = httpx.post(f"{url}/v1/completions", json=body())
                assert late.status_code == 503
                assert late.json()["error"]["code"] == "draining"
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        assert sum('"text"' in line for line in rest) > 1
        assert process.wait(60) == 0


def test_a_second_signal_ends_it_at_once(slow: Path) -> None:
    with (
        served.server(slow, "--drain-s", "300") as (url, process),
        httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=480)) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        with served.still(engine_of(process)):
            process.send_signal(signal.SIGINT)
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(signal.SIGINT)
            process.wait(60)  # of the 300 that it would have waited


def engine_of(process: subprocess.Popen[bytes]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def test_a_dead_engine_is_told_to_everybody(slow: Path) -> None:
    with served.server(slow) as (url, process):
        with httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, max_tokens=480)) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(engine_of(process), signal.SIGKILL)
            rest = [line for line in lines if line]
        assert "the engine process has ended with status -9" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        for path in ("/health", "/ready"):
            assert httpx.get(url + path).status_code == 503
        late = httpx.post(f"{url}/v1/completions", json=body())
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_down")
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_the_engine_ends_with_its_server(model: Path) -> None:
    with served.server(model) as (_, process):
        engine = engine_of(process)
        process.kill()
        process.wait()
        until(lambda: not Path(f"/proc/{engine}").exists() or "Z" in Path(f"/proc/{engine}/stat").read_text().split(")")[1][:3])


def test_the_key_is_asked_for(model: Path) -> None:
    with served.server(model, "--api-key", "sesame") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pdlab", "serve", *options], capture_output=True, text=True, timeout=180)


def test_a_port_in_use_is_said_before_anything_is_loaded(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("--model", str(model), "--port", str(port))
    assert ended.returncode == 2
    assert ended.stderr == f"error: port {port} on 127.0.0.1 is in use: choose another with --port\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "/nowhere"), "error: --model /nowhere: no such folder or file; give a Hugging Face folder"),
        (
            ("--model", "llama-3.1-8b"),
            "error: model llama-3.1-8b is known by its shape only: give its Hugging Face folder with --model DIR",
        ),
        (("--role", "router"), "error: --role router needs --registry URL"),
        (("--device", "cuda:7"), "error: --device cuda:7: torch sees no cuda device here"),
        (("--host", "256.1.1.1", "--api-key", "k"), "error: cannot listen on 256.1.1.1:0"),
        (("nothing.yaml",), "error: nothing.yaml"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_2(options: tuple[str, ...], says: str) -> None:
    ended = run("--port", "0", *options)
    assert ended.returncode == 2
    *progress, line = ended.stderr.splitlines()
    assert line.startswith(says), ended.stderr
    assert not [other for other in progress if not other.endswith(" s)")], ended.stderr


def test_ctrl_c_while_loading_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "pdlab", "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip() != "")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert b"Traceback" not in complained, complained
    assert process.returncode == 130
    assert b"ready" not in said


def test_an_experiment_sets_model_and_engine(model: Path, tmp_path: Path) -> None:
    from pdlab.experiment.experiment import Experiment
    from pdlab.real.launch.instance import engine_options

    mapping = {
        "model": str(model),
        "base_dir": str(tmp_path),
        "seed": 5,
        "workload": {"source": "azure-conv-2023", "requests": 10, "rate": 1.0},
        "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]},
        "engine": {
            "block_tokens": 8,
            "max_batch_tokens": 128,
            "max_seqs": 3,
            "batching": "decode_first",
            "kv_blocks": 77,
            "prefix_cache": False,
        },
    }
    experiment = Experiment.parse(mapping)
    options = engine_options(experiment, {"max_seqs": 9, "device": None})
    assert (options.block_tokens, options.max_batch_tokens, options.max_seqs, options.batching) == (8, 128, 9, "decode_first")
    assert (options.kv_blocks, options.prefix_cache, options.seed, options.model) == (77, False, 5, str(model))
    assert engine_options(experiment, {"kv_gib": 0.5}).kv_blocks == 0
    known = Experiment.parse({**mapping, "model": "qwen3-8b"})
    with pytest.raises(UsageError, match="qwen3-8b is known by its shape only"):
        engine_options(known, {})
    assert engine_options(known, {"load_format": "dummy"}).model == "qwen3-8b"
    assert engine_options(None, {}).model.endswith(".gguf")


def test_how_tools_are_called_is_settled_before_anything_is_loaded(model: Path) -> None:
    for role in ("mixed", "router"):
        for options, says in (
            (("--tool-call-parser", "hermess"), "--tool-call-parser 'hermess' is not one of hermes, llama3_json"),
            (("--enable-auto-tool-choice",), "--enable-auto-tool-choice needs --tool-call-parser hermes or llama3_json"),
        ):
            registry = ("--registry", "redis://127.0.0.1:1") if role == "router" else ()
            refused = CliRunner().invoke(app, ["serve", "--model", str(model), "--port", "0", "--role", role, *registry, *options])
            assert isinstance(refused.exception, UsageError), refused.output
            assert str(refused.exception).startswith(says)
            assert "loading" not in refused.output


def test_drafts_are_asked_for_as_vllm_spells_them() -> None:
    def asked(text: str, deployment: Deployment | None = None) -> SpeculationOptions | None:
        return engine_options(deployment, {"speculative_config": text}).speculation

    assert asked('{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}') == SpeculationOptions(
        method="ngram", tokens=4, prompt_lookup_min=3, prompt_lookup_max=3
    )
    by_model = asked('{"model": "smollm2-135m", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 1}')
    assert by_model is not None
    assert (by_model.method, by_model.tokens) == ("draft_model", 2)
    assert by_model.model.endswith(".gguf")
    file = Deployment.parse({"model": "smollm2-135m", "engine": {"speculation": {"method": "ngram", "tokens": 3}}})
    in_file = engine_options(file, {}).speculation
    assert in_file is not None
    assert (in_file.tokens, in_file.prompt_lookup_max) == (3, 5)
    instead = asked('{"method": "ngram", "num_speculative_tokens": 1}', file)
    assert instead is not None
    assert instead.tokens == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ngram", r"'ngram' is not JSON such as"),
        ("[3]", r"'\[3\]' is not JSON such as"),
        ('{"method": "eagle", "num_speculative_tokens": 2}', r"method 'eagle' is not one of ngram, draft_model"),
        ('{"method": "ngram", "num_speculative_token": 2}', r"num_speculative_token is not supported; nearest is num_speculative_tokens"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', r"num_speculative_tokens: Input should be greater than or equal to 1"),
        ('{"method": "ngram"}', r"num_speculative_tokens: Field required"),
        ('{"method": "draft_model", "num_speculative_tokens": 2}', r"method draft_model needs model"),
        (
            '{"num_speculative_tokens": 2, "prompt_lookup_min": 4, "prompt_lookup_max": 2}',
            r"prompt_lookup_min 4 exceeds prompt_lookup_max 2",
        ),
        ('{"model": "nowhere", "num_speculative_tokens": 2}', r"nowhere: no such folder"),
        ('{"num_speculative_tokens": 2, "draft_tensor_parallel_size": 2}', r"draft_tensor_parallel_size is not supported"),
    ],
)
def test_drafts_that_cannot_be_are_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        engine_options(None, {"speculative_config": text})
    assert "\n" not in str(error.value)
