"""Where instances sit, which links join two of them, and how fast each link is.

An instance of several accelerators is one `Endpoint`: a transfer is striped over all of its NICs (or scale-up ports), since every
rank moves its own shard of the KV cache, so their bandwidths add up. Bandwidths are for one direction; both run at once.

A path is chosen by how near two instances are: on the same *device*; on the same *host*, over scale-up links where both have them, else
PCIe; or over the *network*.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from pdlab.core.kv_plan import heads_fit, senders
from pdlab.core.types import UsageError
from pdlab.cost.hardware import Hardware
from pdlab.sim.path import Path, Resource
from pdlab.sim.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One instance's place and ports. Bandwidths are bytes/s in one direction, of all its accelerators together except `nic_bytes_per_s`,
    which is one NIC's; 0 means that there is no such port.

    `host` "" is a host of its own, `device` "" devices of its own. Endpoints with the same `scaleup_domain` reach one another over scale-up
    links (NVLink, HCCS) also between hosts. `ranks` hold the `kv_heads` of a sequence (0: not told), each with its part of the ports.
    Endpoints with the same `nic_group` share their NICs, those on one device its copy engine.
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
    copy_bytes_per_s: float = 1e12  # within a device
    ranks: int = 1
    kv_heads: int = 0

    def __post_init__(self) -> None:
        for field in ("nic_bytes_per_s", "nics", "scaleup_bytes_per_s", "pcie_bytes_per_s"):
            if not 0 <= getattr(self, field) < inf:
                raise UsageError(f"{self.name}: {field} is {getattr(self, field)}; give a finite number, 0 for none")
        if not 0 < self.copy_bytes_per_s < inf:
            raise UsageError(f"{self.name}: copy_bytes_per_s is {self.copy_bytes_per_s}; give a finite number above 0")

    def near(self, other: Endpoint) -> str:
        """The port that leads to `other`: "copy", "scaleup", "pcie", "nic", or "" if there is none."""
        if self.name == other.name or (self.device and self.device == other.device):
            return "copy"
        same_host = bool(self.host) and self.host == other.host
        same_domain = same_host or (bool(self.scaleup_domain) and self.scaleup_domain == other.scaleup_domain)
        if same_domain and self.scaleup_bytes_per_s and other.scaleup_bytes_per_s:
            return "scaleup"
        if same_host and self.pcie_bytes_per_s and other.pcie_bytes_per_s:
            return "pcie"
        return "nic" if self.nics * self.nic_bytes_per_s and other.nics * other.nic_bytes_per_s else ""

    def share_sent(self, to: Endpoint) -> float:
        """The part of its ports that a transfer there has: where several ranks hold the same heads, and fewer read, some send nothing."""
        if self.ranks == 1 or not self.kv_heads or not all(heads_fit(self.kv_heads, one.ranks) for one in (self, to)):
            return 1.0
        return min(1.0, senders(self.kv_heads, self.ranks, to.ranks) / self.ranks)


KINDS = {"copy": "device", "scaleup": "host", "pcie": "host", "nic": "network"}


def endpoint(
    name: str, hardware: Hardware, accelerators: int = 1, *, host: str = "", scaleup_domain: str = "", nic_bytes_per_s: float | None = None
) -> Endpoint:
    """The endpoint of an instance on `accelerators` of one kind, each with a NIC of its own. `nic_bytes_per_s` overrides what is typically
    fitted. A copy within device memory reads and writes it, so it runs at half of the memory's bandwidth."""
    return Endpoint(
        name=name,
        host=host,
        scaleup_domain=scaleup_domain,
        nic_bytes_per_s=hardware.nic_bytes_per_s if nic_bytes_per_s is None else nic_bytes_per_s,
        nics=accelerators,
        scaleup_bytes_per_s=hardware.scaleup_bytes_per_s * accelerators,
        pcie_bytes_per_s=hardware.pcie_bytes_per_s * accelerators,
        copy_bytes_per_s=hardware.hbm_bytes_per_s * accelerators / 2,
    )


def packed_hosts(accelerators: Iterable[int], per_host: int = 8) -> Iterator[str]:
    """A host name for each instance of so many accelerators, filled in order. An instance never straddles hosts it could fit into; one that
    is larger than a host takes whole hosts, of which the first names it. Raises UsageError for an instance of none."""
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


