"""A run slept through at once gives the step times of one event a step, token for token, whatever comes in between."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.kv import PLAIN
from pdlab.core.types import Role
from pdlab.sim.moves import TransferMode
from pdlab.sim.world import World
from tests.support.small_world import PD, WINDOWS, Bent, Joining, Linear, small_world, workload

TIMES = ("dispatched_s", "prefill_start_s", "first_token_s", "transfer_start_s", "transfer_end_s", "decode_start_s", "finish_s")
CLUSTERS = (PD, (("m-0", Role.MIXED), ("m-1", Role.MIXED)), (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)))


def assert_same(one: World, other: World) -> None:
    a = one.records.frame().sort_values("request_id")
    b = other.records.frame().sort_values("request_id")
    for name in TIMES:
        np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=0, atol=1e-9, err_msg=name)
    for name in ("status", "preemptions", "cached_tokens", "output_tokens", "decode_instance"):
        assert a[name].astype(str).tolist() == b[name].astype(str).tolist(), name
    assert one.gaps.count == other.gaps.count
    assert one.gaps.sum_s == pytest.approx(other.gaps.sum_s, rel=1e-9)
    assert one.gaps.max == pytest.approx(other.gaps.max, rel=1e-9, nan_ok=True)


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, list[float] | list[int]]:
    n = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.floats(0.0, 0.3), min_size=n, max_size=n))
    prompts = draw(st.lists(st.integers(1, 900), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, 120), min_size=n, max_size=n))
    return {"arrival_s": np.cumsum(gaps).tolist(), "prompt": prompts, "output": outputs}


@settings(max_examples=120, deadline=None)
@given(
    work=workloads(),
    members=st.sampled_from(CLUSTERS),
    kv_blocks=st.sampled_from([75, 130, 2000]),
    batch=st.sampled_from(["chunked", "prefill_first", "decode_first"]),
    cost=st.sampled_from([Linear(), Bent(), Joining()]),
    transfer=st.sampled_from(
        [TransferMode(), TransferMode("push", "layer"), TransferMode("push", "chunk"), TransferMode("pull", "request", "decode")]
    ),
    max_seqs=st.sampled_from([3, 64]),
    layout=st.sampled_from([PLAIN, *WINDOWS]),
)
def test_macro_steps_equal_single_steps(work, members, kv_blocks, batch, cost, transfer, max_seqs, layout) -> None:  # type: ignore[no-untyped-def]
    runs = []
    for horizon in (1 << 30, 1):
        world = small_world(
            workload(**work),
            members=members,
            kv_blocks=kv_blocks,
            batch=batch,
            cost=cost,
            transfer=transfer,
            max_seqs=max_seqs,
            layout=layout,
            max_batch_tokens=256,
            horizon=horizon,
        )
        world.run()
        assert world.leaked_blocks == 0
        runs.append(world)
    assert_same(*runs)


def test_a_run_is_one_event_not_one_a_token() -> None:
    world = small_world(workload([0.0], 100, 1000))
    events = 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1

    world.teller.on_event = count
    world.run()
    assert world.instances["decode-0"].generation + world.instances["decode-1"].generation <= 2
    assert world.gaps.count == 999
