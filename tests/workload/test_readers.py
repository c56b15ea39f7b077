"""Published trace formats, in small files of the same form, and what the reader says of broken ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pdlab.core.types import UsageError
from pdlab.workload.readers import load

TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
GENERIC = "arrival_s,prompt_tokens,output_tokens\n0.0,70,5\n1.5,3,2\n"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return make


def jsonl(*rows: dict[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_azure_2023_and_2024_times_count_from_the_first_request(made: Callable[..., Path]) -> None:
    workload = load(made(AZURE))
    assert workload.arrival_s.tolist() == pytest.approx([0, 4.314579], abs=1e-6)
    assert (workload.prompt_tokens.tolist(), workload.output_tokens.tolist()) == ([374, 396], [44, 109])
    assert (workload.arrival_s.dtype, workload.prompt_tokens.dtype, workload.hashes) == (np.float64, np.int32, None)
    later = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.5+00:00,1,2\n2024-05-11 00:00:00.009930+00:00,3,4\n"
    assert load(made(later)).arrival_s.tolist() == pytest.approx([0, 0.50993], abs=1e-6)


def test_only_full_units_of_a_mooncake_prompt_count(made: Callable[..., Path]) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1025, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 27482, "input_length": 1024, "output_length": 6, "hash_ids": [0, 3]},
        {"timestamp": 30535, "input_length": 511, "output_length": 6, "hash_ids": [0]},
    ]
    workload = load(made(jsonl(*rows), "mooncake.jsonl"))
    assert workload.hashes is not None
    assert list(workload.hashes) == [(0, 1), (0, 3), ()]
    assert workload.hash_tokens == 512
    assert workload.arrival_s.tolist() == pytest.approx([0, 27.482, 30.535]), "these times are in no steps, and stay"


def published(steps: int = 60, *, every_ms: int = 3000, length: int = 600, ids: int = 2, per_step: tuple[int, ...] = (14, 9, 21)) -> str:
    """Rows as Mooncake publishes them: so many in each step of 3 s, some written down a millisecond early."""
    stamps = [max(0, step * every_ms - step % 2) for step in range(steps) for _ in range(per_step[step % len(per_step)])]
    return jsonl(
        *(
            {"timestamp": t, "input_length": length, "output_length": 9, "hash_ids": [*range(ids * i, ids * (i + 1))]}
            for i, t in enumerate(stamps)
        )
    )


def test_the_arrivals_of_mooncakes_own_traces_are_spread_inside_their_steps_alike_each_time(made: Callable[..., Path]) -> None:
    path = made(published(), "m.jsonl")
    workload = load(path)
    times = workload.arrival_s
    assert times[0] == 0
    assert np.all(np.diff(times) > 0)
    assert "arrivals are spread within the steps" in workload.notes[0]
    # The origin is the first request's unknown place in its step: one that puts the groups inside their steps has to exist.
    earliest = max(0, 3 - times[14], 6 - times[23])
    latest = min(3 - times[13], 6 - times[22], 9 - times[43])
    assert earliest <= latest
    assert np.array_equal(times, load(path).arrival_s)
    head = load(path, requests=50)
    assert len(head) == 50
    assert np.array_equal(head.arrival_s, times[:50])
    assert list(head.hashes or ()) == list(workload.hashes or ())[:50]


@pytest.mark.parametrize(
    "text",
    [
        published(1, per_step=(800,)),  # one burst
        published(60, every_ms=30_000),  # a burst every 30 s
        published(60, per_step=(10,)),  # as many every time
        published(600, per_step=(1,)),  # one every 3 s
        published(12),  # too few to tell
        published(ids=1),  # whole units only
        published().replace('"timestamp": 6000,', '"timestamp": 6100,'),
        published().replace('"hash_ids": [0, 1]', '"hash_ids": null'),
        published().replace('"timestamp": 0', '"session_id": "a", "timestamp": 0'),
    ],
    ids=["burst", "bursts", "regular", "single", "few", "other ids", "off the steps", "no ids", "sessions"],
)
def test_other_files_of_mooncakes_form_keep_their_times(made: Callable[..., Path], text: str) -> None:
    stamps = np.array([json.loads(line)["timestamp"] for line in text.splitlines()]) / 1e3
    workload = load(made(text, "mine.jsonl"))
    assert np.array_equal(workload.arrival_s, stamps - stamps[0])
    assert not workload.notes


def test_burstgpt_rows_without_a_response_are_dropped_and_counted(made: Callable[..., Path]) -> None:
    old = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n"
        "118,GPT-4,417,276,693,Conversation log\n"
    )
    workload = load(made(old))
    assert workload.arrival_s.tolist() == [0, 113]
    assert (workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), workload.dropped) == ([472, 417], [18, 276], 1)
    assert "1 of 3 rows dropped" in workload.notes[0]
    new = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n1.5,a,2.0,GPT-4,10,20,30,API log\n"
    assert load(made(new)).prompt_tokens.tolist() == [10]


def test_bailian_units_are_of_16_tokens(made: Callable[..., Path]) -> None:
    turn = {"type": "text", "turn": 1, "parent_chat_id": -1}
    rows = [
        {"chat_id": 159, "timestamp": 61.114, "input_length": 40, "output_length": 5, "hash_ids": [1, 2, 3], **turn},
        {"chat_id": 160, "timestamp": 62.0, "input_length": 32, "output_length": 5, "hash_ids": [1, 4], **turn, "parent_chat_id": 159},
    ]
    workload = load(made(jsonl(*rows), "bailian.jsonl"))
    assert workload.hashes is not None
    assert (list(workload.hashes), workload.hash_tokens) == ([(1, 2), (1, 4)], 16)
    assert workload.arrival_s.tolist() == pytest.approx([0, 0.886])


def test_generic_columns_may_come_in_any_order_and_be_left_empty(made: Callable[..., Path]) -> None:
    head = "# hash_tokens: 32\n# made by hand\nn,output_tokens,prompt_tokens,arrival_s,after,ttft_slo_s,hash_ids\n"
    text = head + "2,5,70,0.5,,1.5,7 8\n,6,80,3,0,,\n"
    workload = load(made(text))
    assert workload.n is not None
    assert workload.after is not None
    assert workload.ttft_slo_s is not None
    assert workload.hashes is not None
    assert (workload.n.tolist(), workload.after.tolist(), list(workload.hashes)) == ([2, 1], [-1, 0], [(7, 8), ()])
    assert (workload.hash_tokens, workload.priority, workload.arrival_s.tolist()) == (32, None, [0.5, 3])
    assert workload.ttft_slo_s[0] == 1.5
    assert np.isnan(workload.ttft_slo_s[1])


def test_a_column_can_say_hash_tokens_and_jsonl_needs_no_head(made: Callable[..., Path]) -> None:
    row = {"arrival_s": 0, "prompt_tokens": 64, "output_tokens": 1, "hash_ids": [9], "hash_tokens": 64}
    assert load(made(jsonl(row), "t.jsonl")).hash_tokens == 64
    assert load(made("arrival_s,prompt_tokens,output_tokens,hash_ids,hash_tokens\n0,64,1,9,64\n")).hash_tokens == 64


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.compress, lambda raw: zstandard.compress(raw[:60]) + zstandard.compress(raw[60:])]
)
def test_compression_is_told_by_the_bytes_not_the_name(made: Callable[..., Path], pack: Callable[[bytes], bytes]) -> None:
    assert load(made(pack(AZURE.encode()))).prompt_tokens.tolist() == [374, 396]


def test_reading_stops_at_the_requests_asked_for(made: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    path = made(AZURE + "2023-11-16 18:15:51.0,5,5\n" * 20_000 + "broken")
    assert len(load(path, requests=2, progress=lambda read, total: seen.append((read, total)))) == 2
    assert seen[-1][0] < seen[-1][1] == path.stat().st_size, "the rest of the file was not read"
    row = '{"ts": 0, "input_length": 9, "output_length": 5}\n'
    assert len(load(made(row * 2 + "broken", "t.jsonl"), requests=2)) == 2
    workload = load(made(AZURE), requests=5)
    assert "5 requests were asked for, trace.csv has 2" in workload.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("\n# only a comment\n", "empty"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        ("a,b\n1,2\n", "line 1: no known format has the columns a, b"),
        ("arrival_s,promt_tokens,output_tokens\n0,1,1\n", "line 1, column prompt_tokens: is missing; nearest: promt_tokens"),
        ("arrival_s,prompt_tokens,output_tokens,n,n\n0,1,1,1,1\n", "line 1, column n: is there twice"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,12,x7\n",
            "line 2, column GeneratedTokens: 'x7' is not a whole number",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,12,7\n", "line 2, column TIMESTAMP: 'yesterday' is not a time such as 2023"),
        (AZURE + "2023-11-16 18:15:46.0,5,5\n", "line 4, column TIMESTAMP: 4.99517 s before the row above; sort"),
        (AZURE + "2023-11-16 18:15:56.0,-5,5\n", "line 4, column ContextTokens: -5 tokens; must be at least 0"),
        (AZURE + "2023-11-16 18:15:56.0,5,9999999999\n", "line 4, column GeneratedTokens: 9999999999 tokens; must be at most"),
        (AZURE + "2023-11-16 18:15:56.0,5\n", "line 4: 2 columns where the header has 3"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,12,0\n", "no requests in it; all 1 rows"),
        (GENERIC + "2,0,1\n", "line 4, column prompt_tokens: 0 tokens; must be at least 1"),
        (GENERIC + "2,1.5,1\n", "line 4, column prompt_tokens: '1.5' is not a whole number"),
        (GENERIC + "nan,1,1\n", "line 4, column arrival_s: nan is not a time"),
        (GENERIC.replace("0.0", "-1"), "line 2, column arrival_s: -1 s is negative"),
        (GENERIC + '3,"1,1\n', "line 4: unexpected end of data"),
        ("arrival_s,prompt_tokens,output_tokens,n\n0,1,1,0\n", "line 2, column n: 0 is not between 1 and 32767"),
        ("arrival_s,prompt_tokens,output_tokens,n\n0,1,1,two\n", "line 2, column n: 'two' is not a whole number"),
        ("arrival_s,prompt_tokens,output_tokens,hash_ids\n0,1,1,3 x\n", "line 2, column hash_ids: '3 x' is not whole numbers"),
        ("arrival_s,prompt_tokens,output_tokens,after\n0,1,1,0\n", "line 2, column after: 0 is not an earlier row"),
        ("# hash_tokens: 0\n" + GENERIC, "column hash_tokens: 0 is not a whole number of at least 1"),
        ("arrival_s,prompt_tokens,output_tokens,hash_tokens\n0,1,1,16\n0,1,1,32\n", "line 3, column hash_tokens: 32, but 16 above"),
    ],
)
def test_a_broken_csv_gets_one_line_that_says_where(made: Callable[..., Path], text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(made(text))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert "trace.csv" in str(caught.value)


MOONCAKE = '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [0]}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{broken", "line 1, column 2: not JSON"),
        ('{"a": 1}', "line 1: no known format has the columns a"),
        ("[1, 2]\n", "line 1: not a JSON object"),
        (
            MOONCAKE + '{"timestamp": 0, "input_length": "9", "output_length": 5}',
            "line 2, column input_length: must be a whole number, not text",
        ),
        (MOONCAKE + '{"timestamp": 0, "input_len": 9, "output_length": 5}', "line 2, column input_length: is missing; nearest: input_len"),
        (MOONCAKE + MOONCAKE[:30], "line 2, column 31: not JSON: the line ends early"),
        (MOONCAKE + '{"timestamp": 0, ]', "line 2, column 18: not JSON"),
        (
            MOONCAKE + '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [1, "a"]}',
            "line 2, column hash_ids: must be a whole",
        ),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "n": 1.5}', "line 1, column n: must be a whole number"),
        ('{"workload": {"concurency": 3}}\n', "line 1, column concurency: unknown key"),
    ],
)
def test_a_broken_jsonl_gets_one_line_that_says_where(made: Callable[..., Path], text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(made(text, "trace.jsonl"))
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_truncated_or_damaged_stream_is_a_mistake_not_a_shorter_trace(made: Callable[..., Path], pack: Callable[[bytes], bytes]) -> None:
    rng = np.random.default_rng(1)
    rows = "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(rng.integers(1, 10_000, (50_000, 2))))
    packed = pack(("arrival_s,prompt_tokens,output_tokens\n" + rows).encode())
    with pytest.raises(UsageError, match="truncated"):
        load(made(packed[: len(packed) * 2 // 3]))
    with pytest.raises(UsageError, match=r"trace\.csv"):
        load(made(packed[:4] + b"\xff" * 50))


def test_files_that_are_no_traces_at_all(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.csv: No such file"):
        load(tmp_path / "gone.csv")
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load(made(b"\xfa\xfe\x00binary"))
    with pytest.raises(UsageError, match="format 'azur' is not one of auto, azure"):
        load(made(AZURE), format="azur")
    with pytest.raises(UsageError, match="not JSON, which the format mooncake is"):
        load(made(AZURE), format="mooncake")
    with pytest.raises(UsageError, match="requests 0"):
        load(made(AZURE), requests=0)


def test_every_published_trace_that_is_here_loads() -> None:
    if not TRACES.exists():
        pytest.skip(f"{TRACES} is absent")
    counts = {"azure2023_conv.csv.zst": 19_366, "azure2023_code.csv.zst": 8_819, "mooncake_conversation_trace.jsonl.zst": 12_031}
    assert {name: len(load(TRACES / name)) for name in counts} == counts