class NetworkTopology:
    """The endpoints, resources and paths of one cluster. The figures are described in `link.Network`, which owns it."""

    def __init__(
        self,
        *,
        latency_s: float,
        host_latency_s: float,
        transport: Transport,
        piece_bytes: float,
        core_bytes_per_s: float,
        nics_per_transfer: int | None,
        now: float,
    ) -> None:
        if not (latency_s >= 0.0 and host_latency_s >= 0.0):
            raise UsageError(f"network latencies of {latency_s} and {host_latency_s} s; they can't be negative")
        if not (core_bytes_per_s > 0.0 and piece_bytes > 0.0):
            raise UsageError(f"a core of {core_bytes_per_s} bytes/s, pieces of {piece_bytes} bytes; give numbers above 0")
        if nics_per_transfer is not None and nics_per_transfer < 1:
            raise UsageError(f"nics_per_transfer is {nics_per_transfer}; give at least 1")
        self.latency_s, self.host_latency_s = latency_s, host_latency_s
        self.transport, self.piece_bytes, self.nics_per_transfer = transport, piece_bytes, nics_per_transfer
        self.endpoints: dict[str, Endpoint] = {}
        self.resources: dict[str, Resource] = {}
        self.ports: dict[str, dict[str, Resource]] = {}  # by endpoint, then "nic.out", "nic.in", ..., "copy"
        self.paths: dict[tuple[str, str], Path] = {}
        self._core = () if core_bytes_per_s == inf else (self._resource("core", core_bytes_per_s, now),)

    def add(self, endpoint: Endpoint, now: float) -> None:
        """An instance comes up, perhaps again: links keep their counts and faults by name. Raises UsageError for a name in use, and when it
        describes what it shares with another endpoint otherwise."""
        name = endpoint.name
        if name in self.endpoints:
            raise UsageError(f"two endpoints are called {name}; give each instance its own name")
        for other in self.endpoints.values():
            if (
                endpoint.nic_group
                and endpoint.nic_group == other.nic_group
                and self.nic_bytes_per_s(endpoint) != self.nic_bytes_per_s(other)
            ):
                raise UsageError(f"{name} and {other.name} share the NICs {other.nic_group}; give them the same number and bandwidth")
            if endpoint.device and endpoint.device == other.device and endpoint.copy_bytes_per_s != other.copy_bytes_per_s:
                raise UsageError(f"{name} and {other.name} share the device {other.device}; give them the same copy_bytes_per_s")
        ports: dict[str, Resource] = {}
        for port, owner, bytes_per_s in (
            ("nic", endpoint.nic_group or name, self.nic_bytes_per_s(endpoint)),
            ("scaleup", name, endpoint.scaleup_bytes_per_s),
            ("pcie", name, endpoint.pcie_bytes_per_s),
        ):
            if bytes_per_s:
                for way in ("out", "in"):
                    ports[f"{port}.{way}"] = self._resource(f"{owner}.{port}.{way}", bytes_per_s, now)
        ports["copy"] = self._resource(f"{endpoint.device or name}.copy", endpoint.copy_bytes_per_s, now)
        self.endpoints[name], self.ports[name] = endpoint, ports

    def remove(self, name: str) -> list[Path]:
        """An instance is gone: forget its paths, which are returned."""
        gone = [path for path in self.paths.values() if name in (path.src, path.dst)]
        for path in gone:
            for resource in path.resources:
                resource.paths.remove(path)
            del self.paths[path.src, path.dst]
        del self.endpoints[name], self.ports[name]
        return gone

    def path(self, src: str, dst: str) -> Path:
        """From one instance to another. Raises UsageError where one is unknown or nothing connects the two."""
        path = self.paths.get((src, dst))
        if path is None:
            path = self.paths[src, dst] = self._find_path(src, dst)
            for resource in path.resources:
                resource.paths.append(path)
        return path

    def named(self, name: str) -> list[Resource]:
        """The resource of this name, or an instance's ports (shared ones included). Raises UsageError where there is neither."""
        if name in self.ports:
            return list(self.ports[name].values())
        if name not in self.resources:
            raise UsageError(f"no instance or link is called {name}{_nearest(name, [*self.ports, *self.resources])}")
        return [self.resources[name]]

    def nic_bytes_per_s(self, endpoint: Endpoint) -> float:
        """What all its NICs achieve together."""
        return self.transport.bytes_per_s(endpoint.nics * endpoint.nic_bytes_per_s, self.piece_bytes)

    def _find_path(self, src: str, dst: str) -> Path:
        for name in (src, dst):
            if name not in self.endpoints:
                raise UsageError(f"no instance is called {name}{_nearest(name, self.endpoints)}")
        a, b = self.endpoints[src], self.endpoints[dst]
        port = a.near(b)
        if not port:
            raise UsageError(f"nothing connects {src} and {dst}; give both nic_bytes_per_s, or put them on one host")
        kind, out, into = KINDS[port], self.ports[src], self.ports[dst]
        if port == "copy":
            return Path(src, dst, kind, (out["copy"],), self.host_latency_s)
        ends = (out[f"{port}.out"], into[f"{port}.in"])
        share = a.share_sent(b)
        most = share * ends[0].nominal_bytes_per_s if share < 1.0 else inf
        if kind == "host":
            return Path(src, dst, kind, ends, self.host_latency_s, most)
        if self.nics_per_transfer is not None:
            most = min(most, *(self.nic_bytes_per_s(x) * min(1.0, self.nics_per_transfer / x.nics) for x in (a, b)))
        return Path(src, dst, kind, (*ends, *self._core), self.latency_s + self.transport.setup_s, most)

    def _resource(self, name: str, bytes_per_s: float, now: float) -> Resource:
        resource = self.resources.get(name)
        if resource is None:
            resource = self.resources[name] = Resource(name, bytes_per_s, now)
        elif resource.nominal_bytes_per_s != bytes_per_s:
            resource.rescale(bytes_per_s, resource.factor, now)
        return resource


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(known[:8])}" if known else ""
