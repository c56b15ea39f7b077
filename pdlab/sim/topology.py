"""Where instances sit and how fast each can talk: endpoints, hosts, and what a transport achieves of a NIC's line rate.

An instance of several accelerators is one `Endpoint`: a transfer is striped over all of its NICs (or scale-up ports), since every
rank moves its own shard of the KV cache, so their bandwidths add up. Bandwidths are for one direction; both run at once.

A `Transport` turns a line rate into what transfers see. Two constants do for whole messages: t(size) = setup + size / (efficiency * line).
Small messages then reach a small part of the line rate, half of the achievable one at size = setup * efficiency * line. A third,
operations per second, limits transports that post one operation for each contiguous piece, as KV blocks scattered over memory need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from pdlab.cost.shapes import Hardware
from pdlab.types import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One instance's place and ports. Bandwidths are bytes/s in one direction, of all its accelerators together except `nic_bytes_per_s`,
    which is one NIC's; 0 means that there is no such port.

    `host` "" is a host of its own, `device` "" devices of its own. Endpoints with the same `scaleup_domain` (default: the host) reach
    one another over scale-up links (NVLink, HCCS) also between hosts. Endpoints with the same `nic_group` share their NICs.
    """

    name: str
    host: str = ""
    device: str = ""
    nic_bytes_per_s: float = 0.0
    nics: int = 1
    nic_group: str = ""
    scaleup_bytes_per_s: float = 0.0
    scaleup_domain: str = ""
    pcie_bytes_per_s: float = 0.0
    device_bytes_per_s: float = inf  # copying within one device, shared by all who do so there

    def __post_init__(self) -> None:
        for field in ("nic_bytes_per_s", "nics", "scaleup_bytes_per_s", "pcie_bytes_per_s", "device_bytes_per_s"):
            value = getattr(self, field)
            if not value >= 0:
                raise UsageError(f"{self.name}: {field} is {value}; give a number that is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """What moving KV costs on top of the wire. `setup_s` is spent before a transfer's first byte, `efficiency` is the achieved part of the
    line rate for large messages, `operations_per_s` (one endpoint's, all NICs together) bounds transfers of small pieces."""

    name: str
    setup_s: float = 0.0
    efficiency: float = 1.0
    operations_per_s: float = inf
    source: str = ""

    def bytes_per_s(self, line_bytes_per_s: float, piece_bytes: float = inf) -> float:
        """Bytes/s that long transfers of pieces of `piece_bytes` reach on links of `line_bytes_per_s`."""
        bound = self.operations_per_s * piece_bytes if self.operations_per_s < inf and piece_bytes < inf else inf
        return min(line_bytes_per_s * self.efficiency, bound)

    def transfer_s(self, size_bytes: float, line_bytes_per_s: float, piece_bytes: float = inf) -> float:
        """Seconds for one transfer alone."""
        return self.setup_s + size_bytes / self.bytes_per_s(line_bytes_per_s, piece_bytes)


IDEAL = Transport(name="ideal", source="the line rate, no set-up")

MOONCAKE_ROCE = Transport(
    name="mooncake-roce",
    setup_s=404e-6,
    efficiency=0.699,
    source="least worst error over nine transfers of 20 MB to 4.5 GB between two 8 x 400 Gb/s RoCE hosts (H800), Mooncake under vLLM v1: "
    "kvcache-ai/Mooncake@3b5a594 docs/source/performance/vllm/vllm-v1-pd-performance.md",
)

MOONCAKE_EFA = Transport(
    name="mooncake-efa",
    efficiency=0.87,
    operations_per_s=1.48e6,
    source="six piece sizes of 64 KiB to 2 MiB on AWS p5en (16 x 200 Gb/s EFA), bandwidths only, so no set-up: "
    "kvcache-ai/Mooncake@3b5a594 docs/source/design/transfer-engine/efa_transport.md",
)

TRANSPORTS = (IDEAL, MOONCAKE_ROCE, MOONCAKE_EFA)


def endpoint(
    name: str, hardware: Hardware, accelerators: int = 1, *, host: str = "", scaleup_domain: str = "", nic_bytes_per_s: float | None = None
) -> Endpoint:
    """The endpoint of an instance on `accelerators` of one kind, each with a NIC of its own. `nic_bytes_per_s` overrides what is typically
    fitted."""
    return Endpoint(
        name=name,
        host=host,
        scaleup_domain=scaleup_domain,
        nic_bytes_per_s=hardware.nic_bytes_per_s if nic_bytes_per_s is None else nic_bytes_per_s,
        nics=accelerators,
        scaleup_bytes_per_s=hardware.scaleup_bytes_per_s * accelerators,
        pcie_bytes_per_s=hardware.pcie_bytes_per_s * accelerators,
    )


def packed_hosts(accelerators: Iterable[int], per_host: int = 8) -> Iterator[str]:
    """A host name for each instance of so many accelerators, filled in order. An instance never straddles hosts it could fit into; one that
    is larger than a host takes whole hosts, of which the first names it."""
    host, used = 0, 0
    for wanted in accelerators:
        if wanted < 1:
            raise UsageError(f"an instance of {wanted} accelerators; give at least 1")
        if used and used + wanted > per_host:
            host, used = host + 1, 0
        yield f"host-{host}"
        used += wanted
        if used >= per_host:
            host, used = host + -(-used // per_host), 0
