"""What a comparison says of results that are not of one experiment, or not of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pdlab.cost.profile import save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.results.comparison import compare
from tests.cost.test_measured import PROFILE
from tests.support.measured_runs import measured, simulated


def notes(simulation: Result, *runs: Result) -> tuple[str, ...]:
    (group,) = compare([("sim", simulation), *((f"real-{k}", run) for k, run in enumerate(runs))]).groups
    return group.notes


def of(result: Result, **changes: Any) -> Result:
    """`result`, of an experiment with other values: `engine={"max_seqs": 3}`."""
    changed = {key: {**result.experiment[key], **values} for key, values in changes.items()}
    return Result(result.summary, result.records, result.gaps, result.samples, {**result.experiment, **changed})


def test_other_workloads_and_cut_runs_are_noted() -> None:
    sim = simulated()
    found = notes(sim, measured(simulated(prompt=700), 1.0, run={"seed": 3}, partial=True))
    for words in ("other prompt lengths", "another seed", "stopped early"):
        assert any(words in note for note in found), words
    assert any("120 requests were simulated, 60 measured" in note for note in notes(sim, measured(simulated(requests=60), 1.0)))


def test_runs_of_another_experiment_say_in_what_it_differs() -> None:
    sim = simulated()
    run = of(measured(sim, 1.1), engine={"max_batch_tokens": 512}, workload={"rate": 9.0})
    said = "engine.max_batch_tokens 512, not 8192; workload.rate 9.0, not 8.0"
    assert notes(sim, run) == (f"the run at http://x is of another experiment than the simulation: {said}",)
    many = of(measured(sim, 1.1), engine=dict.fromkeys(("block_tokens", "max_batch_tokens", "max_seqs", "watermark", "kv_blocks"), 1))
    assert notes(sim, many)[0].endswith("; and 1 more")


def test_what_is_not_shared_by_both_worlds_may_differ() -> None:
    sim = simulated()
    run = of(measured(sim, 1.1), cluster={"network": {"gbytes_per_s": 1.0}})
    run.experiment["cluster"]["instances"] = [{**row, "hardware": "l4", "host": "here"} for row in sim.experiment["cluster"]["instances"]]
    run.experiment |= {"name": "other", "base_dir": "/elsewhere", "cost": {"weight_dtype": "fp8"}}
    assert notes(sim, run) == ()
    run.experiment["cluster"]["instances"] = sim.experiment["cluster"]["instances"][:1]
    assert "cluster.instances.1.role left out, not decode" in notes(sim, run)[0]


def test_a_profile_of_another_model_than_was_served_is_noted(tmp_path: Path) -> None:
    save_instance_profile(PROFILE, tmp_path / "profile.json")
    sim = simulated()
    sim.experiment |= {"base_dir": str(tmp_path)}
    sim.experiment["cluster"]["instances"] = [{**row, "hardware": "profile.json"} for row in sim.experiment["cluster"]["instances"]]
    assert notes(sim, measured(sim, 1.1, run={"model": "HuggingFaceTB/smollm2-135m-instruct"})) == ()
    assert notes(sim, measured(sim, 1.1, run={"model": "qwen3-0.6b"})) == (
        "the run at http://x was of model qwen3-0.6b, the simulation's profile is of SmolLM2",
    )
    (tmp_path / "profile.json").unlink()
    assert notes(sim, measured(sim, 1.1, run={"model": "qwen3-0.6b"})) == ()


def test_repeats_on_different_servers_are_noted() -> None:
    sim = simulated()
    runs = [
        measured(sim, factor, run={"model": "m", "server_version": version}) for factor, version in ((1.0, "1"), (1.1, "2"), (1.2, "2"))
    ]
    assert notes(sim, *runs) == ("the measured runs are of different servers: m 1, m 2",)
    assert notes(sim, *runs[1:]) == ()


def test_the_runs_own_warnings_are_repeated_once_and_those_of_the_workload_never() -> None:
    sim = simulated()
    runs = [measured(sim, factor) for factor in (1.0, 1.1)]
    for run in runs:
        run.summary["warnings"] = ["15 rows were dropped", "the client was too slow"]
    sim.summary["warnings"] = ["beyond the grid", "15 rows were dropped"]
    assert notes(sim, *runs) == ("beyond the grid (the simulation)", "the client was too slow (2 of 2 measured runs)")
    assert "the client was too slow (the measured run)" in notes(sim, runs[0])
    runs[1].summary["warnings"] = []
    assert "15 rows were dropped (the simulation and 1 of 2 measured runs)" in notes(sim, *runs)


def test_an_experiment_as_it_is_saved_and_loaded_equals_itself(tmp_path: Path) -> None:
    sim = simulated()
    sim.save(tmp_path / "sim")
    measured(sim, 1.1).save(tmp_path / "real")
    assert notes(Result.load(tmp_path / "sim"), Result.load(tmp_path / "real")) == ()
    assert Experiment.parse(Result.load(tmp_path / "sim").experiment).model == "llama-3.1-8b"
