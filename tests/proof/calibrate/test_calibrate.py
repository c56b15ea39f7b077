"""The command on a tiny random model: an engine in this process, our server over HTTP, and KV between two processes."""

from __future__ import annotations

import asyncio
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pdlab import cost
from pdlab.cli.calibrate import calibrate
from pdlab.core.types import UsageError
from pdlab.cost.profile import BesideSeen, Interference, Point, load_instance_profile
from pdlab.proof.calibrate import grid, run, transfer
from pdlab.proof.calibrate.bench import PASSES, WARM, Bench
from pdlab.proof.calibrate.neighbour import neighbours
from pdlab.proof.calibrate.stream import MeasuredServer
from pdlab.real.engine.load import load
from pdlab.real.engine.options import EngineOptions
from tests.support import served

SMALL = ("--max-seqs", "8", "--max-model-len", "256")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(folder: Path) -> Bench:
    return Bench(load(EngineOptions(model=str(folder), threads=1, max_seqs=8, max_model_len=256, max_batch_tokens=128)))


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(calibrate)
    return made


def test_steps_are_what_the_point_says_and_leave_nothing_behind(bench: Bench) -> None:
    steps = []
    scheduler, next_batch = bench.engine.scheduler, bench.engine.scheduler.next_batch

    class Watched(type(scheduler)):  # type: ignore[misc]
        __slots__ = ()

        def next_batch(self, now: float) -> object:
            batch = next_batch(now)
            assert all((s.computed + t == s.prompt_tokens) is point.ends for s, t in batch.chunks)
            steps.append((sorted((t, s.computed) for s, t in batch.chunks), batch.decodes, batch.context_tokens))
            return batch

    scheduler.__class__ = Watched
    for point in [*grid.knots(bench.bounds), *grid.held_out(bench.bounds)]:
        steps.clear()
        assert bench.seconds(point) > 0
        chunks, decodes, context = steps[-1]
        assert chunks == [(point.tokens, point.cached)] * (point.prompts if point.tokens else 0)
        assert decodes == point.batch
        if point.kind == "decode":
            assert context == point.batch * (point.context - WARM - PASSES // 2)  # of the first step; the middle one has the point's
        elif point.batch:
            assert context == point.batch * point.context
        assert scheduler.idle
        assert scheduler.pool.used == 0
        scheduler.check()


def test_the_first_step_of_a_size_is_told_from_those_that_follow(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []

    def once(point: Point) -> float:
        run.append(point)
        return 1.0 + (0.25 if run.count(point) == 1 and point.tokens else 0.0)

    monkeypatch.setattr(bench, "_once", once)
    assert bench.new_size_s == 0.0
    same = Point(tokens=16, prompts=2), Point(tokens=30, batch=2, context=20)  # as 32 tokens
    for point in (Point(tokens=32), *same, Point(tokens=7), Point(batch=4, context=16), Point(tokens=32)):
        assert bench.seconds(point) == (1.25 if point in same else 1.0)
    assert run.count(Point(tokens=32)) == 3
    assert run.count(Point(batch=4, context=16)) == 1
    assert bench.new_size_s == pytest.approx(0.25)


def test_a_profile_of_an_engine_can_be_simulated_with(
    app: typer.Typer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Interference(prefill_beside_decode_s=0.002)
    seen = [BesideSeen(load="decode", few_tokens=48, many_tokens=192, few_s=0.002, many_s=0.002, decode_s=-0.001)]

    async def beside(one: MeasuredServer, other: MeasuredServer, *how: Any, **host: object) -> list[BesideSeen]:
        """Measured; but of a tiny model it is noise (see test_neighbour.py), so that another result is told."""
        assert one.url != other.url
        assert {s.load for s in await neighbours(one, other, *how)} == {"prefill", "decode"}
        return seen

    monkeypatch.setattr(run, "neighbours", beside)
    out = tmp_path / "profile.json"
    arguments = ["--model", str(folder), "--out", str(out), "--threads", "1", "--clock", "cpu", "--seconds", "3", *SMALL]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for said in ("prefill", "cached", "prompts", "decode", "mixed", "ms a request", "transfers by shm"):
        assert said in result.output
    assert list(tmp_path.iterdir()) == [out]
    profile = load_instance_profile(out)
    assert profile.machine.threads == 1
    assert profile.model.fingerprint
    assert 0 <= profile.overheads.request_s < math.inf  # of a tiny model, noise; see test_over_http.py
    if len(os.sched_getaffinity(0)) > 1:
        assert profile.beside == told
        assert "beside another engine" in result.output
    assert {m.point.kind for m in profile.points if m.point.held_out} == {e.kind for e in profile.errors}
    tiny, chip = cost.model(str(folder)), cost.hardware(str(out))
    made = cost.build(cost.CostSpec(), tiny, chip)
    assert made.decode_s(1, 100) > 0 and made.mixed_s([(64, 0)], 4, 400) > 0
    assert cost.kv_capacity_tokens(tiny, chip) == profile.engine.kv_blocks * 16


def test_a_server_is_measured_over_http(app: typer.Typer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    with served.server(folder, *SMALL) as (url, _):
        arguments = ["--url", f"{url}/v1", "--model", str(folder), "--out", str(out), "--seconds", "4", *SMALL]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    profile = load_instance_profile(out)
    assert profile.steps.additive
    assert profile.engine.kv_blocks > 0
    assert any("cannot be seen over HTTP" in line for line in profile.warnings)
    assert {m.point.kind for m in profile.points} == {"prefill", "cached", "decode"}
    first = next(m for m in profile.points if m.point == Point(batch=1, context=16))
    assert 0 <= statistics.median(first.seconds) < math.inf


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfers_between_two_processes_give_a_line(transport: str) -> None:
    kv = transfer.memory(3, 2, 16, 16, dtype="float32", transport=transport)
    setup_s, moved = asyncio.run(transfer.measure(kv, repeats=3))
    assert moved.transport == transport
    assert 0 <= setup_s < 60
    assert moved.bytes_per_s > 1e3
    assert [m.bytes for m in moved.moved] == [n * kv.block_bytes for n in kv.sizes()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "profile.txt"], "must end in .json"),
        (["--out", "nowhere/profile.json"], "give a file in a folder that exists"),
        (["--clock", "sun"], "is not one of wall, cpu"),
        (["--clock", "cpu", "--threads", "2"], "--clock cpu is for --device cpu --threads 1"),
        (["--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: "),
        (["--threads", "1", "--max-model-len", "64", "--no-http"], "too small to calibrate"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    app: typer.Typer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        CliRunner().invoke(app, ["--model", str(folder), *arguments], catch_exceptions=False)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_calibration_writes_nothing(app: typer.Typer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.rounds, "measure", interrupted)
    CliRunner().invoke(app, ["--model", str(folder), "--out", str(tmp_path / "profile.json"), "--threads", "1", "--no-http"])
    assert not list(tmp_path.iterdir())
