"""Files of other kinds than a table or JSON lines: packed otherwise, Parquet, a list for each column, logs of others."""

import bz2
import json
import lzma
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pdlab.core.types import UsageError
from pdlab.workload.columns import Wanted
from pdlab.workload.readers import load

TABLE = "timestamp,input_tokens,output_tokens\n0,10,5\n1,20,6\n"


@pytest.fixture
def refusal(tmp_path):
    """What is said of a file of this content."""

    def said(content, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UsageError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{path}: ")

    return said


@pytest.mark.parametrize(("pack", "suffix"), [(bz2.compress, ".bz2"), (lzma.compress, ".xz")])
def test_bzip2_and_xz_are_read_and_a_part_of_one_is_a_mistake(tmp_path, refusal, pack, suffix):
    path = tmp_path / f"t.csv{suffix}"
    path.write_bytes(pack(TABLE.encode()))
    assert (load(path).name, load(path).prompt_tokens.tolist()) == ("t", [10, 20])
    many = pack((TABLE + "".join(f"{i},{i % 977 + 1},5\n" for i in range(2, 50_000))).encode())
    assert "the compressed stream ends early" in refusal(many[:-1000])


def test_what_a_file_is_instead_is_said(refusal):
    assert refusal(b"PK\x03\x04rest") == "this is a zip archive: unpack it"
    assert refusal(TABLE.encode("utf-16")) == "this is UTF-16: save it as UTF-8"
    assert "damaged" in refusal(b"PAR1" + bytes(100) + b"PAR1")
    receive = "[2025-05-01 10:00:00] Receive: obj=GenerateReqInput(text='Hi', sampling_params={'max_new_tokens': 16})\n"
    assert refusal(receive).startswith("line 1: a log, and not vLLM's")


def test_a_log_of_vllm_may_begin_with_a_line_in_brackets(tmp_path):
    path = tmp_path / "server.log"
    request = "INFO 10-02 10:00:00 [logger.py:40] Received request cmpl-x-0: prompt: 'Hi', params: SamplingParams(n=1, max_tokens=16, ignore_eos=True), prompt_token_ids: [1, 2, 3, 4]."  # noqa: E501  # as it is written
    path.write_text(f"[2025-10-02 09:59:00] starting\n{request}\n", encoding="utf-8")
    assert (load(path).prompt_tokens.tolist(), load(path).output_tokens.tolist()) == ([4], [16])


def test_parquet_is_a_table_with_dates_and_ids(tmp_path):
    path = tmp_path / "t.parquet"
    times = [datetime(2026, 1, 1, 0, 0, 0, 5000), datetime(2026, 1, 1, 0, 0, 3)]
    columns = {"arrival_time": pa.array(times), "prompt_len": [40, 40], "output_len": [5.0, 6.0], "hash_ids": [[1, 2, 3], [1, 2, 4]]}
    pq.write_table(pa.table(columns), path)
    read = load(path, wanted=Wanted(hash_tokens=16))
    assert read.arrival_s.tolist() == pytest.approx([0, 2.995])
    assert (read.prompt_tokens.tolist(), read.output_tokens.tolist(), read.hash_tokens) == ([40, 40], [5, 6], 16)
    assert "ISO 8601" in read.reading
    with pytest.raises(UsageError, match="Parquet, which the format azure is not"):
        load(path, format="azure")


def test_what_is_wrong_with_a_parquet_row_says_which(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"ts": [0.0, 1.0], "prompt_len": [10, None], "output_len": [5, 6]}), path)
    with pytest.raises(UsageError, match="row 2, column prompt_len: must be a whole number, not nothing"):
        load(path)


BENCH = {"backend": "vllm", "completed": 2, "input_lens": [10, 20], "output_lens": [5, 0], "ttfts": [0.1, 0.2], "itls": [[0.1], []]}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_for_each_column_is_a_table(tmp_path, indent):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(BENCH | {"start_times": [100.5, 102.0]}, indent=indent), encoding="utf-8")
    read = load(path)
    assert (read.arrival_s.tolist(), read.prompt_tokens.tolist(), read.dropped) == ([0], [10], 1)
    path.write_text(json.dumps(BENCH, indent=indent), encoding="utf-8")
    with pytest.raises(UsageError, match=r"column arrival_s: is missing.*workload.arrival and rate draw times"):
        load(path)
    assert load(path, wanted=Wanted(replaced=("arrival_s",))).prompt_tokens.tolist() == [10]


def test_times_that_cannot_be_are_named(refusal):
    gap = "interarrival_time,input_tokens,output_tokens\n0,10,5\n{},20,6\n"
    assert "column interarrival_time: 1 s before the row above" in refusal(gap.format(-1))
    assert "column interarrival_time: nan is not a time" in refusal(gap.format("nan"))
    assert "column timestamp: 1e+308 s is more than a hundred years" in refusal(TABLE + "1e308,10,5\n")


def test_ids_may_be_written_as_floats(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp":0,"input_length":1500,"output_length":5,"hash_ids":[1.0,2,3.0]}\n', encoding="utf-8")
    assert load(path).hash_tokens == 512
    path.write_text('{"timestamp":0,"input_length":1500,"output_length":5,"hash_ids":[1.5,2,3]}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"column hash_ids: must be a whole number, not 1\.5"):
        load(path)


def test_columns_that_are_for_the_asking_are_said(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("ts,input_tokens,output_tokens,priority\n0,10,5,2\n", encoding="utf-8")
    assert load(path).reading.endswith("; not priority, which columns: {priority: priority} takes")
    read = load(path, wanted=Wanted(columns={"priority": "priority"}))
    assert "not priority" not in read.reading
    assert read.priority.tolist() == [2]
