"""Turns of a session contain each other, wait for each other, and share what they have in common."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdlab.workload.base import Workload
from pdlab.workload.spec import WorkloadSpec, build
from pdlab.workload.stats import unit_hits


def made(sessions: dict[str, Any], seed: int = 0, **keys: Any) -> Workload:
    spec = {"source": "synthetic", "rate": 4.0, "requests": 2000, "prompt": {"uniform": [20, 200]}, "output": 50}
    return build(WorkloadSpec.model_validate(spec | {"sessions": sessions} | keys), seed, Path())


def grouped(workload: Workload) -> list[list[int]]:
    """Rows of each session."""
    assert workload.after is not None
    rows: list[list[int]] = []
    for row, earlier in enumerate(workload.after.tolist()):
        if earlier < 0:
            rows.append([])
        else:
            assert rows[-1][-1] == earlier
        rows[-1].append(row)
    return rows


def test_a_turns_prompt_is_all_of_the_last_turn_and_something_new() -> None:
    workload = made({"turns": 4, "system_prompt_tokens": 100})
    assert workload.hashes is not None
    for rows in grouped(workload):
        assert 120 <= workload.prompt_tokens[rows[0]] <= 300
        for earlier, later in pairwise(rows):
            context = int(workload.prompt_tokens[earlier] + workload.output_tokens[earlier])
            assert context + 20 <= workload.prompt_tokens[later] <= context + 200
            assert workload.hashes[later][: context // 16] == workload.hashes[earlier]
    for row in range(len(workload)):
        assert len(workload.hashes[row]) == (workload.prompt_tokens[row] + workload.output_tokens[row]) // 16


def test_every_full_unit_of_an_earlier_turn_is_a_hit() -> None:
    workload = made({"turns": 3, "fixed_turns": True}, requests=600)
    hits = unit_hits(workload)
    for rows in grouped(workload):
        assert hits[rows[0]] == 0
        for earlier, later in pairwise(rows):
            assert hits[later] == (workload.prompt_tokens[earlier] + workload.output_tokens[earlier]) // 16


def test_sessions_of_a_group_share_their_system_prompt_and_no_more() -> None:
    workload = made({"turns": 1, "system_prompt_tokens": 1000, "groups": 3})
    assert workload.hashes is not None
    assert len({chain[:62] for chain in workload.hashes}) == 3
    assert len({chain[62] for chain in workload.hashes}) == len(workload)


def test_rate_counts_requests_and_turns_is_a_mean() -> None:
    workload = made({"turns": 5, "think_s": 7}, requests=20_000)
    sessions = grouped(workload)
    assert workload.rate_rps == pytest.approx(4.0, rel=0.05)
    assert np.mean([len(rows) for rows in sessions]) == pytest.approx(5.0, rel=0.05)
    assert workload.after is not None
    assert workload.arrival_s[workload.after >= 0].mean() == pytest.approx(7.0, rel=0.05)


def test_fixed_turns_are_the_same_for_every_session() -> None:
    assert {len(rows) for rows in grouped(made({"turns": 4, "fixed_turns": True}))} == {4}


def test_no_context_grows_beyond_its_maximum() -> None:
    workload = made({"turns": 50, "max_context_tokens": 1000})
    assert len(workload) == 2000
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 1000


def test_a_cut_output_is_cut_in_the_next_prompt_too() -> None:
    workload = made({"turns": 4, "fixed_turns": True}, prompt=100, output=80, max_output_tokens=30)
    assert workload.prompt_tokens[:4].tolist() == [100, 230, 360, 490]
    assert set(workload.output_tokens.tolist()) == {30}


def test_a_session_ends_before_the_first_prompt_that_is_too_long() -> None:
    workload = made({"turns": 4, "fixed_turns": True}, prompt=100, output=30, max_prompt_tokens=300)
    assert {len(rows) for rows in grouped(workload)} == {2}
    assert workload.dropped == 1000


def test_sessions_that_begin_in_time_are_whole() -> None:
    workload = made({"turns": 3, "fixed_turns": True}, requests=None, duration_s=200.0)
    assert {len(rows) for rows in grouped(workload)[:-1]} == {3}
    assert 195 < workload.opening_s[-1] < 200
    assert len(workload) == pytest.approx(800, rel=0.15)


def test_a_hundred_thousand_turns_are_small() -> None:
    workload = made({"turns": 8, "system_prompt_tokens": 2000}, requests=100_000)
    hashes: Any = workload.hashes
    stored = sum(column.itemsize * len(column) for column in (hashes._first, hashes._length, hashes._ends))
    assert stored < 40 * len(workload)
