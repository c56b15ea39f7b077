"""The store of `pdlab validate`: what goes in comes out, to the microsecond, and what is no store is told in a line."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.results.records import FIELDS
from pdlab.results.run import Run
from pdlab.results.run_store import RunStore, StoredRun, name_of
from tests.support.measured_runs import measured, simulated


def store_of(*runs: StoredRun) -> RunStore:
    store = RunStore({"cpu": "a CPU", "cores": 2}, {"pdlab": "0"})
    for run in runs:
        store.put(run)
    return store


def both_worlds(policy: str = "least_loaded", rate: float = 8) -> list[StoredRun]:
    sim = simulated(policy, rate=rate)
    return [
        StoredRun("2p1d", policy, rate, "sim", 0, sim),
        StoredRun("2p1d", policy, rate, "real", 1, measured(sim, 1.01), [[1e-5, 2e-5], [1e-5]]),
    ]


def back(store: RunStore, folder: Path) -> RunStore:
    store.save(folder)
    return RunStore.load(folder)


def same(a: Run, b: Run) -> None:
    assert a.summary == b.summary and a.experiment == b.experiment and a.gaps.state() == b.gaps.state()
    ours, theirs = a.records.columns(), b.records.columns()
    assert list(ours) == list(theirs)
    for name, column in ours.items():
        np.testing.assert_allclose(column, theirs[name], rtol=0, atol=0.5001e-6, err_msg=name)
    assert (a.records.instances, a.records.reasons) == (b.records.instances, b.records.reasons)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    runs = [*both_worlds(), *both_worlds("round_robin", 4.2)]
    found = back(store_of(*runs), tmp_path / "a" / "b")
    assert list(found.runs) == [run.name for run in runs]
    assert (found.machine, found.versions, found.checks) == ({"cpu": "a CPU", "cores": 2}, {"pdlab": "0"}, [])
    for run in runs:
        kept = found.runs[run.name]
        assert (kept.layout, kept.policy, kept.rate, kept.world, kept.repeat) == (run.layout, run.policy, run.rate, run.world, run.repeat)
        assert kept.loop_s == run.loop_s
        same(run.result, kept.result)
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"manifest.json", "requests.parquet"}


def test_times_that_never_came_instances_never_chosen_and_reasons_are_kept(tmp_path: Path) -> None:
    whole, sim = simulated(), simulated()
    table = np.array(sim.records.rows).reshape(-1, len(FIELDS))
    for name in ("first_token_s", "decode_start_s", "finish_s", "decode_instance"):
        table[:5, FIELDS.index(name)] = np.nan
    table[:5, FIELDS.index("reason")] = 0
    table[5:9, FIELDS.index("ttft_slo_s")] = 0.25
    sim.records.rows = array("d", table.ravel())
    sim.records.reasons = ["too long"]
    sim.records.first_tokens = array("d", [2.0] * len(table))
    found = back(store_of(StoredRun("a", "b", 1, "sim", 0, whole), StoredRun("a", "b", 1, "sim", 1, sim)), tmp_path)
    same(sim, found.runs["a-b-1-sim-1"].result)
    same(whole, found.runs["a-b-1-sim"].result)


def test_a_run_of_no_request_is_kept(tmp_path: Path) -> None:
    sim = simulated()
    sim.records.rows = array("d")
    found = back(store_of(StoredRun("a", "b", 1, "sim", 1, sim), StoredRun("a", "b", 1, "sim", 2, simulated())), tmp_path)
    assert len(found.runs["a-b-1-sim-1"].result.records) == 0 and len(found.runs["a-b-1-sim-2"].result.records) == 120


def test_an_experiment_of_another_make_is_kept_whole(tmp_path: Path) -> None:
    runs = both_worlds()
    other = simulated()
    other.experiment.pop("slo")
    found = back(store_of(*runs, StoredRun("2p1d", "least_loaded", 8, "sim", 3, other)), tmp_path)
    assert found.runs["2p1d-least_loaded-8-sim-3"].result.experiment == other.experiment


def test_the_table_reads_by_itself(tmp_path: Path) -> None:
    import pandas as pd

    store_of(*both_worlds()).save(tmp_path)
    frame = pd.read_parquet(tmp_path / "requests.parquet")
    assert list(frame)[:6] == ["run", "layout", "policy", "rate", "world", "repeat"]
    real = frame[frame.world == "real"]
    assert len(real) == 120 and (real.first_token_us - real.arrival_us).min() > 0
    assert str(real.finish_us.dtype).lower() == "int64"


def test_a_store_that_is_written_again_is_the_same_to_the_byte(tmp_path: Path) -> None:
    store = store_of(*both_worlds())
    back(store, tmp_path / "a").save(tmp_path / "b")
    for name in ("manifest.json", "requests.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_is_named_by_what_makes_it_up() -> None:
    assert name_of("1p1d", "round_robin", 2.5, "real", 1) == "1p1d-round_robin-2.5-real-1"
    assert name_of("1p1d", "round_robin", 3.0, "sim", 0) == "1p1d-round_robin-3-sim"


def test_what_is_no_store_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no runs are stored there \(manifest.json is missing\): pdlab validate FILE --out"):
        RunStore.load(tmp_path)
    with pytest.raises(UsageError, match=r"manifest\.json is missing"):
        RunStore.load(tmp_path / "nowhere")
    store_of(*both_worlds()).save(tmp_path / "store")
    (tmp_path / "store" / "requests.parquet").unlink()
    with pytest.raises(UsageError, match=r"requests\.parquet is missing"):
        RunStore.load(tmp_path / "store")
    (tmp_path / "store" / "requests.parquet").write_text("none")
    with pytest.raises(UsageError, match="not the runs of pdlab validate"):
        RunStore.load(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="not the runs of pdlab validate"):
        RunStore.load(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        RunStore.load(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write there"):
        store_of(*both_worlds()).save(tmp_path / "file" / "below")


def test_a_table_of_other_runs_than_the_manifests_is_none_of_its(tmp_path: Path) -> None:
    store_of(*both_worlds()).save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["runs"][0]["run"] = "another"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="another"):
        RunStore.load(tmp_path)


def test_a_folder_for_each_run_was_another_version(tmp_path: Path) -> None:
    simulated().save(tmp_path / "1p1d-least_loaded-8-sim")
    with pytest.raises(UsageError, match="a folder for each run is how pdlab validate once kept them; measure again"):
        RunStore.load(tmp_path)


def test_a_store_is_no_result(tmp_path: Path) -> None:
    store_of(*both_worlds()).save(tmp_path)
    with pytest.raises(UsageError, match="the runs of pdlab validate, many results"):
        Run.load(tmp_path)
