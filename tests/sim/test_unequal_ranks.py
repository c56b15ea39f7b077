"""Prefill and decode instances of other ranks: bytes and links are those that the live side's plan gives a transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdlab import cost
from pdlab.core.kv_plan import KvLayout, copies, heads_moved, heads_of, pieces, reads_of
from pdlab.experiment.experiment import Experiment
from pdlab.sim import build
from pdlab.sim.topology import Endpoint
from pdlab.sim.world import World
from pdlab.workload.base import Workload
from tests.support.small_world import workload

SIZES = {"fp8": 1, "bfloat16": 2, "float32": 4}
LLAMA, DEEPSEEK = "llama-3.1-8b", "deepseek-v3"  # 8 KV heads; a latent vector


def simulated(model: str, prefill_tp: int, decode_tp: int, prompt: int = 2000, kv: tuple[str, str] = ("auto", "auto")) -> World:
    sides = zip(("prefill", "decode"), (prefill_tp, decode_tp), kv, strict=True)
    rows: list[dict[str, Any]] = [
        {"role": role, "count": 1, "hardware": "h200-141gb", "tp": tp, "engine": {"kv_cache_dtype": kept}} for role, tp, kept in sides
    ]
    asked = {
        "model": model,
        "seed": 1,
        "workload": {"source": "synthetic", "requests": 1, "rate": 1.0, "prompt": 16, "output": 3},
        "cluster": {"instances": rows, "network": {"gbytes_per_s": 10.0, "latency_us": 0.0}},
    }
    work: Workload = workload([0.0], prompt, 3)
    world = build.world(Experiment.parse(asked), work)
    world.run()
    return world


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_an_instance_is_brought_what_its_ranks_hold(tp: int) -> None:
    for name, heads in ((LLAMA, 8), (DEEPSEEK, 1)):
        model = cost.model(name)
        whole = model.kv_bytes_per_token("bf16", 1)
        assert model.kv_bytes_per_token("bf16", tp) == whole * heads_moved(heads, tp) / heads == whole * copies(heads, tp)


@pytest.mark.parametrize(
    ("model", "tps", "links"),
    [
        (LLAMA, (4, 1), 4),  # all of them send to the one
        (LLAMA, (1, 4), 1),
        (LLAMA, (4, 4), 4),
        (LLAMA, (16, 4), 8),  # each head is at two ranks, and read from one
        (DEEPSEEK, (16, 8), 8),  # of sixteen copies eight are read
    ],
)
def test_what_moves_and_by_which_links(model: str, tps: tuple[int, int], links: int) -> None:
    world = simulated(model, *tps)
    row = world.records.frame().iloc[0]
    known = cost.model(model)
    size = 2000 * known.kv_bytes_per_token("bf16", tps[1])
    assert row.transfer_bytes == pytest.approx(size)
    near = Endpoint(name="a", ranks=tps[0], kv_heads=known.main.shared_heads).share_sent(Endpoint(name="b", ranks=tps[1]))
    assert near * tps[0] == links
    path = world.network.path("prefill-0", "decode-0")
    assert path.bytes_per_s == pytest.approx(min(links * path.resources[0].bytes_per_s / tps[0], path.resources[1].bytes_per_s))
    assert row.transfer_s == pytest.approx(size / path.bytes_per_s, rel=0.01)


@pytest.mark.parametrize("kv", [("bfloat16", "fp8"), ("fp8", "bfloat16"), ("fp8", "fp8"), ("float32", "fp8")], ids=" to ".join)
@pytest.mark.parametrize(("model", "tps"), [(LLAMA, (2, 4)), (LLAMA, (16, 8)), (DEEPSEEK, (8, 16))])
def test_bytes_are_those_of_the_senders_elements(model: str, tps: tuple[int, int], kv: tuple[str, str]) -> None:
    """As the plan has them by which live transfers go."""
    known = cost.model(model)
    heads = known.main.shared_heads
    numbers = known.kv_bytes_per_token("fp8", 1) // known.layers // (2 if heads > 1 else 1) // heads
    layouts = [
        KvLayout(known.layers, 2 if heads > 1 else 1, 1000, len(heads_of(heads, tp, 0)), 16, numbers * SIZES[kept])
        for tp, kept in zip(tps, kv, strict=True)
    ]
    runs = np.arange(2000 // 16)
    reads = [read for rank in range(tps[1]) for read in reads_of(heads, *tps, rank)]
    planned = [pieces(read, *layouts, runs, runs, 16, range(known.layers)) for read in reads]
    world = simulated(model, *tps, kv=kv)
    row = world.records.frame().iloc[0]
    assert row.transfer_bytes == sum(len(one.source) * one.bytes for one in planned)
    blocks = {name: world.instances[name].spec.kv_blocks for name in ("prefill-0", "decode-0")}
    again = simulated(model, *tps, kv=(kv[1], kv[1])).instances["prefill-0"].spec.kv_blocks
    assert blocks["prefill-0"] * SIZES[kv[0]] == pytest.approx(again * SIZES[kv[1]], rel=1e-3)
