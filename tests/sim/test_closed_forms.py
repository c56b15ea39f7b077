"""The simulator against what queueing theory and arithmetic say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pdlab.core.types import Role
from pdlab.sim.kv_size import ANY_SIZE
from pdlab.sim.moves import TransferMode
from tests.support.small_world import Joining, Linear, small_world, workload

ONE_SERVER = (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))


class OneAtATime(Linear):
    """A prefill instance as a single server: 1 ms a prompt token, nothing else."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return 1e-3 * sum(new for new, _ in chunks)


def waits_s(arrivals: np.ndarray, service_tokens: np.ndarray) -> np.ndarray:
    work = workload(arrivals.tolist(), service_tokens.tolist(), 1)
    world = small_world(
        work, members=ONE_SERVER, cost=OneAtATime(), batch="prefill_first", max_batch_tokens=1, kv_blocks=100_000, check=False
    )
    world.run()
    return np.asarray(world.records.column("prefill_start_s") - world.records.column("arrival_s"))


def lindley_s(arrivals: np.ndarray, service_tokens: np.ndarray) -> np.ndarray:
    """Who comes waits for what is left of all before: W' = max(0, W + service - time to the next)."""
    walk = np.concatenate(([0.0], np.cumsum(service_tokens[:-1] * 1e-3 - np.diff(arrivals))))
    return np.asarray(walk - np.minimum.accumulate(walk))


@pytest.mark.parametrize("members", [ONE_SERVER, (("mixed-0", Role.MIXED),)], ids=["apart", "mixed"])
def test_a_prompt_that_a_model_drafts_from_lengthens_its_first_decode_step(members: tuple[tuple[str, Role], ...]) -> None:
    """Once, and nothing before its first token."""
    work = workload([0.0, 0.05, 2.0], [1000, 500, 800], 40)
    finish_s, first_s = [], []
    for cost in (Linear(), Joining()):
        world = small_world(work, members=members, cost=cost)
        world.run()
        finish_s.append(np.asarray(world.records.column("finish_s")))
        first_s.append(np.asarray(world.records.column("first_token_s")))
    assert (first_s[1] - first_s[0])[[0, 2]] == pytest.approx(0.0, abs=1e-9)
    assert (finish_s[1] - finish_s[0])[[0, 2]] == pytest.approx([1e-5 * (1000 + 500), 1e-5 * 800], abs=1e-4), "and others' beside it"


