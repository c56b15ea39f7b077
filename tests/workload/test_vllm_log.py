"""The logs of vLLM servers of several versions, and what they leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.columns import Wanted
from pdlab.workload.readers import load
from pdlab.workload.spec import WorkloadSpec, build

PARAMS = "SamplingParams(n=1, presence_penalty=0.0, temperature=0.7, top_k=-1, stop=[], ignore_eos=False, max_tokens={most}, min_tokens=0)"
OLD = (
    "INFO 12-06 {time} async_llm_engine.py:379] Received request {id}: prompt: 'San, params: [1] Francisco', "
    "sampling params: " + PARAMS + ", prompt token ids: {ids}.\n"
)
MIDDLE = (
    "INFO 04-16 {time} [logger.py:39] Received request {id}: prompt: 'max_tokens=999, prompt_token_ids: [7]', params: " + PARAMS + ", "
    "prompt_token_ids: {ids}, lora_request: None, prompt_adapter_request: None.\n"
)
NEW = (
    "(APIServer pid=66) DEBUG 09-02 {time} [entrypoints/logger.py:37] Request {id} details: prompt: 'x', prompt_token_ids: {ids}, "
    "prompt_embeds shape: None.\n"
    "(APIServer pid=66) INFO 09-02 {time} [entrypoints/logger.py:47] Received request {id}: params: " + PARAMS + ", lora_request: None.\n"
)
BANNER = "INFO 12-06 08:00:00 [api_server.py:1] vLLM API server version 0.9\nINFO:     Started server process [9432]\n"
NOISE = 'INFO:     127.0.0.1:58452 - "POST /v1/completions HTTP/1.1" 200 OK\nINFO 12-06 08:33:03 [async_llm.py:252] Added request cmpl-1.\n'


def line(form: str, id_: str, time: str, ids: object, most: object = 64) -> str:
    return form.format(id=id_, time=time, ids=ids, most=most)


def answer(id_: str, ids: object, how: str = "") -> str:
    said = f"Generated response {id_}{how}: output: 'y', output_token_ids: {ids}, finish_reason: stop"
    return f"(APIServer pid=66) INFO 09-02 09:00:00 [logger.py:92] {said}\n"


def read(tmp_path: Path, text: str, name: str = "server.log", **wanted: object) -> Workload:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load(tmp_path / name, wanted=Wanted(**wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [OLD, MIDDLE, NEW], ids=["0.2", "0.8", "0.11"])
@pytest.mark.parametrize("banner", ["", BANNER, "WARNING: no swap\n==========\n"], ids=["none", "vllm", "other"])
def test_lengths_shared_prefixes_and_answers_of_any_version(tmp_path: Path, form: str, banner: str) -> None:
    common = list(range(100, 140))
    text = banner + line(form, "cmpl-1", "08:33:02", [*common, 1, 2]) + NOISE + line(form, "cmpl-2", "08:33:05", [*common, 3])
    text += (
        answer("cmpl-1", [9] * 20)
        + "".join(answer("cmpl-2", [9], " (streaming delta)") for _ in range(3))
        + answer("cmpl-2", None, " (streaming complete)")
    )
    workload = read(tmp_path, text)
    assert workload.arrival_s.tolist() == [0.0, 3.0]
    assert (workload.prompt_tokens.tolist(), workload.output_tokens.tolist()) == ([42, 41], [20, 3])
    assert (workload.hash_tokens, list(workload.hashes or ())) == (16, [(0, 1), (0, 1)])
    assert workload.reading.startswith("vllm: arrival_s the lines' times")
    assert "whole seconds" in workload.notes[0]
    assert list(read(tmp_path, text, hash_tokens=41).hashes or ()) == [(0,), (1,)]
    assert len(load(tmp_path / "server.log", requests=1)) == 1


def test_answers_of_completions_carry_the_id_without_its_number(tmp_path: Path) -> None:
    text = line(MIDDLE, "cmpl-7-0", "08:33:02", [1, 2]) + answer("cmpl-7", [5, 5, 5])
    assert read(tmp_path, text).output_tokens.tolist() == [3]


def test_what_the_log_lacks_is_said_and_can_be_given(tmp_path: Path) -> None:
    asked = line(MIDDLE, "cmpl-1-0", "08:33:02", [1, 2], 64) + line(MIDDLE, "cmpl-2-0", "08:33:04", [1, 2, 3], 32)
    with pytest.raises(UsageError, match=r"does not say how long the answers were;.*--enable-log-outputs;.*max_tokens"):
        read(tmp_path, asked)
    limits = read(tmp_path, asked, columns={"output_tokens": "max_tokens"})
    assert limits.output_tokens.tolist() == [64, 32]
    assert "output_tokens max_tokens, the limit" in limits.reading
    spec = WorkloadSpec.model_validate({"source": "server.log", "output": 9})
    assert build(spec, 0, tmp_path).output_tokens.tolist() == [9, 9]
    exact = read(tmp_path, asked.replace("ignore_eos=False", "ignore_eos=True"))
    assert exact.output_tokens.tolist() == [64, 32]
    chats = asked.replace("[1, 2]", "None").replace("[1, 2, 3]", "None")
    with pytest.raises(UsageError, match=r"no prompt's tokens, and so no lengths; .*VLLM_LOGGING_LEVEL=DEBUG"):
        read(tmp_path, chats)
    with pytest.raises(UsageError, match="no request in this log"):
        read(tmp_path, BANNER)
    with pytest.raises(UsageError, match="of a vLLM log, columns can only say output_tokens: max_tokens"):
        read(tmp_path, asked, columns={"arrival_s": "when"})


def test_requests_without_an_answer_in_the_log_are_dropped_and_counted(tmp_path: Path) -> None:
    text = line(MIDDLE, "a", "08:33:02", [1, 2]) + line(MIDDLE, "b", "08:33:03", [1]) + answer("b", [4])
    workload = read(tmp_path, text)
    assert (workload.prompt_tokens.tolist(), workload.dropped) == ([1], 1)
    assert "1 of 2 requests dropped" in " ".join(workload.notes)


def test_cut_prompts_are_suspected(tmp_path: Path) -> None:
    text = "".join(line(MIDDLE, f"r{i}", f"08:33:0{i}", [1] * 10) + answer(f"r{i}", [4]) for i in range(5))
    assert "5 prompts have 10 tokens: if the server ran with --max-log-len, they were longer" in read(tmp_path, text).notes


def test_a_log_goes_on_into_the_next_year_and_other_stamps_are_read(tmp_path: Path) -> None:
    text = line(MIDDLE, "a", "23:59:58", [1]).replace("04-16", "12-31") + line(MIDDLE, "b", "00:00:01", [1]).replace("04-16", "01-01")
    text += answer("a", [4]) + answer("b", [4])
    assert read(tmp_path, text).arrival_s.tolist() == [0.0, 3.0]
    iso = text.replace("INFO 12-31 23:59:58", "2025-12-31 23:59:58,250 INFO").replace("INFO 01-01 00:00:01", "2026-01-01 00:00:01,750 INFO")
    assert read(tmp_path, iso).arrival_s.tolist() == [0.0, 3.5]
    assert not read(tmp_path, iso).notes


def test_several_answers_to_a_prompt(tmp_path: Path) -> None:
    text = line(MIDDLE, "a", "08:33:02", [1]).replace("n=1,", "n=3,") + answer("a", [4] * 9)
    workload = read(tmp_path, text)
    assert workload.n is not None
    assert (workload.n.tolist(), workload.output_tokens.tolist()) == ([3], [3])
