"""What is written is read back identically; what can't be written leaves nothing behind."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.readers import load
from pdlab.workload.writer import write

SUFFIXES = [form + packing for form in (".csv", ".jsonl") for packing in ("", ".gz", ".zst")]
SMALL = Workload("small", np.array([0.0, 0.1]), np.array([3, 4], np.int32), np.array([1, 2], np.int32))


def same(one: Workload, other: Workload) -> None:
    for field in fields(Workload):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert b is not None, field.name
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
        elif field.name == "hashes" and a is not None:
            assert list(a) == list(b)
        else:
            assert a == b, field.name


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 6))

    def column(values: st.SearchStrategy[Any], dtype: Any) -> Any:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), dtype)

    def maybe(values: st.SearchStrategy[Any], dtype: Any) -> Any:
        return column(values, dtype) if draw(st.booleans()) else None

    seconds = st.floats(0, 1e7, allow_nan=False)
    slo = st.floats(1e-6, 1e6) | st.just(float("nan"))
    shorts = st.integers(1, 2**15 - 1)
    times = np.sort(column(seconds, np.float64))
    after = np.array([draw(st.integers(-1, i - 1)) for i in range(count)], np.int32) if draw(st.booleans()) else None
    chains = st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple)
    return Workload(
        draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        times,
        column(st.integers(1, 2**31 - 1), np.int32),
        column(st.integers(1, 2**31 - 1), np.int32),
        hashes=draw(st.none() | st.lists(chains, min_size=count, max_size=count)),
        hash_tokens=draw(st.integers(1, 1024)),
        priority=maybe(st.integers(-(2**15), 2**15 - 1), np.int16),
        ttft_slo_s=maybe(slo, np.float64),
        tpot_slo_s=maybe(slo, np.float64),
        n=maybe(shorts, np.int16),
        best_of=maybe(shorts, np.int16),
        after=after,
        concurrency=draw(st.none() | st.integers(1, 100)) if after is None else None,
        dropped=draw(st.integers(0, 100)),
        notes=tuple(draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=2))),
    )


@settings(max_examples=150, deadline=None)
@given(workload=workloads(), suffix=st.sampled_from(SUFFIXES))
def test_what_is_written_is_read_back_identically(workload: Workload, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"other-name{suffix}"
        write(workload, path)
        same(workload, load(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_workloads_make_equal_files_and_leave_nothing_else(tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    write(SMALL, one)
    write(SMALL, other)
    assert one.read_bytes() == other.read_bytes()
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_a_name_without_a_known_suffix_is_refused(tmp_path: Path) -> None:
    for name in ("trace", "trace.txt", "trace.gz", "trace.csv.bz2"):
        with pytest.raises(UsageError, match="the suffix says what to write"):
            write(SMALL, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write there"):
        write(SMALL, tmp_path / "gone" / "trace.csv")


def test_a_failure_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    class Broken(list[tuple[int, ...]]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    path = tmp_path / "trace.csv.gz"
    write(SMALL, path)
    before = path.read_bytes()
    broken = Workload("b", SMALL.arrival_s, SMALL.prompt_tokens, SMALL.output_tokens, hashes=Broken([(1,), (2,)]))
    with pytest.raises(KeyboardInterrupt):
        write(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