def check_waits(load: float, service_tokens: np.ndarray, expected_s: float) -> None:
    """The first 3,000 wait in the simulator as the recursion says, and all 4,000,000 as the formula says of the recursion."""
    n = len(service_tokens)
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(service_tokens.mean() * 1e-3 / load, n))
    exact = lindley_s(arrivals, service_tokens)
    assert waits_s(arrivals[:3000], service_tokens[:3000]) == pytest.approx(exact[:3000], abs=1e-6)
    assert exact[n // 10 :].mean() == pytest.approx(expected_s, rel=0.06)


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_md1_waiting_time(load: float) -> None:
    """Pollaczek-Khinchine: W = rho s / (2 (1 - rho))."""
    check_waits(load, np.full(4_000_000, 100), load * 0.1 / (2 * (1 - load)))


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_mm1_waiting_time(load: float) -> None:
    """W = rho s / (1 - rho)."""
    tokens = np.maximum(1, np.rint(np.random.default_rng(9).exponential(200.0, 4_000_000))).astype(int)
    check_waits(load, tokens, load * 0.2 / (1 - load))


@pytest.mark.parametrize("transfer", [TransferMode("push"), TransferMode("pull")])
def test_one_request_alone_is_the_sum_of_its_parts(transfer: TransferMode) -> None:
    prompt, output, latency_s, cost = 500, 40, 1e-3, Linear()
    world = small_world(workload([0.0], prompt, output), cost=cost, transfer=transfer, latency_s=latency_s, gbytes_per_s=1.0)
    world.run()
    row = world.records.frame().iloc[0]
    prefill_s = cost.prefill_s([(prompt, 0)])
    moved_s = prompt * ANY_SIZE.bytes_per_token / 1e9 + latency_s * (2 if transfer.mode == "pull" else 1)
    steps_s = sum(cost.decode_s(1, prompt + 1 + k) for k in range(output - 1))
    assert row.ttft_s == pytest.approx(prefill_s)
    assert row.transfer_s == pytest.approx(moved_s)
    assert row.e2e_s == pytest.approx(prefill_s + moved_s + steps_s)
    assert row.tpot_s == pytest.approx((moved_s + steps_s) / (output - 1)), "the transfer shows between the first two tokens"
    assert world.gaps.max == pytest.approx(moved_s + cost.decode_s(1, prompt + 1))


def test_the_first_token_after_the_transfer_costs_the_client_the_transfer() -> None:
    times = {}
    for first in ("prefill", "decode"):
        world = small_world(workload([0.0], 500, 40), transfer=TransferMode(first_token=first), gbytes_per_s=1.0)
        world.run()
        times[first] = world.records.frame().iloc[0]
    assert times["decode"].ttft_s > times["prefill"].ttft_s + 0.06
    assert times["decode"].tpot_s < times["prefill"].tpot_s


def test_layered_push_ends_between_the_compute_and_the_blocking_transfer() -> None:
    """I10 of the reference: compute end + last layer <= layered finish <= compute end + whole transfer."""
    finish = {}
    for granularity in ("request", "chunk", "layer"):
        mode = TransferMode("push", granularity)
        world = small_world(workload([0.0], 1500, 2), transfer=mode, max_batch_tokens=500, gbytes_per_s=10.0, latency_s=0.0)
        world.run()
        row = world.records.frame().iloc[0]
        finish[granularity] = (row.transfer_end_s, row.first_token_s, row.transfer_bytes)
    whole_s = 1500 * 131072 / 10e9
    assert finish["request"][0] == pytest.approx(finish["request"][1] + whole_s)
    assert finish["chunk"][0] == pytest.approx(finish["chunk"][1] + whole_s / 3)
    assert finish["layer"][1] < finish["layer"][0] < finish["chunk"][0]
    assert finish["layer"][0] >= finish["layer"][1] + whole_s / 3 / 32 - 1e-9
    assert finish["request"][2] == finish["chunk"][2] == finish["layer"][2] == 1500 * 131072


def test_littles_law() -> None:
    """Mean requests in the system = arrival rate x mean time in it."""
    rng = np.random.default_rng(3)
    n = 4000
    work = workload(np.cumsum(rng.exponential(1 / 20, n)).tolist(), rng.integers(50, 800, n).tolist(), rng.integers(2, 150, n).tolist())
    world = small_world(work, check=False)
    world.run()
    arrived, ended = world.records.column("arrival_s"), world.records.column("finish_s")
    until = float(ended.max())
    grid = np.linspace(0, until, 20_001)
    in_system = np.searchsorted(np.sort(arrived), grid, side="right") - np.searchsorted(np.sort(ended), grid, side="right")
    assert in_system.mean() == pytest.approx(n / until * (ended - arrived).mean(), rel=0.01)


def test_busy_time_is_the_work_done() -> None:
    cost = Linear()
    world = small_world(workload(np.arange(50) * 0.5, 300, 20), cost=cost)
    world.run()
    prefill_s = sum(x.prefill_busy_s for x in world.instances.values())
    assert prefill_s == pytest.approx(50 * cost.prefill_s([(300, 0)]))


def test_migration_downtime_does_not_grow_with_the_context() -> None:
    """Llumnix' claim; a blocking copy would grow linearly."""
    from pdlab.core.policy import Policy

    class MoveOnce(Policy):
        tick_s = 0.25
        moved = False

        def handoff(self, request, cluster):  # type: ignore[no-untyped-def]
            return cluster.decode[0] if cluster.decode else None

        def migrate(self, cluster):  # type: ignore[no-untyped-def]
            ready = [r for r in cluster.live.values() if r.decode is not None and r.stage.name == "DECODE"]
            if self.moved or not ready:
                return []
            self.moved = True
            return [(ready[0].request.id, cluster.decode[1])]

    downtime = {}
    for prompt in (500, 4000, 16_000):
        world = small_world(workload([0.0], prompt, 400), policy=MoveOnce(), kv_blocks=3000, gbytes_per_s=5.0, max_batch_tokens=20_000)
        world.run()
        assert world.records.frame().iloc[0].migrations == 1
        meter = world.instances["decode-1"].worker.meter
        normal_s = meter.decode_s / meter.decode_steps
        first_gap = prompt * 131072 / 5e9 + 2 * normal_s
        gaps, _ = world.gaps.histogram()
        downtime[prompt] = float(gaps[(gaps < first_gap * 0.9) | (prompt == 500)].max())
    assert downtime[16_000] < 2.5 * downtime[4000]
    assert downtime[16_000] < 0.2 * 16_000 * 131072 / 5e9
