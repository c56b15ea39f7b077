"""Seconds of collectives among an instance's accelerators, by message size, ranks and link.

all-reduce of n bytes over r ranks: the quickest of

    one-shot   L(r) + (r - 1) n / b                 each rank reads all others' messages: small messages, NVLink and PCIe peers
    ring       2 (r - 1) h + 2 (r - 1) / r n / b    Patarasuk and Yuan (2009)
    switch     1.5 L(r) + (r + 1) / r n / b         the switch adds (NVLS, NVLink SHARP); scale-up links only

L(r) is the latency of a one-shot kernel: 6, 10, 16, 20, 24, 28 us at 2, 4, 8, 16, 32, 64 ranks over NVLink, linear in log2 r between;
h is a hop of the ring. b is the bandwidth of one rank in one direction, times what is achieved of it. Latencies count
`collective_latency` times.

all-to-all (expert parallelism under data-parallel attention), there and back: 2 L(r), and each rank sends its share of the tokens to the
ranks of their k experts, to each once, in eight bits there and in sixteen back. Beyond a host only what leaves it counts. So it is within
11 % of the latencies that DeepEP publishes of 16 to 256 H800 (its low-latency kernels, 128 tokens of DeepSeek-V3 a rank; a test has them).

What a link achieves besides: PCIe between peers all of its fraction; PCIe without peer access (consumer and workstation boards) copies
through the host's memory, at about a quarter of that and a latency of 20 us more. Between hosts a message takes 30 us more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import log2
from typing import Any, TypeAlias

from pdlab.cost.hardware import Hardware

Quantity: TypeAlias = Any  # a float, or an array of one value for each of several instances
_ONE_SHOT_S = (0.0, 6e-6, 10e-6, 16e-6, 20e-6, 24e-6, 28e-6)  # at 1, 2, 4, ... ranks
_HOP_S = {"scale-up": 2e-6, "pcie": 4e-6, "host": 12e-6, "network": 15e-6}
_MORE_S = {"scale-up": 0.0, "pcie": 4e-6, "host": 20e-6, "network": 30e-6}
_SHARE = {"scale-up": 1.0, "pcie": 0.7, "host": 0.22, "network": 0.9}
_NO_PEER = ("rtx",)  # boards whose driver has no peer access over PCIe


class LinkKind(StrEnum):
    """What an instance's collectives cross."""

    SCALE_UP = "scale-up"
    PCIE = "pcie"
    HOST = "host"  # PCIe without peer access
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Ring:
    """`ranks` that work together over one kind of link: what of an all-reduce does not depend on what is achieved of it. Seconds, and bytes
    a second at the line rate's share that this link reaches."""

    ranks: Quantity
    one_shot_s: Quantity
    ring_s: Quantity
    switch_s: Quantity  # infinite where no switch adds
    bytes_per_s: Quantity


def link_kind(hardware: Hardware, ranks: int) -> LinkKind:
    """Scale-up inside its domain, PCIe in a host of eight, the network beyond."""
    if ranks <= hardware.scaleup_domain and hardware.scaleup_bytes_per_s:
        return LinkKind.SCALE_UP
    if ranks > 8:
        return LinkKind.NETWORK
    return LinkKind.HOST if hardware.name.startswith(_NO_PEER) else LinkKind.PCIE


def crossing_share(hardware: Hardware, ranks: int) -> float:
    """Of an all-to-all's messages, how many cross the slowest link: those that leave a host, where ranks are on several."""
    if link_kind(hardware, ranks) is not LinkKind.NETWORK:
        return 1.0
    return (ranks - max(8, hardware.scaleup_domain)) / (ranks - 1)


def one_shot_s(ranks: int) -> float:
    """L(r) over NVLink."""
    place = log2(max(1, ranks))
    below = min(int(place), len(_ONE_SHOT_S) - 2)
    return _ONE_SHOT_S[below] + (place - below) * (_ONE_SHOT_S[below + 1] - _ONE_SHOT_S[below])


def ring_of(hardware: Hardware, ranks: int) -> Ring:
    """How `ranks` of these accelerators reach each other."""
    if ranks < 2:
        return Ring(1.0, 0.0, 0.0, 0.0, 1.0)
    kind = link_kind(hardware, ranks)
    latency_s = one_shot_s(ranks) + _MORE_S[kind]
    switched = kind is LinkKind.SCALE_UP and hardware.vendor == "nvidia" and hardware.scaleup_domain >= 8 and hardware.family != "a100"
    return Ring(
        ranks=float(ranks),
        one_shot_s=latency_s,
        ring_s=2 * (ranks - 1) * _HOP_S[kind],
        switch_s=1.5 * latency_s if switched else 1.0,
        bytes_per_s=hardware.link_bytes_per_s(ranks) * _SHARE[kind],
    )


def lesser(a: Quantity, b: Quantity) -> Quantity:
    """The smaller of two, of each pair where they are arrays."""
    return 0.5 * (a + b - abs(a - b))


def all_reduce_s(ring: Ring, size: Quantity, achieved: Quantity, latency: Quantity) -> Quantity:
    """Seconds of one all-reduce of `size` bytes, at these shares of the link's bandwidth and multiples of its latencies."""
    byte_s = size / (ring.bytes_per_s * achieved)
    others = ring.ranks - 1.0
    one_shot = ring.one_shot_s * latency + others * byte_s
    ring_s = ring.ring_s * latency + 2.0 * others / ring.ranks * byte_s
    switch = ring.switch_s * latency + (ring.ranks + 1.0) / ring.ranks * byte_s
    return lesser(lesser(one_shot, ring_s), switch) * (others > 0)


def all_to_all_s(ring: Ring, size: Quantity, achieved: Quantity, latency: Quantity) -> Quantity:
    """Seconds of dispatch and combine, in which each rank sends and receives `size` bytes in all."""
    return (2.0 * ring.one_shot_s * latency + size / (ring.bytes_per_s * achieved)) * (ring.ranks > 1.0)
