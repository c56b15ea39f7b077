"""Words of vLLM, SGLang and the benchmark clients: taken where they mean the same, hinted at where they do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError

from pdlab import Experiment, UsageError
from pdlab.cli.main import app, command, main
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.spellings import FLAGS, KEYS
from pdlab.experiment.yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
QUICK = read_yaml(ROOT / "experiments" / "quickstart.yaml")


def options(name: str) -> dict[str, str]:
    """A command's flags, and the parameter behind each."""
    return {flag: str(one.name) for one in command(name).params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}


def ended(*arguments: str) -> tuple[int, str]:
    run = subprocess.run([sys.executable, "-m", "pdlab", *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    return run.returncode, run.stderr


@pytest.mark.parametrize(
    ("flag", "parameter"),
    [
        ("--max-num-seqs", "max_seqs"),
        ("--max-running-requests", "max_seqs"),
        ("--max-num-batched-tokens", "max_batch_tokens"),
        ("--chunked-prefill-size", "max_batch_tokens"),
        ("--gpu-memory-utilization", "hbm_utilization"),
        ("--mem-fraction-static", "hbm_utilization"),
        ("--block-size", "block_tokens"),
        ("--page-size", "block_tokens"),
        ("--context-length", "max_model_len"),
        ("--model-path", "model"),
        ("--tokenizer-path", "tokenizer"),
    ],
)
def test_flags_that_mean_the_same_are_taken(flag: str, parameter: str) -> None:
    known = options("serve")
    assert known[flag] == parameter == known[f"--{parameter.replace('_', '-')}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--pipeline-parallel-size", "2"], "--pipeline-parallel-size: "),
        (["serve", "--pp-size=2"], "--engine vllm"),
        (["serve", "--no-enable-prefix-caching", "--disable-log-stats"], "no request is logged"),
        (["serve", "--disaggregation-mode", "prefill"], "--role prefill"),
        (["serve", "--kv-transfer-config", "{}"], "--role prefill"),
        (["bench", "x.yaml", "--request-rate", "3"], "--set workload.rate=3"),
        (["bench", "x.yaml", "--num-prompts", "3"], "--requests"),
        (["bench", "x.yaml", "--base-url", "http://a"], "--url"),
        (["bench", "x.yaml", "--concurrency", "3"], "closed"),
    ],
)
def test_flags_that_do_not_are_hinted_at(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: --") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("command", FLAGS)
def test_no_hint_hides_a_flag_that_is_there(command: str) -> None:
    assert not FLAGS[command].keys() & options(command).keys()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"engine": {"max_num_seqs": 8}}, "engine.max_num_seqs: unknown key; pdlab's is engine.max_seqs"),
        ({"engine": {"max-num-batched-tokens": 8}}, "pdlab's is engine.max_batch_tokens"),
        ({"engine": {"gpu_memory_utilization": 0.8}}, "pdlab's is engine.hbm_utilization"),
        ({"tensor_parallel_size": 8}, "tensor_parallel_size: unknown key; pdlab's is tp, of a row of cluster.instances"),
        ({"engine": {"tensor_parallel_size": 8}}, "pdlab's is tp, of a row of cluster.instances"),
        ({"workload": {**QUICK["workload"], "request_rate": 3}}, "pdlab's is workload.rate"),
        ({"max_model_len": 3}, "pdlab's is engine.max_model_len"),
        ({"workload": {**QUICK["workload"], "rat": 3}}, "nearest is rate"),
    ],
)
def test_keys_that_others_use_name_ours(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        Experiment.parse({**QUICK, **change})
    assert line in str(caught.value)


def test_every_key_that_is_named_as_ours_is_one() -> None:
    whole = yaml.safe_load(Experiment.parse(QUICK).to_yaml())
    for ours in {re.split("[:,]", one)[0] for one in KEYS.values()}:
        if ours == "tp":
            continue
        *path, key = ours.split(".")
        for part in path:
            whole.setdefault(part, {})
        node = {**whole, path[0]: {**whole[path[0]], key: object()}} if path else {**whole, key: object()}
        with pytest.raises(ValidationError) as caught:
            Experiment.model_validate(node)
        assert not any("unknown key" in line for line in mistakes(caught.value, Experiment)), ours


@pytest.mark.parametrize("arguments", [["serve", "Qwen/Qwen3-8B"], ["serve", "--model", "Qwen/Qwen3-8B"]])
def test_a_name_of_a_hub_says_what_to_download_and_how(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B" in said and "--model Qwen3-8B" in said
    assert said.count("\n") == 1


def test_a_model_of_a_hub_in_an_experiment_needs_its_config_alone() -> None:
    with pytest.raises(UsageError) as caught:
        Experiment.parse({**QUICK, "model": "Some-Org/New-Model-9B"})
    assert "hf download Some-Org/New-Model-9B config.json --local-dir New-Model-9B" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        Experiment.parse({**QUICK, "model": "lama-3.1-8b"})
    assert "hf download" not in str(caught.value)
    assert Experiment.parse({**QUICK, "model": "meta-llama/Llama-3.1-8B"}).model == "meta-llama/Llama-3.1-8B"  # known by its name


def test_a_model_given_as_the_experiment_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for given in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(SystemExit):
            main(["serve", str(given)])
        assert f"{given} is a model: give it as --model {given}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "offered"), [("pdlab si", "sim"), ("pdlab serve --max-n", "--max-num-seqs"), ("pdlab tokenizer ", "export")]
)
def test_the_shell_completes_commands_and_flags(words: str, offered: str) -> None:
    environment = {**os.environ, "_PDLAB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    run = subprocess.run(
        [sys.executable, "-c", "from pdlab.cli.main import main; main()"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert offered in run.stdout.split(), run.stderr


def test_completion_can_be_installed() -> None:
    known = {flag for one in typer.main.get_command(app).params for flag in one.opts}
    assert {"--install-completion", "--show-completion"} <= known
