"""Turns with a delay wait for the answer before, in both worlds; others come at their times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate
from pdlab.workload.base import Workload
from pdlab.workload.readers import load
from pdlab.workload.spec import WorkloadSpec, build

Entry = dict[str, object]


def turn(session: object = None, **more: object) -> Entry:
    return {**({} if session is None else {"session_id": session}), "input_length": 1000, "output_length": 10, **more}


@pytest.fixture
def trace(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: Entry) -> Path:
        path = tmp_path / "turns.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    return write


def read(path: Path) -> tuple[list[float], list[int]]:
    workload = load(path)
    return workload.arrival_s.round(9).tolist(), [] if workload.after is None else workload.after.tolist()


def test_interleaved_sessions_each_wait_for_themselves(trace: Callable[..., Path]) -> None:
    path = trace(
        turn("a", timestamp=1000),
        turn("b", timestamp=1500),
        turn("a", delay=200),
        turn(timestamp=1600),
        turn("b", delay=0),
        turn("a", delay=300, timestamp=9),  # recorded times of later turns say nothing
        turn("b", timestamp=4000),  # but where there is no delay
    )
    assert read(path) == ([0.0, 0.5, 0.2, 0.6, 0.0, 0.3, 3.0], [-1, -1, 0, -1, 1, 2, -1])


def test_sessions_may_stand_one_after_another(trace: Callable[..., Path]) -> None:
    path = trace(turn("a", timestamp=5000), turn("a", delay=1), turn("b", timestamp=2000), turn("b", delay=2), turn("b", delay=3))
    assert read(path) == ([0.0, 0.002, 0.003, 3.0, 0.001], [-1, 0, 1, -1, 3])


def test_a_turn_that_failed_passes_its_delay_on(trace: Callable[..., Path]) -> None:
    path = trace(
        turn("a", timestamp=0),
        turn("b", timestamp=1000, output_length=0),
        turn("a", delay=500, output_length=0),
        turn("a", delay=700),
        turn("b", delay=2000),
    )
    assert read(path) == ([0.0, 1.2, 3.0], [-1, 0, -1])


def test_delays_of_a_table_are_in_the_unit_that_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ts,session id,delay_ms,input_tokens,output_tokens\n2024-05-10T00:00Z,a,,100,20\n,a,1500,200,30\n")
    assert read(tmp_path / "t.csv") == ([0.0, 1.5], [-1, 0])


@pytest.mark.parametrize("delay", ["delay", "delay_ms", "Think Time (ms)"])
@pytest.mark.parametrize("session", ["session_id", "conversation_id", "Session"])
def test_sessions_and_delays_have_names_that_everybody_uses(trace: Callable[..., Path], session: str, delay: str) -> None:
    for time in ("timestamp", "arrival_ms"):
        path = trace({**turn(hash_ids=[1, 2]), time: 0, session: "a"}, turn(**{time: 5}), {**turn(), session: "a", delay: 250})
        assert read(path) == ([0.0, 0.005, 0.25], [-1, -1, 0])
    (path.parent / "t.csv").write_text(f"{session};timestamp;{delay};input_length;output_length;hash_ids\na;0;;9;9;\na;;250;9;9;\n")
    assert read(path.parent / "t.csv") == ([0.0, 0.25], [-1, 0])


def test_pdlabs_own_files_may_have_sessions_with_delays(tmp_path: Path) -> None:
    lines = "# hash_tokens: 32\narrival_s,session_id,delay_s,prompt_tokens,output_tokens,n\n1,a,,100,20,2\n1.5,b,,9,9,\n,a,2.5,200,30,\n"
    (tmp_path / "own.csv").write_text(lines)
    assert read(tmp_path / "own.csv") == ([1.0, 1.5, 2.5], [-1, -1, 0])
    first = '{"arrival_s": 1, "session_id": 7, "prompt_tokens": 100, "output_tokens": 20}\n'
    (tmp_path / "own.jsonl").write_text(first + '{"session_id": 7, "delay_s": 2.5, "prompt_tokens": 200, "output_tokens": 30}\n')
    assert read(tmp_path / "own.jsonl") == ([1.0, 2.5], [-1, 0])


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([turn("a", delay=5)], "line 1, column timestamp: is missing; a first turn needs a time"),
        ([turn("a", timestamp=0), turn("a")], "line 2, column timestamp: is missing; a turn needs a time or a delay"),
        ([turn("a", timestamp=0), turn(delay=5)], "line 2, column session_id: a delay, but no session whose answer"),
        ([turn("a", timestamp=0), turn("a", delay=-5)], "line 2, column delay: -0.005 s is not a delay"),
        ([turn("a", timestamp=0), turn("a", delay="5")], "line 2, column delay: must be a number, not text"),
    ],
)
def test_what_is_no_turn_is_named(trace: Callable[..., Path], entries: list[Entry], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(trace(*entries))
    assert said in str(caught.value)


def drawn(path: Path, **keys: Any) -> Workload:
    return build(WorkloadSpec.model_validate({"source": path.name, **keys}), 1, path.parent)


def test_sessions_without_times_get_starts_and_keep_their_delays(trace: Callable[..., Path]) -> None:
    path = trace(*(turn(session, **({"delay": 10 * n} if n else {})) for session in range(200) for n in range(3)))
    workload = drawn(path, arrival="poisson", rate=6.0)
    assert workload.after is not None
    assert workload.after[:6].tolist() == [-1, 0, 1, -1, 3, 4]
    assert workload.arrival_s[:3].tolist() == [0.0, 0.01, 0.02]
    assert len(workload) / workload.opening_s[-1] == pytest.approx(6.0, rel=0.2)
    closed = drawn(path, arrival={"process": "closed", "concurrency": 3})
    assert (closed.after, closed.concurrency) == (None, 3)
    assert "delays are not kept" in closed.notes[-1]


def test_in_the_simulator_a_turn_comes_so_long_after_the_answer_before(trace: Callable[..., Path]) -> None:
    path = trace(
        turn("a", timestamp=0, hash_ids=[1, 2]), turn("b", timestamp=100), turn("a", delay=5000, input_length=1500, hash_ids=[1, 2, 3])
    )
    experiment = Experiment.parse(
        {
            "name": "turns",
            "model": "llama-3.1-8b",
            "base_dir": str(path.parent),
            "workload": {"source": path.name},
            "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "hardware": "h100-sxm"}]},
        }
    )
    result = simulate(experiment)
    rows = result.requests.set_index("request_id")
    assert rows.arrival_s[2] == pytest.approx(rows.finish_s[0] + 5.0)
    assert rows.cached_tokens[2] == 512, "one whole unit of the prompt before"
    assert result.summary["run"]["workload"].endswith("delay (ms) after the answer before, by session_id")
    assert np.array_equal(rows.arrival_s[:2], [0.0, 0.1])
