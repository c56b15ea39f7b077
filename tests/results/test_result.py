from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pdlab.core.types import UsageError
from pdlab.report import html
from pdlab.report.result import Result

FILES = {"summary.json", "requests.parquet", "timeline.parquet", "report.html", "experiment.yaml"}
Made = Callable[..., Result]


def test_saved_and_loaded_is_the_same(made_run: Made, tmp_path: Path) -> None:
    result = made_run(200, rejected=2)
    where = result.save(tmp_path / "deep" / "out")
    assert {f.name for f in where.iterdir()} == FILES
    assert [f.name for f in where.parent.iterdir()] == ["out"]
    back = Result.load(where)
    assert back.summary == result.summary
    assert back.experiment == result.experiment
    assert back.gaps.state() == result.gaps.state()
    np.testing.assert_array_equal(np.array(back.records.rows), np.array(result.records.rows))
    assert back.samples.rows == result.samples.rows
    pd.testing.assert_frame_equal(back.requests, result.requests)
    pd.testing.assert_frame_equal(back.timeline, result.timeline)


def test_parquet_is_one_row_a_request_for_anyone(made_run: Made, tmp_path: Path) -> None:
    result = made_run(150)
    frame = pd.read_parquet(result.save(tmp_path / "out") / "requests.parquet")
    assert len(frame) == 150
    assert frame["good"].mean() == pytest.approx(result.summary["slo_attainment"])


def test_saving_again_replaces_and_keeps_what_is_not_ours(made_run: Made, tmp_path: Path) -> None:
    where = made_run(50).save(tmp_path / "out")
    (where / "notes.txt").write_text("mine")
    second = made_run(60)
    second.save(where)
    assert Result.load(where).summary["requests"] == 60
    assert (where / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_nothing_behind(made_run: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_run(50)
    where = result.save(tmp_path / "out")
    before = {f.name: f.read_bytes() for f in where.iterdir()}

    def broken(*_: object) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(html, "run_page", broken)
    with pytest.raises(RuntimeError):
        made_run(70).save(where)
    with pytest.raises(RuntimeError):
        result.save(tmp_path / "other")
    assert {f.name: f.read_bytes() for f in where.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["summary.json", "requests.parquet", "timeline.parquet", "experiment.yaml"])
def test_each_file_that_is_missing_is_named(made_run: Made, tmp_path: Path, file: str) -> None:
    (made_run(5).save(tmp_path / "out") / file).unlink()
    with pytest.raises(UsageError, match=rf"no result is saved there \({file} is missing\)"):
        Result.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("summary.json", "{}", "summary.json: run"),
        ("summary.json", '{"run": 3}', "summary.json: run"),
        ("experiment.yaml", "", "experiment.yaml"),
    ],
)
def test_files_of_another_kind_are_the_users_fault(made_run: Made, tmp_path: Path, file: str, text: str, said: str) -> None:
    (made_run(5).save(tmp_path / "out") / file).write_text(text)
    with pytest.raises(UsageError, match=rf"out: its files are not a pdlab result \({said} is no mapping"):
        Result.load(tmp_path / "out")


def test_bad_directories_are_the_users_fault(made_run: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"summary\.json is missing"):
        Result.load(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UsageError, match="not a pdlab result"):
        Result.load(tmp_path)
    (tmp_path / "file").write_text("")
    for below in ("file", "file/out", "file/deep/out"):
        with pytest.raises(UsageError, match=r"no result is saved there \(.*/file is a file\)"):
            Result.load(tmp_path / below)
    with pytest.raises(UsageError, match="--out"):
        made_run(5).save(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="--out"):
        made_run(5).save(tmp_path / "file")


def test_spans_add_a_trace(made_run: Made, tmp_path: Path) -> None:
    result = made_run(20)
    result.spans = [("prefill-0", 0.0, 0.1, "prefill", 1, 100)]
    assert {f.name for f in result.save(tmp_path / "out").iterdir()} == FILES | {"trace.json.gz"}


def test_it_shows_itself(made_run: Made) -> None:
    result = made_run(60)
    assert repr(result).startswith("<Result made-up: 60 of 60 requests")
    assert "TTFT" in result._repr_html_()
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
    assert result.requests is result.requests
    json.dumps(result.summary, allow_nan=False)


def test_an_empty_run_can_be_saved(made_run: Made, tmp_path: Path) -> None:
    full = made_run(3)
    empty = Result(full.summary, type(full.records)(), type(full.gaps)(), type(full.samples)(), {"name": "empty"})
    assert len(Result.load(empty.save(tmp_path / "out")).requests) == 0
