"""Chains are what they were made of, however they are stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdlab.workload.chains import Chains

IDS = st.integers(-3, 3) | st.integers(-(2**64), 2**64)
CHAINS = st.lists(st.lists(IDS, max_size=6).map(tuple), max_size=6)


@given(CHAINS)
@example([(2**63 - 1, -(2**63))])  # consecutive to a wrapping processor
@example([(2**63 - 1, 2**63)])
def test_any_ids_come_back(chains: list[tuple[int, ...]]) -> None:
    assert list(Chains(chains)) == chains


@given(CHAINS, st.slices(6))
def test_slices_and_rows_are_a_lists(chains: list[tuple[int, ...]], part: slice) -> None:
    kept = Chains(chains)
    assert list(kept[part]) == chains[part]
    rows = list(range(len(chains)))[::-1]
    assert list(kept.take(rows)) == [chains[row] for row in rows]
    assert [kept[-1 - row] for row in rows] == [chains[-1 - row] for row in rows]


@given(st.lists(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=4), max_size=5))
def test_runs_are_ranges_one_after_another(runs: list[list[tuple[int, int]]]) -> None:
    chains = Chains()
    for row in runs:
        chains.append_runs(row)
    assert list(chains) == [tuple(i for first, length in row for i in range(first, first + length)) for row in runs]


def test_consecutive_ids_are_one_run() -> None:
    chains = Chains([(0, 5, 6, 7, 100), tuple(range(10_000))])
    assert chains.runs(0) == [(0, 1), (5, 3), (100, 1)]
    assert chains.runs(1) == [(0, 10_000)]


def test_there_is_nothing_past_the_end() -> None:
    with pytest.raises(IndexError):
        Chains([(1,)])[1]
    with pytest.raises(IndexError):
        Chains()[-1]


def test_ids_are_plain_numbers() -> None:
    first = Chains([tuple(np.arange(3))])[0]
    assert all(type(unit) is int for unit in first)
