"""What other projects' tools write: splitwise-sim's and Vidur's traces, AIPerf's and GuideLLM's measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.columns import Wanted
from pdlab.workload.readers import load


def rows(workload: Workload) -> list[tuple[float, int, int]]:
    columns = workload.arrival_s.round(6).tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    return list(zip(*columns, strict=True))


def test_splitwise_sims_traces(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    head = "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    path.write_text(head + "0,2,0,0.1,1,100,20\n1,2,0,0.4,1,200,30\n")
    workload = load(path)
    assert rows(workload) == [(0.0, 100, 20), (0.3, 200, 30)]
    assert workload.reading == "splitwise: arrival_s arrival_timestamp (relative s), prompt_tokens prompt_size, output_tokens token_size"


def test_vidurs_measurements_and_splitwise_sims_which_have_no_times(tmp_path: Path) -> None:
    path = tmp_path / "request_metrics.csv"
    head = "Request Id,request_e2e_time,prefill_e2e_time,request_inter_arrival_delay,request_num_tokens,request_num_prefill_tokens,"
    path.write_text(head + "request_num_decode_tokens\n0,9.1,0.2,,120,100.0,20.0\n1,8.5,0.3,0.5,230,200.0,30.0\n2,1,1,0.25,3,2.0,1.0\n")
    workload = load(path)
    assert rows(workload) == [(0.0, 100, 20), (0.5, 200, 30), (0.75, 2, 1)]
    assert workload.reading.startswith(
        "table: gap_s request_inter_arrival_delay (s since the row above), prompt_tokens request_num_prefill"
    )
    path.write_text("request_ids,response_times,prompt_sizes,token_sizes\n0,1.5,100,20\n")
    assert rows(load(path, wanted=Wanted(replaced={"arrival_s"}))) == [(0.0, 100, 20)]
    lines = '{"inter_arrival_ms": 0, "isl": 3, "osl": 4}\n{"inter_arrival_ms": 250, "isl": 3, "osl": 4}\n'
    (tmp_path / "gaps.jsonl").write_text(lines)
    wanted = Wanted({"gap_s": "inter_arrival_ms"})
    assert load(tmp_path / "gaps.jsonl", wanted=wanted).arrival_s.tolist() == [0.0, 0.25]


def record(start_ns: int, prompt: int, output: int | None, **metadata: Any) -> str:
    metrics: dict[str, Any] = {
        "input_sequence_length": {"value": prompt, "unit": "tokens"},
        "request_latency": {"value": 297.5, "unit": "ms"},
    }
    metrics |= {"output_sequence_length": {"value": output, "unit": "tokens"}, "inter_chunk_latency": {"value": [4.8, 5.3], "unit": "ms"}}
    if output is None:
        metrics = {"error_isl": {"value": prompt, "unit": "tokens"}}
    told = {"session_num": 45, "conversation_id": "77aa", "turn_index": 0, "request_start_ns": start_ns, "request_end_ns": start_ns + 10**9}
    return json.dumps({"metadata": {**told, **metadata}, "metrics": metrics, "error": None if output else {"code": 499}}) + "\n"


def test_aiperfs_records_which_stand_in_the_order_of_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "profile_export.jsonl"
    start_ns = 1759813207532900363
    path.write_text(
        record(start_ns + 1_500_000_000, 200, 30)
        + record(start_ns, 100, 20)
        + record(start_ns + 7, 5, None)
        + record(start_ns + 2 * 10**9, 7, 8)
    )
    workload = load(path)
    assert rows(workload) == [(0.0, 100, 20), (1.5, 200, 30), (2.0, 7, 8)]
    assert workload.dropped == 1
    assert workload.reading.startswith("aiperf: arrival_s metadata.request_start_ns (epoch ns)")
    assert rows(load(path, requests=2)) == rows(workload)[:2]
    path.write_text(record(start_ns, 100, 20).replace('"value": 100', '"value": "x"'))
    with pytest.raises(UsageError, match=r"line 1, column metrics\.input_sequence_length\.value: must be a whole number, not text"):
        load(path)


def guidellm(version: str, start_s: float, prompt: int, output: int) -> dict[str, Any]:
    if version == "0.2":
        return {
            "type_": "generative_text_response",
            "start_time": start_s,
            "end_time": start_s + 1,
            "prompt_tokens": prompt,
            "output_tokens": output,
        }
    timings = {"targeted_start": start_s - 1, "request_start": start_s, "request_end": start_s + 1}
    if version == "0.3":
        return {"scheduler_info": {"request_timings": timings}, "prompt_tokens": prompt, "output_tokens": output}
    metrics = {"input_metrics": {"text_tokens": prompt}, "output_metrics": {"text_tokens": output}, "info": {"timings": timings}}
    return metrics if version == "0.4" else metrics | {"request_start_time": start_s, "prompt_tokens": prompt, "output_tokens": output}


@pytest.mark.parametrize("version", ["0.2", "0.3", "0.4", "0.5"])
@pytest.mark.parametrize("indent", [None, 2])
def test_guidellms_benchmarks(tmp_path: Path, version: str, indent: int | None) -> None:
    start_s = 1759813207.25
    first = {"successful": [guidellm(version, start_s + 1.5, 200, 30), guidellm(version, start_s, 100, 20)], "incomplete": [{"info": {}}]}
    second = {"successful": [guidellm(version, start_s + 60, 7, 8)], "errored": [], "incomplete": []}
    document = {"metadata": {"version": 1}, "benchmarks": [{"config": {}, "requests": first}, {"config": {}, "requests": second}]}
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(document, indent=indent))
    workload = load(path)
    assert rows(workload) == [(0.0, 100, 20), (1.5, 200, 30), (60.0, 7, 8)]
    assert (workload.dropped, workload.reading.partition(":")[0]) == (1, "guidellm")
    document["benchmarks"] = [{"requests": {"successful": [{**guidellm("0.5", 0, 1, 1), "output_tokens": 1.5}]}}]
    path.write_text(json.dumps(document, indent=indent))
    with pytest.raises(UsageError, match=r"request 1, column output_tokens: must be a whole number, not 1\.5"):
        load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "benchmarks": [{"config": 1}]}', r"a benchmark without requests\.successful"),
        ('{\n "input_config": {"endpoint": 1},\n "records": {}\n}', "one JSON object, but not GuideLLM's: .* profile_export"),
        ('{\n "benchmarks": [', r"line 2, column 17: not JSON"),
        ("[\n3,\n4]", "not a JSON object"),
    ],
)
def test_other_documents_are_refused_with_a_reason(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        load(path)
