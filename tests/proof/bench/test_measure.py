"""`measure` against servers: the project's own app over a stand-in engine, and one at the wire that does as it is told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from pdlab.cli import bench as cli
from pdlab.cli.main import main
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.proof.bench import run as bench_run
from pdlab.proof.bench.poll import poll
from pdlab.proof.bench.run import Target, measure
from pdlab.report.result import Result
from pdlab.results.records import Samples
from pdlab.sim import simulate
from pdlab.workload.base import Workload
from pdlab.workload.spec import WorkloadSpec, build
from tests.proof.bench.wire import CUT, HANG, Body, Reply, Wire, event, refusal, tokens, wired
from tests.support.api_world import served
from tests.support.echo_engine import EchoEngine, byte_tokenizer

SOON_S = 5.0  # where arrivals wait for the answers before them, the last ones come 10 s late
WORKLOAD = {"source": "synthetic", "requests": 12, "rate": 200, "prompt": 24, "output": 5, "hash_tokens": 4}


def experiment(workload: dict[str, Any] | None = None, **more: Any) -> Experiment:
    return Experiment.parse(
        {
            "name": "tiny",
            "model": "llama-3.1-8b",
            "workload": {**WORKLOAD, **(workload or {})},
            "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]},
            "engine": {"block_tokens": 4},
            **more,
        }
    )


def bodies(wire: Wire) -> list[Body]:
    return [body for _, body in wire.asked]


def reasons(result: Result) -> dict[str, int]:
    found: dict[str, int] = result.summary["reasons"]
    return found


def test_a_file_that_says_nothing_of_hardware_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "served.yaml"
    file.write_text(yaml.safe_dump({"model": "llama-3.1-8b", "workload": WORKLOAD, "cluster": {"instances": [{"role": "mixed"}]}}))
    with served(byte_tokenizer(tmp_path)) as world, pytest.raises(SystemExit, match="0"):
        main(["bench", str(file), "--url", world.url, "--out", str(tmp_path / "out"), "--json", "--set", "workload.requests=3"])
    assert json.loads(capsys.readouterr().out)["completed"] == 3
    assert Result.load(tmp_path / "out").experiment["workload"]["requests"] == 3
    for command in (["sim"], ["bench", "--set", "workload.sourc=x"]):
        with pytest.raises(SystemExit, match="2"):
            main([command[0], str(file), *command[1:]])
    assert "cluster.instances.0.hardware: is missing" in (said := capsys.readouterr().err)
    assert "workload.sourc" in said


# ------------------------------------------------------------ what is measured


def test_figures_are_those_of_vllms_definitions_on_the_same_log(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    with served(byte_tokenizer(tmp_path), engine=EchoEngine(step_s=0.002)) as world:
        result = measure(experiment({"requests": 40, "output": {"uniform": [1, 12]}}), Target(world.url, raw=raw))
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    ttft, tpot, itl, e2e, total = [], [], [], [], 0
    for line in lines:  # vllm/benchmarks: endpoint_request_func.py and serve.py
        times = [when for when, _, _ in line["chunks"]]
        tokens_out = sum(count for _, _, count in line["chunks"])
        ttft.append(times[0] - line["sent_s"])
        e2e.append(times[-1] - line["sent_s"])
        itl += np.diff(times).tolist()
        total += tokens_out
        if tokens_out > 1:
            tpot.append((e2e[-1] - ttft[-1]) / (tokens_out - 1))
    summary = result.summary
    assert summary["completed"] == len(lines) == 40 and summary["output_tokens"] == total
    for key, values in (("ttft_s", ttft), ("tpot_s", tpot), ("e2e_s", e2e)):
        assert summary[key]["mean"] == pytest.approx(np.mean(values))
        for point in (50, 90, 99):
            assert summary[key][f"p{point}"] == pytest.approx(np.percentile(values, point)), key
    assert summary["itl_s"]["mean"] == pytest.approx(np.mean(itl)) and summary["itl_s"]["max"] == pytest.approx(max(itl))
    assert result.gaps.count == len(itl)
    served_rps = summary["window"]["served_rps"]
    assert served_rps == pytest.approx(39 / (result.requests.arrival_s.max() - result.requests.arrival_s.min()))
    assert summary["throughput_rps"] == pytest.approx(served_rps)
    assert summary["output_tokens_per_s"] == pytest.approx(total / 40 * served_rps)


def test_the_server_is_sent_what_the_simulator_is(tmp_path: Path) -> None:
    made = experiment({"prompt": {"uniform": [8, 60]}, "output": {"uniform": [2, 9]}})
    simulated = simulate(made).requests.sort_values("request_id")
    with served(byte_tokenizer(tmp_path)) as world:
        measured = measure(made, Target(world.url)).requests.sort_values("request_id")
        submits = {len(submit.tokens) for submit in world.engine.submitted}
    for column in ("request_id", "prompt_tokens", "output_tokens", "priority", "n", "status"):
        assert measured[column].tolist() == simulated[column].tolist(), column
    assert submits - {2} == set(simulated.prompt_tokens)
    late_s = measured.arrival_s.to_numpy() - simulated.arrival_s.to_numpy()
    assert (late_s >= 0.0).all()


def test_results_are_saved_and_loaded_like_a_simulations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polled: list[Samples] = []

    def polling(client: Any, samples: Samples, *how: Any) -> Any:
        polled.append(samples)
        engine.paused = True
        return poll(client, samples, *how)

    def go_on(*_: Any) -> None:  # once there is a sample of the server's load
        engine.paused = not len(polled[0])

    monkeypatch.setattr(bench_run, "poll", polling)
    engine = EchoEngine(step_s=0.001)
    with served(byte_tokenizer(tmp_path), engine=engine) as world:
        result = measure(experiment(), Target(world.url), progress=go_on)
    result.save(tmp_path / "out")
    again = Result.load(tmp_path / "out")
    assert again.summary == result.summary
    run, client = again.summary["run"], again.summary["client"]
    assert (run["world"], run["url"], run["model"], run["policy"]) == ("real", world.url, "tiny", "least_loaded")
    assert run["server_version"] and again.summary["instances"] == [] and again.summary["bottleneck"]["resource"] == "unknown"
    assert client["send_late_s"]["p99"] > 0 and client["cpu_s"] > 0 and client["tokens_per_chunk"] == 1.0
    assert set(again.timeline["instance"]) == {"server"} and (again.timeline["kv_blocks"] == 10_000).all()
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_arrivals_keep_their_schedule(tmp_path: Path) -> None:
    made = experiment({"requests": 40, "rate": 20})
    due_s = build(made.workload, made.seed, Path()).arrival_s
    with wired(lambda body: tokens(body, gap_s=0.05)) as wire:
        rows = measure(made, Target(wire.url)).requests.sort_values("request_id")
    late_s = rows.arrival_s.to_numpy() - due_s
    assert late_s.min() >= 0.0 and late_s[-10:].min() < SOON_S  # lateness does not add up
    came_s = np.array([when for when, _ in wire.asked])
    assert (came_s[-10:] - came_s[0] - due_s[-10:] + due_s[0]).min() < SOON_S


def test_a_closed_loop_has_no_more_in_flight_than_its_concurrency() -> None:
    made = experiment({"rate": None, "requests": 10, "arrival": {"process": "closed", "concurrency": 3}})
    with wired(lambda body: tokens(body, gap_s=0.03)) as wire:
        result = measure(made, Target(wire.url))
    assert result.summary["completed"] == 10 and wire.most_open == 3 and result.summary["client"]["connections"] <= 4


def test_turns_follow_the_answer_they_wait_for_and_repeat_it() -> None:
    sessions = {"turns": 3, "fixed_turns": True, "think_s": 0.01, "system_prompt_tokens": 8}
    made = experiment({"requests": 3, "sessions": sessions, "prompt": 10, "output": 6})
    workload = build(made.workload, made.seed, Path())
    assert workload.after is not None
    with wired(lambda body: tokens(body, gap_s=0.001)) as wire:
        rows = measure(made, Target(wire.url)).requests.set_index("request_id")
    by_length = {len(body["prompt"]): body["prompt"] for body in bodies(wire)}
    for turn, earlier in enumerate(workload.after):
        if earlier >= 0:
            assert rows.arrival_s[turn] >= rows.finish_s[earlier] + workload.arrival_s[turn]
    first, second = by_length[18], by_length[34]
    whole = (18 + 6) // 4 * 4
    assert second[:whole] == [*first, *[7] * 6][:whole]
    assert first[:8] == second[:8]


def test_a_traces_turns_come_their_delay_after_the_answer_before(tmp_path: Path) -> None:
    lines = [
        '{"session_id": "a", "timestamp": 0, "input_length": 8, "output_length": 5, "hash_ids": [1, 2]}',
        '{"session_id": "a", "delay": 40, "input_length": 12, "output_length": 5, "hash_ids": [1, 2, 3]}',
        '{"session_id": "a", "delay": 20, "input_length": 16, "output_length": 5, "hash_ids": [1, 2, 3, 4]}',
    ]
    (tmp_path / "turns.jsonl").write_text("\n".join(lines))
    made = experiment().model_copy(update={"base_dir": tmp_path, "workload": WorkloadSpec(source="turns.jsonl", hash_tokens=4)})
    with wired(lambda body: tokens(body, gap_s=0.001)) as wire:
        result = measure(made, Target(wire.url))
    rows = result.requests.set_index("request_id")
    assert rows.arrival_s[1] >= rows.finish_s[0] + 0.04
    assert rows.arrival_s[2] >= rows.finish_s[1] + 0.02
    first, second, third = (body["prompt"] for body in bodies(wire))
    assert second[:8] == first and third[:12] == second
    assert result.summary["run"]["workload"].endswith("delay (ms) after the answer before, by session_id")


def test_candidates_priorities_and_objectives_are_sent() -> None:
    labels = {"priorities": {3: 1.0}, "ttft_slo_s": 0.5, "tpot_slo_s": 0.02, "n": 1, "best_of": 2}

    def both(body: Body) -> Reply:
        parts = [
            event({"choices": [{"index": i, "text": "x", "finish_reason": "length" if k + 1 == body["max_tokens"] else None}]})
            for k in range(body["max_tokens"])
            for i in range(body.get("n", 1))
        ]
        return Reply(parts)

    with wired(both) as wire:
        result = measure(experiment(labels), Target(wire.url))
    sent = bodies(wire)[0]
    assert (sent["n"], sent["priority"], sent["ttft_slo_ms"], sent["tpot_slo_ms"]) == (2, 3, 500.0, 20.0)
    assert (sent["max_tokens"], sent["min_tokens"], sent["ignore_eos"], sent["temperature"]) == (5, 5, True, 0.0)
    assert (result.requests.output_tokens == 10).all() and (result.requests.n == 2).all()
    assert any("best_of" in line for line in result.summary["warnings"])


# ------------------------------------------------------------ what the server tells


def test_timelines_fill_the_columns_on_the_clients_clock() -> None:
    told = {
        "timeline": {
            "arrival_s": 1000.0,
            "dispatched_s": 1000.001,
            "prefill_start_s": 1000.002,
            "handoff_s": 1000.003,
            "transfer_start_s": 1000.003,
            "transfer_end_s": 1000.004,
            "decode_start_s": 1000.004,
            "prefill_instance": "prefill-0",
            "decode_instance": "decode-0",
            "transfer_bytes": 4096,
            "attempts": 2,
            "cached_tokens": 8,
            "reason": None,
        }
    }
    with wired(lambda body: tokens(body, told, gap_s=0.002)) as wire:
        result = measure(experiment(), Target(wire.url))
    rows, summary = result.requests, result.summary
    assert np.allclose(rows.queue_s, 0.002) and np.allclose(rows.transfer_s, 0.001)
    assert np.allclose(rows.dispatched_s - rows.arrival_s, 0.001)
    assert set(rows.prefill_instance) == {"prefill-0"} and set(rows.decode_instance) == {"decode-0"}
    assert (rows.transfer_bytes == 4096).all() and (rows.attempts == 2).all() and (rows.cached_tokens == 8).all()
    uses = {use["name"]: use for use in summary["instances"]}
    assert uses["prefill-0"]["role"] == "prefill" and uses["prefill-0"]["requests"] == 12
    assert uses["decode-0"]["decode_tokens"] == 48 and 0 < uses["decode-0"]["busy_fraction"] <= 1
    assert uses["decode-0"]["kv_use_peak"] is None and summary["links"] == [] and summary["run"]["timelines"] == 12


def test_without_timelines_nothing_is_invented() -> None:
    with wired(tokens) as wire:
        result = measure(experiment(), Target(wire.url))
    assert result.requests[["dispatched_s", "prefill_start_s", "transfer_s", "queue_s"]].isna().all(axis=None)
    assert (result.requests.cached_tokens == 3).all() and len(result.samples) == 0


def test_a_repeat_on_a_warm_cache_is_warned_of_and_another_salt_makes_it_cold(tmp_path: Path) -> None:
    with served(byte_tokenizer(tmp_path)) as world:
        first, again, salted = (measure(experiment(), Target(world.url, salt=salt)) for salt in (0, 0, 1))
    warm = [any("--salt" in line for line in result.summary["warnings"]) for result in (first, again, salted)]
    assert warm == [False, True, False] and salted.summary["run"]["salt"] == 1
    assert first.summary["prefix_hit_rate"] == salted.summary["prefix_hit_rate"] == 0.0 < again.summary["prefix_hit_rate"]


@pytest.mark.parametrize("field", ["return_token_ids", "stream_options"])
def test_a_field_that_is_refused_is_left_out_and_said_so(field: str) -> None:
    def strict(body: Body) -> Reply:
        return refusal(400, f"unknown field {field}") if field in body else tokens(body)

    with wired(strict) as wire:
        result = measure(experiment(), Target(wire.url))
    assert result.summary["completed"] == 12 and not any(field in body for body in bodies(wire)) and len(wire.probes) == 2
    assert [line for line in result.summary["warnings"] if line.startswith(f"the server refuses {field}")]


def test_the_vocabulary_is_learnt_from_the_refusal() -> None:
    def small(body: Body) -> Reply:
        wrong = [t for t in body["prompt"] if t >= 500]
        return refusal(400, f"prompt has token {wrong[0]}, which is not in the vocabulary of 500") if wrong else tokens(body)

    with wired(small) as wire:
        assert measure(experiment(), Target(wire.url)).summary["completed"] == 12
    assert all(max(body["prompt"]) < 500 for body in bodies(wire))


# ------------------------------------------------------------ trouble


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        (refusal(429, "too many"), "rejected", "status 429: too many"),
        (refusal(503, "draining"), "rejected", "status 503: draining"),
        (refusal(400, "too long"), "failed", "status 400: too long"),
        (Reply([event({"choices": [{"text": "x"}]}), CUT]), "failed", "the connection was lost"),
        (Reply([event({"choices": [{"text": "x"}]})]), "failed", "the answer ended early"),
        (Reply([event({"error": {"message": "engine died"}})]), "failed", "engine died"),
        (Reply([event({"choices": [{"text": "x"}]}), HANG]), "expired", "no whole answer within 0.5 s"),
    ],
)
def test_what_goes_wrong_is_recorded_with_its_reason(reply: Reply, status: str, reason: str) -> None:
    alone = status == "expired"  # on a slow machine the others would be, too

    def answer(body: Body) -> Reply:
        return reply if len(body["prompt"]) == 24 and (alone or len(wire.asked) == 2) else tokens(body)

    with wired(answer) as wire:
        made = experiment({"requests": 1 if alone else 3, "rate": 30}, limits={"request_timeout_s": 0.5} if alone else {})
        result = measure(made, Target(wire.url))
    assert result.requests.status.value_counts()[status] == 1
    assert reasons(result) == {reason: 1}
    bad = result.requests[result.requests.status == status].iloc[0]
    assert bad.finish_s > bad.arrival_s and not bad.good


def test_ctrl_c_keeps_what_there_is_and_marks_it_partial() -> None:
    seen = 0

    def answer(body: Body) -> Reply:
        return Reply([event({"choices": [{"text": "x"}]}), HANG]) if len(wire.asked) == 3 else tokens(body)

    def interrupt(_: float, ended: int, all: int) -> None:
        nonlocal seen
        seen += ended == 2 and wire.hanging == 1
        if seen == 2:  # since the first time, what the server had sent has been read
            os.kill(os.getpid(), signal.SIGINT)

    with wired(answer) as wire:
        result = measure(experiment({"requests": 3, "rate": 30}), Target(wire.url), progress=interrupt)
    assert result.summary["partial"] and result.summary["completed"] == 2 and result.summary["unfinished"] == 1
    cut = result.requests[result.requests.status == "decode"].iloc[0]
    assert np.isnan(cut.finish_s) and cut.output_tokens == 1


def test_answers_of_another_length_are_counted() -> None:
    def short(body: Body) -> Reply:
        return tokens({**body, "max_tokens": 2})

    with wired(short) as wire:
        result = measure(experiment(), Target(wire.url))
    assert "12 answers had another length than was asked for" in result.summary["warnings"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: refusal(404, "no such path"), "answered with 404: no such path"),
        (lambda _: refusal(400, "Token id 29999 is out of vocabulary"), "give --vocab"),
    ],
)
def test_a_server_that_cannot_be_measured_is_the_users_affair(answer: Callable[[Body], Reply], message: str) -> None:
    with wired(answer) as wire, pytest.raises(UsageError, match=message):
        measure(experiment(), Target(wire.url))


@pytest.mark.parametrize(("url", "message"), [("http://127.0.0.1:9", "is the server running"), ("ftp://x", "give a server's address")])
def test_an_address_without_a_server_is_said_in_a_line(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        measure(experiment(), Target(url))
    assert "\n" not in str(caught.value)


def test_the_last_event_of_all_is_an_end_where_no_finish_is_told() -> None:
    with wired(lambda body: Reply([event({"choices": [{"text": "x"}]})] * body["max_tokens"] + [b"data:[DONE]\n\n"])) as wire:
        assert measure(experiment(), Target(wire.url)).summary["completed"] == 12


def test_with_several_tokens_a_chunk_tpot_is_per_token_after_the_first_chunk_and_it_is_said(tmp_path: Path) -> None:
    def four_a_chunk(body: Body) -> Reply:
        count = body["max_tokens"]
        sizes = [min(4, count - k) for k in range(0, count, 4)]
        ends = ["length" if k + 1 == len(sizes) else None for k in range(len(sizes))]
        parts = [event({"choices": [{"text": "x" * size, "finish_reason": end}]}) for size, end in zip(sizes, ends, strict=True)]
        return Reply([*parts, event({"choices": [], "usage": {"completion_tokens": count}})], gap_s=0.02)

    with wired(four_a_chunk) as wire:
        result = measure(experiment({"requests": 4, "output": 12}), Target(wire.url))
    rows = result.requests
    assert (rows.output_tokens == 12).all() and (rows.first_tokens == 4).all()
    assert np.allclose(rows.tpot_s, (rows.finish_s - rows.first_token_s) / 8)
    assert result.summary["tpot_s"]["mean"] == pytest.approx(rows.tpot_s.mean())
    (line,) = [line for line in result.summary["warnings"] if "tokens a chunk" in line]
    assert "TPOT" in line and "usage" in line
    result.save(tmp_path / "out")
    again = Result.load(tmp_path / "out").requests
    assert np.allclose(again.tpot_s, rows.tpot_s)


# ------------------------------------------------------------ the command


def test_the_command_writes_its_files_and_states_the_clients_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(experiment().resolved()))
    monkeypatch.setenv("COLUMNS", "160")
    with wired(tokens) as wire:
        cli.bench(file, url=wire.url, out_dir=tmp_path / "out", requests=5)
    said = capsys.readouterr().out
    assert "of a core; sent" in said and "5 of 5" in said
    assert Result.load(tmp_path / "out").summary["requests"] == 5


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_fails_where_nothing_was_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    def answer(body: Body) -> Reply:
        return tokens(body) if len(body["prompt"]) == 2 else refusal(500, "broken here")

    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(experiment().resolved()))
    with wired(answer) as wire, pytest.raises(typer.Exit) as ended:
        cli.bench(file, url=wire.url, out_dir=tmp_path / "out", requests=5, as_json=as_json)
    said = capsys.readouterr()
    assert ended.value.exit_code == 1 and "none of 5 requests completed: status 500: broken here (5)" in " ".join(said.err.split())
    assert Result.load(tmp_path / "out").summary["failed"] == 5  # the files are there all the same
    assert not as_json or json.loads(said.out)["completed"] == 0


def test_the_commands_workload_can_be_given() -> None:
    made = Workload("mine", np.zeros(2), np.array([5, 6], np.int32), np.array([2, 3], np.int32))
    with wired(tokens) as wire:
        result = measure(experiment(), Target(wire.url + "/v1", model="other"), workload=made)
    assert result.summary["output_tokens"] == 5 and {body["model"] for body in bodies(wire)} == {"other"}
