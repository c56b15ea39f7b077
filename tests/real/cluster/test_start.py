"""What the instances of `--role all` are started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab.real.cluster.start import Asked, engine_of
from pdlab.real.serve import Serving
from pdlab.spec import Experiment


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
