"""Which links join two instances, how fast they are, and what is refused."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import simpy

from pdlab.core.types import UsageError
from pdlab.cost import hardware
from pdlab.sim.link import Network
from pdlab.sim.topology import Endpoint, endpoint, packed_hosts
from pdlab.sim.transport import MOONCAKE_ROCE, Transport

GB = 1e9


def network(*ends: Endpoint, **figures: Any) -> Network:
    return Network(simpy.Environment(), ends, **figures)


def ends(**shared: Any) -> tuple[Endpoint, Endpoint]:
    return Endpoint(name="p", **shared), Endpoint(name="d", **shared)


@pytest.mark.parametrize(
    ("shared", "kind", "links", "gbytes_per_s"),
    [
        ({"host": "h", "device": "gpu", "scaleup_bytes_per_s": 9 * GB}, "device", ["gpu.copy"], 1000),
        ({"host": "h", "scaleup_bytes_per_s": 9 * GB, "pcie_bytes_per_s": GB}, "host", ["p.scaleup.out", "d.scaleup.in"], 9),
        ({"scaleup_domain": "rack", "scaleup_bytes_per_s": 9 * GB}, "host", ["p.scaleup.out", "d.scaleup.in"], 9),
        ({"host": "h", "pcie_bytes_per_s": 3 * GB}, "host", ["p.pcie.out", "d.pcie.in"], 3),
        ({"host": "h"}, "network", ["p.nic.out", "d.nic.in"], 2),
        ({"scaleup_bytes_per_s": 9 * GB, "pcie_bytes_per_s": GB}, "network", ["p.nic.out", "d.nic.in"], 2),
        ({"nic_group": "card"}, "network", ["card.nic.out", "card.nic.in"], 2),
    ],
    ids=["device", "host", "domain", "pcie", "loopback", "network", "one-card"],
)
def test_the_nearest_way_is_taken(shared: dict[str, Any], kind: str, links: list[str], gbytes_per_s: float) -> None:
    path = network(*ends(nic_bytes_per_s=2 * GB, **shared), latency_s=0.5, host_latency_s=0.25).path("p", "d")
    assert path.kind == kind
    assert [r.name for r in path.resources] == links
    assert path.bytes_per_s == gbytes_per_s * GB
    assert path.latency_s == (0.5 if kind == "network" else 0.25)


def test_an_instance_reaches_itself_within_its_device() -> None:
    assert network(*ends()).path("p", "p").kind == "device"


def test_nics_add_up_and_the_narrower_side_counts() -> None:
    wide = Endpoint(name="wide", nic_bytes_per_s=10 * GB, nics=8)
    narrow = Endpoint(name="narrow", nic_bytes_per_s=20 * GB, nics=2)
    assert network(wide, narrow).path("wide", "narrow").bytes_per_s == 40 * GB
    assert network(wide, narrow, nics_per_transfer=1).path("wide", "narrow").bytes_per_s == 10 * GB
    assert network(wide, narrow, nics_per_transfer=9).path("wide", "narrow").bytes_per_s == 40 * GB
    assert network(wide, narrow, core_bytes_per_s=15 * GB).path("wide", "narrow").bytes_per_s == 15 * GB


def test_transfers_limited_to_one_nic_fill_the_others_together() -> None:
    net = network(*ends(nic_bytes_per_s=GB, nics=4), nics_per_transfer=1)
    done: list[float] = []
    for _ in range(5):
        net.transfer("p", "d", GB, lambda _: done.append(net.env.now))
    net.env.run()
    assert done == pytest.approx([1.25] * 5)


def test_a_transport_takes_its_part_of_the_network_only() -> None:
    net = network(
        *ends(nic_bytes_per_s=100 * GB, host="h", pcie_bytes_per_s=GB),
        Endpoint(name="x", nic_bytes_per_s=100 * GB),
        transport=MOONCAKE_ROCE,
    )
    assert net.path("p", "x").bytes_per_s == pytest.approx(MOONCAKE_ROCE.efficiency * 100 * GB)
    assert net.path("p", "x").latency_s == MOONCAKE_ROCE.setup_s
    assert (net.path("p", "d").bytes_per_s, net.path("p", "d").latency_s) == (GB, 0.0)


def test_small_pieces_are_bounded_by_operations() -> None:
    transport = Transport(name="t", setup_s=1e-3, efficiency=0.5, operations_per_s=1e6)
    assert transport.bytes_per_s(10 * GB) == 5 * GB
    assert transport.bytes_per_s(10 * GB, 1000) == 1 * GB
    assert transport.transfer_s(GB, 10 * GB, 1000) == pytest.approx(1.001)
    half = transport.setup_s * transport.bytes_per_s(10 * GB)
    assert half / transport.transfer_s(half, 10 * GB) == pytest.approx(2.5 * GB)


def test_an_accelerators_figures_become_an_endpoint() -> None:
    h100 = hardware("h100-sxm")
    made = endpoint("p", h100, 4, host="h", nic_bytes_per_s=25 * GB)
    assert made.nics * made.nic_bytes_per_s == 100 * GB
    assert made.scaleup_bytes_per_s == 4 * h100.scaleup_bytes_per_s
    assert endpoint("d", h100).nic_bytes_per_s == h100.nic_bytes_per_s


@pytest.mark.parametrize(
    ("sizes", "hosts"), [([4, 4, 4], "001"), ([2, 8, 1], "012"), ([16, 1], "02"), ([6, 4, 2, 2], "0111"), ([], "")], ids=str
)
def test_instances_are_packed_onto_hosts(sizes: list[int], hosts: str) -> None:
    assert list(packed_hosts(sizes)) == [f"host-{h}" for h in hosts]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: network(*ends()).path("p", "d"), "nothing connects p and d"),
        (lambda: network(*ends()).path("p", "dd"), "no instance is called dd; did you mean d?"),
        (lambda: network(*ends(nic_bytes_per_s=GB)).scale_bandwidth("p.nic.ou", 0.5), "did you mean p.nic.out?"),
        (lambda: network(Endpoint(name="p"), Endpoint(name="p")), "two endpoints are called p"),
        (lambda: Endpoint(name="p", nic_bytes_per_s=-1.0), "nic_bytes_per_s is -1.0"),
        (lambda: Endpoint(name="p", pcie_bytes_per_s=inf), "pcie_bytes_per_s is inf"),
        (lambda: Endpoint(name="p", copy_bytes_per_s=0.0), "copy_bytes_per_s is 0.0"),
        (lambda: network(latency_s=-1.0), "latencies of -1.0"),
        (lambda: network(core_bytes_per_s=0.0), "a core of 0.0 bytes/s"),
        (lambda: network(nics_per_transfer=0), "nics_per_transfer is 0"),
        (
            lambda: network(Endpoint(name="p", nic_group="c", nics=1, nic_bytes_per_s=GB), Endpoint(name="d", nic_group="c")),
            "share the NICs c",
        ),
        (lambda: network(Endpoint(name="p", device="g"), Endpoint(name="d", device="g", copy_bytes_per_s=1.0)), "share the device g"),
        (lambda: list(packed_hosts([0])), "an instance of 0 accelerators"),
    ],
)
def test_mistakes_are_named(wrong: Any, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        wrong()
    assert words in str(raised.value)
