"""One policy, two worlds: what the live world decides over stand-ins is what the simulated one decides, event for event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab.control import router
from pdlab.experiment.experiment import Experiment
from pdlab.log import Entry, read, replay
from pdlab.sim.build import simulate
from pdlab.types import Action, Dispatch, Handoff, Report, Tick
from pdlab.workload.spec import build
from tests.real.cluster.stand_in import Run, played, small

PUSH = {"mode": "push", "granularity": "request", "reserve": "before_prefill"}
SHAPES = {"1P1D": (1, 1, 0), "2P2D": (2, 2, 0), "mixed": (0, 0, 2), "1P1D1M": (1, 1, 1)}


def live(experiment: Experiment, log_path: Path) -> Run:
    work = build(experiment.workload, experiment.seed, experiment.base_dir)

    async def play(made: Run) -> None:
        sizes = zip(work.arrival_s.tolist(), work.prompt_tokens.tolist(), work.output_tokens.tolist(), strict=True)
        for i, (at_s, prompt, output) in enumerate(sizes):
            hashes = () if work.hashes is None else work.hashes[i][: prompt // work.hash_tokens]
            made.submit_at(at_s, prompt, output, hashes)
        await made.until(lambda: len(made.clients) == len(work))

    made = played(experiment, play, log_path, work.hash_tokens)
    assert all(client.done for client in made.clients.values())
    return made


def decisions(log_path: Path, kinds: tuple[type[Action], ...] = (Dispatch, Handoff)) -> list[tuple[float, Action]]:
    _, entries = read(log_path)
    return [(entry.now, action) for entry in entries for action in entry.actions if isinstance(action, kinds)]


def happenings(log_path: Path) -> list[Entry]:
    _, entries = read(log_path)
    return [entry for entry in entries if not isinstance(entry.event, (Report, Tick))]


@pytest.mark.parametrize("transfer", [{}, {"first_token": "decode"}, PUSH], ids=["pull", "pull, first token from decode", "push"])
@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_live_world_decides_as_the_simulated_one(shape: str, policy: str, transfer: dict[str, Any], tmp_path: Path) -> None:
    prefill, decode, mixed = SHAPES[shape]
    experiment = small(policy, prefill=prefill, decode=decode, mixed=mixed, transfer=transfer)
    simulated = simulate(experiment, trace_events=tmp_path / "sim")
    made = live(experiment, tmp_path / "live")
    ours, theirs = decisions(tmp_path / "live"), decisions(tmp_path / "sim")
    assert [action for _, action in ours] == [action for _, action in theirs]
    np.testing.assert_allclose([at_s for at_s, _ in ours], [at_s for at_s, _ in theirs], rtol=0, atol=1e-6)
    for a, b in zip(happenings(tmp_path / "live"), happenings(tmp_path / "sim"), strict=True):
        assert type(a.event) is type(b.event)
    frame = made.world.lines.book.records.frame().set_index("request_id")
    told = simulated.records.frame().set_index("request_id").loc[frame.index]
    for name in (
        "arrival_s",
        "dispatched_s",
        "prefill_start_s",
        "first_token_s",
        "handoff_s",
        "transfer_start_s",
        "transfer_end_s",
        "finish_s",
    ):
        np.testing.assert_allclose(frame[name], told[name], rtol=0, atol=1e-6, err_msg=name)
    for name in ("prefill_instance", "decode_instance", "status", "output_tokens", "cached_tokens", "attempts", "transfer_bytes"):
        assert frame[name].astype(str).tolist() == told[name].astype(str).tolist(), name


def test_they_decide_alike_where_prompts_share_prefixes(tmp_path: Path) -> None:
    workload = {"source": "mooncake-conversation", "requests": 100, "rate": 3.0}
    experiment = small("prefix_aware", prefill=2, decode=2, workload=workload, engine={"kv_blocks": 30000})
    simulate(experiment, trace_events=tmp_path / "sim")
    made = live(experiment, tmp_path / "live")
    ours, theirs = decisions(tmp_path / "live"), decisions(tmp_path / "sim")
    assert [action for _, action in ours] == [action for _, action in theirs]
    assert made.world.lines.book.records.column("cached_tokens").sum() > 0


def test_equal_runs_write_equal_logs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        live(small("prefix_aware", prefill=2, decode=2, transfer=PUSH), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_live_log_replays_to_the_same_actions(tmp_path: Path) -> None:
    experiment = small("prefix_aware", prefill=2, decode=2)
    live(experiment, tmp_path / "log")
    head, entries = read(tmp_path / "log")
    count, differences = replay(entries, router(experiment, hash_tokens=head.hash_tokens))
    assert count > 400
    assert not differences
