"""The network against closed forms, against max-min fairness as it is defined, and against a brute-force fluid model."""

from __future__ import annotations

import csv
from collections import Counter
from math import inf
from pathlib import Path as File

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.sim.link import Network
from pdlab.sim.path import Transfer
from pdlab.sim.topology import Endpoint
from pdlab.sim.transport import MOONCAKE_EFA, MOONCAKE_ROCE
from tests.sim.fluid import Flow, Fluid

GB = 1e9


class Landed:
    """Remembers when each transfer was done; fails if one is done twice."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.at_s: dict[Transfer, float] = {}

    def __call__(self, transfer: Transfer) -> None:
        assert transfer not in self.at_s
        assert transfer.ended
        assert not transfer.failed
        self.at_s[transfer] = self.env.now


def cluster(prefills: int = 2, decodes: int = 2, bytes_per_s: float = GB, **network: float) -> tuple[simpy.Environment, Network, Landed]:
    env = simpy.Environment()
    names = [f"p{i}" for i in range(prefills)] + [f"d{i}" for i in range(decodes)]
    return env, Network(env, [Endpoint(name=n, nic_bytes_per_s=bytes_per_s) for n in names], **network), Landed(env)  # type: ignore[arg-type]


def at(env: simpy.Environment, when_s: float, act: object, *args: object) -> None:
    env.timeout(when_s - env.now).callbacks.append(lambda _: act(*args))  # type: ignore[operator]


def links(network: Network) -> dict[str, float]:
    return {use.name: use.bytes for use in network.stats()}


# ---------------------------------------------------------------- closed forms


def test_alone_it_takes_latency_and_size_over_bandwidth_and_one_event() -> None:
    env, network, landed = cluster(latency_s=0.25)
    transfer = network.transfer("p0", "d0", 2 * GB, landed, owner="me")
    env.run()
    assert landed.at_s == {transfer: pytest.approx(2.25)}
    assert transfer.owner == "me"
    assert next(env._eid) == 1


def test_no_bytes_take_the_latency() -> None:
    env, network, landed = cluster(latency_s=0.25)
    network.transfer("p0", "d0", 1 * GB, landed)
    empty = network.transfer("p0", "d0", 0.0, landed)
    alone = network.transfer("p1", "d1", 0.0, landed, delay_s=0.5)
    env.run()
    assert landed.at_s[empty] == pytest.approx(0.25)
    assert landed.at_s[alone] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "shared", [("p0", "d0", "p0", "d1"), ("p0", "d0", "p1", "d0"), ("p0", "d0", "p0", "d0")], ids=["out", "in", "both"]
)
def test_two_equal_ones_take_twice_as_long(shared: tuple[str, str, str, str]) -> None:
    env, network, landed = cluster()
    network.transfer(*shared[:2], GB, landed)
    network.transfer(*shared[2:], GB, landed)
    env.run()
    assert list(landed.at_s.values()) == pytest.approx([2.0, 2.0])


def test_both_directions_and_other_pairs_do_not_meet() -> None:
    env, network, landed = cluster()
    for src, dst in (("p0", "d0"), ("d0", "p0"), ("p1", "d1")):
        network.transfer(src, dst, GB, landed)
    env.run()
    assert list(landed.at_s.values()) == pytest.approx([1.0, 1.0, 1.0])


def test_a_later_one_slows_the_first_and_goes_on_alone() -> None:
    env, network, landed = cluster(latency_s=0.1)
    first = network.transfer("p0", "d0", 1 * GB, landed)  # flows from 0.1
    at(env, 0.4, network.transfer, "p0", "d1", 2 * GB, landed)  # flows from 0.5, when the first has 0.6 GB left
    env.run()
    first_s, second_s = landed.at_s.values()
    assert next(iter(landed.at_s)) is first
    assert first_s == pytest.approx(0.5 + 1.2)
    assert second_s == pytest.approx(1.7 + 2.0 - 0.6)


def test_one_that_waits_out_its_delay_holds_nobody_up() -> None:
    env, network, landed = cluster()
    slow = network.transfer("p0", "d0", GB, landed, delay_s=5.0)
    quick = network.transfer("p0", "d0", GB, landed, delay_s=1.0)
    late = network.transfer("p0", "d0", GB, landed, delay_s=5.5)
    env.run()
    assert landed.at_s == {quick: pytest.approx(2.0), slow: pytest.approx(6.5), late: pytest.approx(7.0)}


def test_what_a_limited_one_leaves_goes_to_the_other() -> None:
    env, network, landed = cluster()
    limited = network.transfer("p0", "d0", 0.5 * GB, landed, rate_limit_bytes_per_s=0.25 * GB)
    free = network.transfer("p0", "d1", 1.5 * GB, landed)
    env.run()
    assert landed.at_s == {limited: pytest.approx(2.0), free: pytest.approx(2.0)}


@pytest.mark.parametrize("other_bytes", [0.0, 100 * GB], ids=["alone", "shared"])
def test_a_limit_can_be_lifted_and_imposed(other_bytes: float) -> None:
    env, network, landed = cluster()
    if other_bytes:
        network.transfer("p0", "d1", other_bytes, landed)
    fair = GB / 2 if other_bytes else GB
    transfer = network.transfer("p0", "d0", GB, landed, rate_limit_bytes_per_s=GB / 4)
    at(env, 1.0, network.set_limit, transfer, inf)  # 0.75 GB left
    at(env, 1.25, network.set_limit, transfer, GB / 10)
    at(env, 2.25, network.set_limit, transfer, 2 * GB)
    env.run(until=200.0)
    assert landed.at_s[transfer] == pytest.approx(2.25 + (0.65 * GB - 0.25 * fair) / fair)


def test_a_push_that_is_paced_by_compute_ends_with_it() -> None:
    env, network, landed = cluster()
    push = network.transfer("p0", "d0", GB, landed, rate_limit_bytes_per_s=GB / 10, delay_s=1.0, open=True)
    at(env, 10.0, network.set_limit, push, inf)  # 0.1 GB are left when the compute ends
    at(env, 10.0, network.close, push)
    env.run()
    assert landed.at_s[push] == pytest.approx(10.1)


def test_chunks_are_sent_as_they_come_and_the_last_ends_it() -> None:
    env, network, landed = cluster(latency_s=0.5)
    push = network.transfer("p0", "d0", 1 * GB, landed, open=True)
    at(env, 1.0, network.extend, push, 1 * GB)  # under way: done at 2.5
    at(env, 4.0, network.extend, push, 1 * GB)  # was idle: no second latency
    at(env, 6.0, network.close, push)
    env.run(until=5.5)
    assert landed.at_s == {}
    assert network.remaining(push) == 0.0
    assert links(network)["p0.nic.out"] == 3 * GB
    env.run()
    assert landed.at_s == {push: 6.0}
    assert network.stats()[0].busy_fraction == pytest.approx(0.5)


def test_closing_never_calls_back_from_inside() -> None:
    env, network, landed = cluster()
    push = network.transfer("p0", "d0", 0.0, landed, open=True)
    env.run(until=1.0)
    network.close(push)
    network.close(push)
    assert landed.at_s == {}
    env.run()
    assert landed.at_s == {push: 1.0}


def test_a_cancelled_one_is_never_done_and_frees_its_share() -> None:
    env, network, landed = cluster(latency_s=0.5)
    idle = network.transfer("p1", "d1", 0.0, landed, open=True)
    doomed = network.transfer("p0", "d0", 10 * GB, landed)
    other = network.transfer("p0", "d1", 1 * GB, landed)
    early = network.transfer("p1", "d1", GB, landed)
    network.cancel(early)
    at(env, 1.5, network.cancel, doomed)
    at(env, 1.5, network.cancel, idle)
    env.run()
    network.cancel(other)
    network.extend(idle, GB)
    assert landed.at_s == {other: pytest.approx(2.0)}
    assert [t.failed for t in (doomed, early, idle, other)] == [True, True, True, False]
    assert links(network)["p0.nic.out"] == pytest.approx(1.5 * GB)
    unused = next(use for use in network.stats() if use.name == "p1.nic.out")
    assert (unused.bytes, unused.busy_fraction) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["d0", "d0.nic.in", "p0.nic.out"])
@pytest.mark.parametrize("company", [False, True], ids=["alone", "shared"])
def test_a_cut_link_stalls_and_goes_on_when_restored(name: str, company: bool) -> None:
    env, network, landed = cluster()
    transfer = network.transfer("p0", "d0", GB, landed)
    others = [network.transfer("p0", "d0", GB, landed)] if company else []
    at(env, 0.5, network.scale_bandwidth, name, 0.0)
    at(env, 7.5, network.scale_bandwidth, name, 1.0)
    env.run()
    assert landed.at_s == dict.fromkeys([transfer, *others], pytest.approx(9.0 if company else 8.0))
    cut = next(use for use in network.stats() if use.name.startswith(name))
    assert cut.utilisation == pytest.approx(1.0)  # of what it could carry


def test_a_transfer_that_starts_on_a_cut_link_waits_for_it() -> None:
    env, network, landed = cluster(latency_s=1.0)
    network.path("p0", "d0")
    network.set_bandwidth("p0.nic.out", 0.0)
    transfer = network.transfer("p0", "d0", GB, landed)
    at(env, 5.0, network.set_bandwidth, "p0", 0.5 * GB)
    env.run()
    assert landed.at_s == {transfer: pytest.approx(7.0)}


def test_a_slow_link_slows_only_those_on_it() -> None:
    env, network, landed = cluster()
    slow = network.transfer("p0", "d0", GB, landed)
    quick = network.transfer("p0", "d1", GB, landed)
    network.scale_bandwidth("d0", 0.1)
    env.run()
    assert landed.at_s == {quick: pytest.approx(1 / 0.9), slow: pytest.approx(10.0)}


def test_a_restarted_instance_starts_with_empty_links() -> None:
    env, network, landed = cluster()
    lost = [network.transfer("p0", "d0", GB, landed), network.transfer("p1", "d0", GB, landed, delay_s=0.25)]
    lost.append(network.transfer("d0", "p0", GB, landed, open=True))
    kept = network.transfer("p0", "d1", GB, landed)
    env.run(until=0.5)
    assert set(network.remove("d0")) == set(lost)
    assert all(t.failed for t in lost)
    network.add(Endpoint(name="d0", nic_bytes_per_s=2 * GB))
    again = network.transfer("p1", "d0", GB, landed)
    env.run(until=2.0)
    assert landed.at_s == {kept: pytest.approx(1.25), again: pytest.approx(1.5)}
    into = next(use for use in network.stats() if use.name == "d0.nic.in")
    assert into.bytes == pytest.approx((0.25 + 0.125 + 0.125 + 1) * GB - 0.125 * GB)
    assert into.utilisation == pytest.approx(into.bytes / (0.5 * GB + 1.5 * 2 * GB))


def test_use_is_read_in_the_middle_of_transfers() -> None:
    env, network, landed = cluster(latency_s=1.0)
    network.transfer("p0", "d0", 4 * GB, landed)
    env.run(until=0.5)
    assert network.stats()[0].busy_fraction == 0.0
    env.run(until=3.0)
    network.transfer("p0", "d1", 4 * GB, landed)
    env.run(until=4.5)
    use = {u.name: u for u in network.stats()}
    assert use["p0.nic.out"].bytes == pytest.approx(3.5 * GB)
    assert use["d0.nic.in"].bytes == pytest.approx(3.25 * GB)
    assert use["p0.nic.out"].busy_fraction == pytest.approx(3.5 / 4.5)
    assert use["p0.nic.out"].utilisation == pytest.approx(3.5 / 4.5)
    assert (use["p0.nic.out"].peak_flows, use["d0.nic.in"].peak_flows) == (2, 1)


# ---------------------------------------------------------------- properties

NAMES = ("a", "b", "c", "d")


def small_cluster(env: simpy.Environment) -> Network:
    """Unequal ends, two on one host, an oversubscribed core."""
    ends = [
        Endpoint(name="a", host="x", nic_bytes_per_s=4.0, pcie_bytes_per_s=6.0, copy_bytes_per_s=8.0),
        Endpoint(name="b", host="x", nic_bytes_per_s=2.0, pcie_bytes_per_s=3.0, copy_bytes_per_s=8.0),
        Endpoint(name="c", nic_bytes_per_s=3.0, nics=2, copy_bytes_per_s=5.0),
        Endpoint(name="d", nic_bytes_per_s=1.0, copy_bytes_per_s=4.0),
    ]
    return Network(env, ends, latency_s=0.5, host_latency_s=0.125, core_bytes_per_s=3.0)


def check_fair(network: Network) -> None:
    """As max-min fairness is defined: whoever is below its limit crosses a full resource on which nobody is faster."""
    for resource in network.topology.resources.values():
        total = sum(t.rate_bytes_per_s for t in resource.flows if t.since_s <= network.env.now)
        assert total <= resource.bytes_per_s * (1 + 1e-9)
    for transfer in {t for r in network.topology.resources.values() for t in r.flows}:
        rate = transfer.rate_bytes_per_s
        assert rate <= transfer.limit_bytes_per_s * (1 + 1e-9)
        if rate >= transfer.limit_bytes_per_s * (1 - 1e-9):
            continue
        assert any(
            sum(t.rate_bytes_per_s for t in r.flows) >= r.bytes_per_s * (1 - 1e-9)
            and rate >= max(t.rate_bytes_per_s for t in r.flows) * (1 - 1e-9)
            for r in transfer.path.resources
        )


pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))
limits = st.sampled_from([inf, inf, 0.5, 1.0, 3.0])
starts = st.tuples(st.just("start"), pairs, st.integers(0, 12), limits, st.sampled_from([0.0, 0.0, 0.25, 2.0]), st.booleans())
changes = st.one_of(
    starts,
    starts,
    st.tuples(st.just("limit"), st.integers(0, 30), st.sampled_from([inf, 0.0, 0.25, 2.0])),
    st.tuples(st.just("extend"), st.integers(0, 30), st.integers(0, 6)),
    st.tuples(st.just("close"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("scale"), st.sampled_from([*NAMES, "core", "c.nic.in", "a.pcie.out"]), st.sampled_from([0.0, 0.25, 1.0, 1.0])),
)
scripts = st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.0603, 0.5017, 1.7039]), changes), min_size=12, max_size=40)


@settings(max_examples=250, deadline=None)
@given(scripts)
def test_any_script_agrees_with_the_fluid_model(script: list[tuple[float, tuple]]) -> None:  # type: ignore[type-arg]
    env = simpy.Environment()
    network, landed = small_cluster(env), Landed(env)
    ports = {r.name: r.bytes_per_s for r in network.topology.resources.values()}
    fluid = Fluid(ports)
    both: list[tuple[Transfer, Flow]] = []
    for gap_s, (what, *args) in script:
        if gap_s:
            env.run(until=env.now + gap_s)
            fluid.run(env.now)
        if what == "start":
            (src, dst), size, limit, delay_s, stays_open = args
            transfer = network.transfer(src, dst, size, landed, rate_limit_bytes_per_s=limit, delay_s=delay_s, open=stays_open)
            path = transfer.path
            flow = Flow(tuple(r.name for r in path.resources), env.now + path.latency_s + delay_s, size, limit, stays_open)
            fluid.flows.append(flow)
            both.append((transfer, flow))
        elif what == "scale":
            name, factor = args
            network.scale_bandwidth(name, factor)
            for resource in network.topology.named(name):
                fluid.capacity[resource.name] = ports[resource.name] * factor
        elif both:
            transfer, flow = both[args[0] % len(both)]
            apply(network, transfer, flow, what, args[1:])
        check_fair(network)
        for transfer, flow in both:
            if not flow.cancelled:
                assert network.remaining(transfer) == pytest.approx(flow.left, rel=1e-6, abs=1e-6)
    env.run(until=env.now + 1000.0)
    fluid.run(env.now)
    for transfer, flow in both:
        assert landed.at_s.get(transfer, inf) == pytest.approx(flow.done_s, rel=1e-7, abs=1e-7)
        assert transfer.failed == flow.cancelled
    for use in network.stats():
        assert use.bytes == pytest.approx(fluid.carried[use.name], rel=1e-7, abs=1e-6)
        assert use.utilisation <= 1.0 + 1e-9
        assert use.busy_fraction * env.now == pytest.approx(fluid.busy_s[use.name], rel=1e-7, abs=1e-6)


def apply(network: Network, transfer: Transfer, flow: Flow, what: str, args: list[float]) -> None:
    if flow.cancelled or flow.done_s < inf or transfer.ended:
        return
    if what == "limit":
        network.set_limit(transfer, args[0])
        flow.limit = args[0]
    elif what == "cancel":
        network.cancel(transfer)
        flow.cancelled = True
    elif flow.open and what == "extend":
        network.extend(transfer, args[0])
        flow.size += args[0]
    elif flow.open and what == "close":
        network.close(transfer)
        flow.open = False


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.125, 1.0]), pairs, st.integers(0, 1 << 40), limits), max_size=40))
def test_every_byte_is_counted_once_on_every_link_of_its_path(flows: list[tuple[float, tuple[str, str], int, float]]) -> None:
    env = simpy.Environment()
    network, landed = small_cluster(env), Landed(env)
    expected: Counter[str] = Counter()
    for gap_s, (src, dst), size, limit in flows:
        if gap_s:
            env.run(until=env.now + gap_s)
        transfer = network.transfer(src, dst, size, landed, rate_limit_bytes_per_s=limit)
        expected.update({r.name: size for r in transfer.path.resources})
    env.run()
    assert len(landed.at_s) == len(flows)
    assert links(network) == {name: pytest.approx(size, rel=0, abs=0) for name, size in expected.items()}
    assert all(use.utilisation <= 1.0 + 1e-9 for use in network.stats())


def test_the_same_script_gives_the_same_times_to_the_bit() -> None:
    def times() -> list[float]:
        env, network, landed = cluster(3, 3)
        for i in range(60):
            at(env, 0.01 * i, network.transfer, f"p{i % 3}", f"d{i * 7 % 3}", (1 + i % 5) * 1e8, landed)
        env.run()
        return list(landed.at_s.values())

    assert times() == times()


def test_events_stay_proportional_when_many_share() -> None:
    env, network, landed = cluster(1, 1)
    for i in range(200):
        network.transfer("p0", "d0", GB * (1 + i), landed)
    env.run()
    assert len(landed.at_s) == 200
    assert next(env._eid) < 200 * 200  # each departure quickens the rest; each arrival, which only slows, adds but its own


# ---------------------------------------------------------------- measurements

MEASURED = File(__file__).resolve().parents[2] / "../shared/data/net/kv_transfer_measurements.csv"


def measured() -> list[dict[str, str]]:
    if not MEASURED.exists():
        pytest.skip(f"{MEASURED} is not here; it is part of the shared data")
    with MEASURED.open(newline="") as file:
        return list(csv.DictReader(file))


def test_mooncake_under_vllm_within_15_percent() -> None:
    """All rows that give both a size and a latency."""
    rows = [row for row in measured() if row["size_bytes"] and row["latency_ms"]]
    assert len(rows) == 9
    for row in rows:
        env = simpy.Environment()
        line = float(row["line_rate_GBps"]) * GB
        ends = [Endpoint(name=name, nic_bytes_per_s=line / 8, nics=8) for name in ("p", "d")]
        network, landed = Network(env, ends, transport=MOONCAKE_ROCE), Landed(env)
        network.transfer("p", "d", float(row["size_bytes"]), landed)
        env.run()
        assert list(landed.at_s.values()) == [pytest.approx(float(row["latency_ms"]) / 1e3, rel=0.15)], row["what"]


def test_mooncake_over_efa_within_15_percent_by_piece_size() -> None:
    """Bandwidths by size of contiguous piece, given in the row's `extra`; the row itself holds the first of them."""
    row = next(row for row in measured() if row["what"] == "64KB blocks")
    points = dict(point.split(":") for point in row["extra"].removeprefix("block-size sensitivity ").split())
    assert len(points) == 6
    for piece, gbytes_per_s in points.items():
        size = int(piece[:-1]) * {"K": 2**10, "M": 2**20}[piece[-1]]
        reached = MOONCAKE_EFA.bytes_per_s(float(row["line_rate_GBps"]) * GB, size)
        assert reached / GB == pytest.approx(float(gbytes_per_s), rel=0.15), piece
