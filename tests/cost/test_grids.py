"""A roofline's table: what it says between its points, and that an experiment takes it."""

import random

import pytest

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, Parallel, Table, build, hardware, load_profile, model, save_profile
from pdlab.cost.grids import roofline_table

SERVERS = [
    ("llama-3.1-8b", "h100-sxm", 1, "vllm"),
    ("llama-3.1-70b", "h200-sxm", 8, "trtllm"),
    ("gpt-oss-120b", "b200-sxm", 1, "vllm"),
    ("deepseek-v3", "b200-sxm", Parallel(tp=8, dp_attention=8, ep=8), "sglang"),
    ("qwen3-235b-a22b", "h100-sxm", 4, "trtllm"),
]


@pytest.mark.parametrize(("name", "chip", "parallel", "engine"), SERVERS)
def test_between_its_points_a_table_is_near_the_roofline(name, chip, parallel, engine):
    made = Table(roofline_table(model(name), hardware(chip), engine, parallel))
    cost = build(CostSpec(), model(name), hardware(chip), parallel, like=engine)
    rng = random.Random(5)
    misses = []
    for _ in range(60):
        batch, each = round(2 ** rng.uniform(0, 9)), round(2 ** rng.uniform(5, 14))
        misses.append(made.decode_s(batch, batch * each) / cost.decode_s(batch, batch * each) - 1)
        new, before = round(2 ** rng.uniform(4, 14)), round(2 ** rng.uniform(0, 14))
        misses.append(made.prefill_s([(new, before)]) / cost.prefill_s([(new, before)]) - 1)
    assert sum(map(abs, misses)) / len(misses) < 0.01
    assert max(map(abs, misses)) < 0.1


def test_a_table_says_what_it_rests_on_and_is_kept(tmp_path):
    made = roofline_table(model("llama-3.1-8b"), hardware("a100"), tokens=(1, 64), cached=(0,), batches=(1, 2), contexts=(1, 64))
    assert "not calibrated" in made.source
    save_profile(made, tmp_path / "t.json")
    assert load_profile(tmp_path / "t.json") == made
    with pytest.raises(UsageError, match="does not divide"):
        roofline_table(model("llama-3.1-8b"), hardware("a100"), parallel=3)
