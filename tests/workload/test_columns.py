"""Columns by the names that everybody uses, and by what the user says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdlab.cli.trace import app
from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.columns import Wanted
from pdlab.workload.readers import load
from pdlab.workload.spec import WorkloadSpec, build
from pdlab.workload.writer import write

Read = Callable[..., Workload]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(text: str, name: str = "my.csv", **wanted: Any) -> Workload:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load(tmp_path / name, wanted=Wanted(**wanted))

    return read


def rows(workload: Workload) -> list[tuple[float, int, int]]:
    columns = workload.arrival_s.round(6).tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    return list(zip(*columns, strict=True))


TWO = [(0.0, 100, 20), (1.5, 200, 30)]


@pytest.mark.parametrize(
    "arrival", ["ts", "timestamp", "Time", "arrival", "arrival_time", "arrived_at", "start_time", "Request Time", "created"]
)
@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ("input_tokens", "output_tokens"),
        ("prompt_tokens", "completion_tokens"),
        ("num_prefill_tokens", "num_decode_tokens"),
        ("Input Length", "Output Length"),
        ("promptTokens", "generatedTokens"),
        ("PROMPT_LEN", "output_len"),
        ("isl", "osl"),
        ("num_prompt_tokens", "num_generated_tokens"),
        ("request_tokens", "response_tokens"),
        ("usage.prompt_tokens", "usage.completion_tokens"),
        ("prompt_size", "token_size"),
        ("tokens_prompt", "tokens_completion"),
    ],
)
def test_names_that_everybody_uses_are_known(read: Read, arrival: str, prompt: str, output: str) -> None:
    assert rows(read(f"id,{output},{arrival},{prompt}\n1,20,0,100\n2,30,1.5,200\n")) == TWO


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_may_be_apart_by_whatever_spreadsheets_put_between(read: Read, delimiter: str, end: str, mark: str) -> None:
    lines = (("ts", "input_tokens", "output_tokens"), ("0", "100.0", "20"), ("1.5", "200", "3e1"))
    assert rows(read(mark + end.join(delimiter.join(line) for line in lines) + end)) == TWO


def test_json_names_may_be_paths(read: Read) -> None:
    entries = [{"created": 1700000000 + s, "usage": {"prompt_tokens": p, "completion_tokens": o}} for s, p, o in TWO]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    assert rows(read(lines, "my.jsonl")) == TWO
    assert rows(read(json.dumps(entries, indent=1), "my.json")) == TWO, "a list over many lines"
    assert rows(read(json.dumps(entries), "my.json")) == TWO, "and on one"
    nested = lines.replace("usage", "u").replace("prompt_tokens", "p").replace("completion_tokens", "c")
    assert rows(read(nested, "my.jsonl", columns={"prompt_tokens": "u.p", "output_tokens": "u.c"})) == TWO


def test_the_user_says_what_is_what(read: Read, tmp_path: Path) -> None:
    text = "when,in,out,rank,prompt_tokens\n0,100,20,1,7\n1500,200,30,,7\n"
    columns = {"arrival_s": "when", "prompt_tokens": "in", "output_tokens": "Out", "priority": "rank"}
    workload = read(text, columns=columns, time_unit="ms")
    assert workload.priority is not None
    assert (rows(workload), workload.priority.tolist()) == (TWO, [1, 0])
    assert workload.reading == "table: arrival_s when (relative ms), prompt_tokens in, output_tokens out, priority rank"
    spec = WorkloadSpec.model_validate({"source": "my.csv", "columns": columns, "time_unit": "ms"})
    assert rows(build(spec, 0, tmp_path)) == TWO
    said = "arrival_s=when,prompt_tokens=in"
    arguments = ["convert", str(tmp_path / "my.csv"), str(tmp_path / "out.csv"), "--columns", said, "--columns", "output_tokens=out"]
    result = CliRunner().invoke(app, [*arguments, "--time-unit", "ms"])
    assert "read as table: arrival_s when (relative ms)" in result.output
    assert rows(load(tmp_path / "out.csv")) == TWO
    figures = CliRunner().invoke(app, ["stats", str(tmp_path / "my.csv"), "--columns", f"{said},output_tokens=out", "--json"]).output
    assert json.loads(figures)["reading"].startswith("table: arrival_s when (relative s; time_unit: ms if they are milliseconds)")


def test_a_unit_in_the_name_is_the_times_unit(read: Read) -> None:
    assert rows(read("arrival_ms,input_tokens,output_tokens\n0,100,20\n1500,200,30\n")) == TWO
    assert rows(read("ts (us);input_tokens;output_tokens\n0;100;20\n1500000;200;30\n")) == TWO


def test_of_two_times_the_arrival_is_meant_and_of_two_alike_none(read: Read) -> None:
    assert rows(read("timestamp,arrival_time,input_tokens,output_tokens\n9,0,100,20\n9,1.5,200,30\n")) == TWO
    assert rows(read("ts,prompt_length,input_tokens,output_tokens\n0,9,100,20\n1.5,9,200,30\n")) == TWO, "a length may be of characters"
    text = "ts,input_tokens,context_tokens,output_tokens\n0,100,7,20\n1.5,200,7,30\n"
    with pytest.raises(UsageError, match=r"line 1: input_tokens and context_tokens could both be prompt_tokens; say which with columns"):
        read(text)
    assert rows(read(text, columns={"prompt_tokens": "input_tokens"})) == TWO


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ts,input_tokens,output_tokens\n0,374.5,20\n", "line 2, column input_tokens: '374.5' is not a whole number"),
        ("ts,input_tokens,output_tokens\n0,1,2\n1,nan,20\n", "line 3, column input_tokens: 'nan' is not a whole number"),
        ("ts,input_tokens,output_tokens\n0,,20\n", "line 2, column input_tokens: is empty, not a whole number"),
        ("ts,input_tokens,output_tokens\n0,-3,20\n", "line 2, column input_tokens: -3 tokens; must be at least 0"),
        ("ts,input_tokens,output_tokens\n0,1,inf\n", "line 2, column output_tokens: 'inf' is not a whole number"),
        ("ts,input_tokens,output_tokens\n0,1_000,2\n", "line 2, column input_tokens: '1_000' is not a whole number"),
        ("ts,input_tokens,output_tokens\n,1,2\n", "line 2, column ts: is empty, not a time such as"),
        ("ts,input_tokens,output_tokens\n-2,1,2\n", "line 2, column ts: -2 s is negative"),
        ("ts;input_tokens;output_tokens\n0;1,5;2\n", "line 2, column input_tokens: '1,5' is not a whole number"),
        ("ts,input_tokens,output_tokens\n0,1,2\n2024-05-10 00:00,1,2\n", "'2024-05-10 00:00' is not a number, as the times above"),
        ("ts,input_tokens\n0,1\n", "column output_tokens: is missing; nearest: input_tokens; columns: {output_tokens: NAME} says which"),
        ("0,100,20\n1,200,30\n", "line 1: no header; a line such as arrival_s,prompt_tokens,output_tokens"),
        ("a,b,c\n0,100,20\n", "columns: {arrival_s: NAME, prompt_tokens: NAME, output_tokens: NAME}"),
    ],
)
def test_what_is_wrong_names_the_row_and_the_remedy(read: Read, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"ts": 1, "input_tokens": 374.5, "output_tokens": 2}, "line 2, column input_tokens: must be a whole number, not 374.5"),
        ({"ts": 1, "input_tokens": None, "output_tokens": 2}, "line 2, column input_tokens: must be a whole number, not nothing"),
        ({"ts": 1, "input_tokens": True, "output_tokens": 2}, "line 2, column input_tokens: must be a whole number, not a truth value"),
        ({"ts": 1, "output_tokens": 2}, "line 2, column input_tokens: is missing; nearest: output_tokens"),
        ({"ts": None, "input_tokens": 1, "output_tokens": 2}, "line 2, column ts: must be a time, not nothing"),
        ({"ts": [], "input_tokens": 1, "output_tokens": 2}, "line 2, column ts: must be a time, not a list"),
    ],
)
def test_a_wrong_value_of_json_is_named(read: Read, entry: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(json.dumps({"ts": 0, "input_tokens": 374.0, "output_tokens": 1}) + "\n" + json.dumps(entry), "my.jsonl")
    assert said in str(caught.value)


def test_what_the_experiment_draws_need_not_be_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n100,20\n200,30\n")
    spec = {"source": "lengths.csv", "arrival": "poisson", "rate": 2.0}
    workload = build(WorkloadSpec.model_validate(spec), 0, tmp_path)
    assert workload.prompt_tokens.tolist() == [100, 200]
    assert workload.arrival_s[1] > 0
    with pytest.raises(UsageError, match=r"column arrival_s: is missing;.*workload\.arrival and rate draw times"):
        build(WorkloadSpec.model_validate({"source": "lengths.csv"}), 0, tmp_path)
    (tmp_path / "asked.csv").write_text("ts,input_tokens\n0,100\n1.5,200\n")
    spec = {"source": "asked.csv", "output": 7}
    assert rows(build(WorkloadSpec.model_validate(spec), 0, tmp_path)) == [(0.0, 100, 7), (1.5, 200, 7)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source": "my.csv", "columns": {"arrival": "ts"}}, "columns.arrival: no column is that; nearest is arrival_s"),
        ({"source": "my.csv", "columns": {}}, "columns"),
        ({"source": "my.csv", "time_unit": "min"}, "'min'"),
        ({"source": "azure-conv-2023", "columns": {"arrival_s": "ts"}}, "columns is of a trace file"),
        ({"source": "azure-conv-2023", "time_unit": "ms"}, "time_unit is of a trace file"),
        ({"source": "azure-conv-2023", "hash_tokens": 16}, "hash_tokens is of a trace file"),
        ({"source": "azure-conv-2023", "format": "azure"}, "format is of a trace file"),
    ],
)
def test_keys_that_would_be_for_nothing_are_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        WorkloadSpec.model_validate(keys)


def test_columns_that_are_not_there_and_words_that_are_no_columns(read: Read, tmp_path: Path) -> None:
    text = "ts,input_tokens,output_tokens\n0,100,20\n"
    with pytest.raises(UsageError, match=r"column in: is missing"):
        read(text, columns={"prompt_tokens": "in"})
    with pytest.raises(UsageError, match=r"column rank: is missing"):
        read(text, columns={"priority": "rank"})
    with pytest.raises(UsageError, match="the format generic has columns and units of its own"):
        load(tmp_path / "my.csv", format="generic", wanted=Wanted({"arrival_s": "ts"}))
    with pytest.raises(UsageError, match=r"columns\.delay_s: session_id and delay_s go together"):
        read("ts,input_tokens,output_tokens,wait\n0,1,1,2\n", columns={"delay_s": "wait"})
    assert len(read("ts,input_tokens,output_tokens,delay\n0,1,1,2\n")) == 1, "a delay of something else"
    mooncake = 'timestamp,input_length,output_length,hash_ids\n0,1024,5,"[1, 2]"\n1500,1024,5,"[1, 3]"\n'
    assert read(mooncake).arrival_s.tolist() == [0.0, 1.5], "Mooncake's columns are Mooncake's in CSV, too"
    with pytest.raises(UsageError, match=r"columns\.priority: no row has rank"):
        read('{"ts": 0, "input_tokens": 1, "output_tokens": 1}', "my.jsonl", columns={"priority": "rank"})
    for words, said in (
        ("ts", "must be ROLE=NAME"),
        ("arrival=ts", "no column is that; nearest is arrival_s"),
        ("n=", "must be ROLE=NAME"),
    ):
        with pytest.raises(UsageError, match=said):
            CliRunner().invoke(app, ["stats", "my.csv", "--columns", words], catch_exceptions=False)
    with pytest.raises(UsageError, match="time_unit ms: the times are dates"):
        read("ts,input_tokens,output_tokens\n2024-05-10,1,1\n", time_unit="ms")
    with pytest.raises(UsageError, match="hash_tokens 16: the file has no ids"):
        read(text, hash_tokens=16)


def test_a_file_of_pdlabs_own_keeps_its_unit_unless_the_user_says_another(tmp_path: Path, read: Read) -> None:
    own = "# hash_tokens: 32\narrival_s,prompt_tokens,output_tokens,hash_ids\n0.5,64,1,7 8\n"
    assert (read(own).hash_tokens, read(own, hash_tokens=64).hash_tokens) == (32, 64)
    with pytest.raises(UsageError, match=r"line 3, column hash_ids: 2 ids of 128 tokens each are more than the 65 tokens of the request"):
        read(own, hash_tokens=128)
    write(read(own), tmp_path / "again.csv")
    assert list(load(tmp_path / "again.csv").hashes or ()) == [(7, 8)]
