"""A model with recurrent layers in a whole simulation: each hand-off moves the sequence's state beside its KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model
from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate
from pdlab.sim.moves import TransferMode
from tests.cost.published_configs import PUBLISHED
from tests.support.small_world import small_world, workload


@pytest.mark.parametrize("granularity", ["request", "chunk", "layer"])
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_a_hand_off_moves_kv_and_state(mode: str, granularity: str) -> None:
    moved = []
    for state in (0.0, 5e6):
        world = small_world(workload([0.0], 1500, 2), transfer=TransferMode(mode, granularity, state_bytes=state), max_batch_tokens=500)
        world.run()
        moved.append(world.records.frame().iloc[0].transfer_bytes)
    assert moved == [1500 * 131072, 1500 * 131072 + 5e6]


def test_a_hybrid_is_simulated_with_its_states_in_memory_and_on_the_wire(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["nemotron-h-8b"][0]), encoding="utf-8")
    instances = [{"role": role, "hardware": "h100-sxm"} for role in ("prefill", "decode")]
    work = {"source": "synthetic", "requests": 10, "rate": 2, "prompt": 1000, "output": 20}
    asked = {"model": str(tmp_path), "workload": work, "cluster": {"instances": instances}}
    result = simulate(Experiment.parse(asked, "test"))
    read = model(str(tmp_path))
    assert result.summary["completed"] == 10
    assert result.summary["transfer_bytes"] == 10 * (1000 * read.kv_bytes_per_token() + read.state_bytes)
    with pytest.raises(UsageError, match="GB of 5000 sequences' states"):
        Experiment.parse(asked | {"engine": {"max_seqs": 5000}}, "test")
