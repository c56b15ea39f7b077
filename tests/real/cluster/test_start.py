"""What the instances of `--role all` are started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab import cost
from pdlab.real.cluster.start import Asked, child_command, engine_of, profile_of
from pdlab.real.engine.messages import Ready
from pdlab.real.instance.member import measured_of
from pdlab.real.serve import Serving
from pdlab.sim.build import plans
from pdlab.spec import Experiment
from pdlab.types import Role
from tests.cost.test_measured import PROFILE


def asked(folder: Path, name: str, role: str, registry: str = "fd://3") -> Asked:
    def row(role: str, count: int, kv_blocks: int) -> dict[str, Any]:
        return {"role": role, "count": count, "hardware": "l4", "engine": {"kv_blocks": kv_blocks}}

    experiment = Experiment.parse(
        {
            "model": "smollm2-135m",
            "engine": {"kv_blocks": 100},
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [row("prefill", 1, 500), row("decode", 1, 600), row("decode", 1, 700)]},
        }
    )
    return Asked(
        role=role, file=None, experiment=experiment, given={"model": folder}, serving=Serving(), registry=registry, instance_name=name
    )


@pytest.mark.parametrize(
    ("name", "role", "kv_blocks"),
    [("prefill-0", "prefill", 500), ("decode-1", "decode", 700), ("decode-2", "decode", 600), ("mixed-0", "mixed", 500)],
)
def test_one_that_is_scaled_up_is_like_the_first_of_its_role(name: str, role: str, kv_blocks: int, tmp_path: Path) -> None:
    assert engine_of(asked(tmp_path, name, role)).kv_blocks == kv_blocks


def test_one_that_is_started_by_hand_has_the_experiments_engine_unless_it_bears_a_name_of_its_cluster(tmp_path: Path) -> None:
    assert engine_of(asked(tmp_path, "mine", "decode", "etcd://host:1")).kv_blocks == 100
    assert engine_of(asked(tmp_path, "decode-1", "decode", "etcd://host:1")).kv_blocks == 700


def of_a_profile(folder: Path, **rest: Any) -> Asked:
    """An instance whose row says what was measured of it."""
    cost.save_instance_profile(PROFILE, folder / "profile.json")
    experiment = Experiment.parse(
        {
            "model": "smollm2-135m",
            "engine": {"kv_blocks": 100, "max_batch_tokens": 512, "max_seqs": 16},
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [{"role": "prefill", "hardware": str(folder / "profile.json")}, {"role": "decode", "hardware": "l4"}]},
        }
    )
    options = {"role": "prefill", "file": None, "given": {}, "serving": Serving(), "registry": "fd://3", "instance_name": "prefill-0"}
    return Asked(experiment=experiment, **{**options, **rest})


def test_where_the_row_has_a_profile_predictors_start_from_what_the_simulator_starts_from(tmp_path: Path) -> None:
    asked = of_a_profile(tmp_path)
    assert asked.experiment is not None
    plan = plans(asked.experiment, 16)[0]
    ready = Ready("", 1000, 100, 16, 100, "", "", prefill_profile=((1, 9.9),))
    live = measured_of(ready, profile_of(asked), max_batch_tokens=512, max_seqs=16)
    assert len(live.prefill_profile) > 3 and len(live.decode_profile) > 3
    assert (live.prefill_profile, live.decode_profile) == (plan.prefill_profile, plan.decode_profile)


def test_who_has_no_profile_measures_itself_unless_told_not_to(tmp_path: Path) -> None:
    assert not engine_of(of_a_profile(tmp_path, given={"model": ""})).self_profile
    assert engine_of(of_a_profile(tmp_path, role="decode", instance_name="decode-0", given={"model": ""})).self_profile
    unwilling = of_a_profile(tmp_path, role="decode", instance_name="decode-0", self_profile=False)
    assert not engine_of(unwilling).self_profile
    assert "--no-self-profile" in child_command(unwilling, "m", 1, "decode-0", Role.DECODE, 3)
    assert "--no-self-profile" not in child_command(of_a_profile(tmp_path), "m", 1, "decode-0", Role.DECODE, 3)


def test_another_model_than_the_files_is_measured_anew(tmp_path: Path) -> None:
    assert profile_of(of_a_profile(tmp_path)) is not None
    assert profile_of(of_a_profile(tmp_path, given={"model": "mine"})) is None
