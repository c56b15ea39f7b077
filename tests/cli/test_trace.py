"""`pdlab trace` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pdlab.cli.trace import app
from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.readers import load
from pdlab.workload.writer import write


def trace(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """300 requests that share prompts by tens."""
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.exponential(0.5, 300))
    prompts, outputs = (rng.integers(40, 400, 300).astype(np.int32) for _ in range(2))
    chains = [tuple(10 * (i // 10) + k for k in range(2)) for i in range(300)]
    path = tmp_path / "shared.csv.zst"
    write(Workload("shared", times, prompts, outputs, hashes=chains), path)
    return path


def test_stats_of_a_file_as_a_table_and_as_json(shared: Path) -> None:
    table = trace("stats", shared).output
    assert "shared: 300 requests" in table
    assert "prefix hits, tokens" in table
    figures = json.loads(trace("stats", shared, "--json", "--requests", 100).output)
    assert (figures["requests"], figures["prefix"]["unique_units"], figures["prefix"]["unit_hit_ratio"]) == (100, 20, 0.9)


def test_stats_of_a_built_in(tmp_path: Path) -> None:
    figures = json.loads(trace("stats", "azure-conv-2023", "--requests", 500, "--json").output)
    assert (figures["name"], figures["requests"]) == ("azure-conv-2023", 500)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_draws_whatever_there_is_to_draw(shared: Path, tmp_path: Path, suffix: str) -> None:
    trace("stats", shared, "--plot", tmp_path / f"picture{suffix}")
    assert (tmp_path / f"picture{suffix}").stat().st_size > 10_000
    one = tmp_path / "one.csv"
    write(Workload("one", np.zeros(1), np.array([3], np.int32), np.array([1], np.int32), concurrency=1), one)
    trace("stats", one, "--plot", tmp_path / f"one{suffix}")
    assert {path.name for path in tmp_path.iterdir()} == {shared.name, "one.csv", f"picture{suffix}", f"one{suffix}"}


def test_convert_keeps_the_first_requests_and_stretches_time(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    assert "100 requests at 8 requests/s" in trace("convert", shared, out, "--requests", 100, "--rate", 8).output.replace("\n", " ")
    before, after = load(shared, requests=100), load(out)
    assert after.rate_rps == pytest.approx(8)
    assert np.array_equal(before.prompt_tokens, after.prompt_tokens)


def test_synth_makes_the_same_file_of_the_same_seed(tmp_path: Path) -> None:
    spec = "{source: synthetic, requests: 50, rate: 5, prompt: 100, output: 10}"
    one, same, other, few = (tmp_path / f"{name}.csv" for name in ("one", "same", "other", "few"))
    trace("synth", one, "--spec", spec, "--seed", 1)
    trace("synth", same, "--spec", spec, "--seed", 1)
    trace("synth", other, "--spec", spec, "--seed", 2)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"name: x\nworkload: {spec}\n", encoding="utf-8")
    trace("synth", few, "--spec", experiment, "--requests", 7, "--seed", 1)
    assert len(load(few)) == 7
    trace("synth", few, "--source", "azure-code-2023", "--requests", 9)
    assert len(load(few)) == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stats", "azure-con"], "azure-conv-2023"),
        (["stats", "gone.csv"], "gone.csv: No such file"),
        (["stats", "SHARED", "--plot", "x.bmp"], "--plot x.bmp"),
        (["stats", "SHARED", "--format", "azur"], "format 'azur'"),
        (["convert", "SHARED", "out.txt"], "the suffix says what to write"),
        (["convert", "SHARED", "out.csv", "--rate", "-1"], "--rate -1: must be above 0"),
        (["synth", "out.csv"], "either --source"),
        (["synth", "out.csv", "--spec", "{source: synthetic, rat: 3}"], "rat: unknown key"),
        (["synth", "out.csv", "--spec", "{source"], "--spec"),
        (["synth", "out.csv", "--spec", "words"], "neither a .yaml file nor a mapping"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments: list[str], said: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        trace(*(str(shared) if argument == "SHARED" else argument for argument in arguments))
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [shared]
