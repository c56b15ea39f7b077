"""RDMA NICs as sysfs lists them, and which of them are nearest to a PCIe device (a GPU); the addresses of NPUs' own NICs."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
HCCN = Path("/etc/hccn.conf")
_PCI = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


@dataclass(frozen=True, slots=True)
class Nic:
    """An RDMA device with at least one port. `port` is an active one's number, else the first's; `pci` is the path of bridges down to
    it, its own address last, empty where it is virtual (rxe, siw). `link`: "InfiniBand" or "Ethernet" (RoCE)."""

    name: str
    port: int
    active: bool
    link: str
    bits_per_s: float
    numa: int
    pci: tuple[str, ...]

    @property
    def ucx_name(self) -> str:
        """As UCX_NET_DEVICES takes it."""
        return f"{self.name}:{self.port}"


def nics(sysfs: Path | None = None) -> list[Nic]:
    """All of them, by name; none where the machine has none."""
    sysfs = sysfs or SYSFS
    root = sysfs / "class" / "infiniband"
    found = (_nic(path, sysfs) for path in sorted(root.iterdir())) if root.is_dir() else ()
    return [nic for nic in found if nic is not None]


def nearest(pci: str, sysfs: Path | None = None) -> list[Nic]:
    """The active NICs nearest to the PCIe device `pci` ("0000:3b:00.0"), by name: those with the longest shared path of bridges, of these
    those on the same NUMA node, of these the fastest; none where there is no active one."""
    sysfs = sysfs or SYSFS
    device = sysfs / "bus" / "pci" / "devices" / pci.lower()
    path, numa = _pci_path(device), _number(device / "numa_node", -1)

    def nearness(nic: Nic) -> tuple[int, bool, float]:
        shared = 0
        for ours, theirs in zip(path, nic.pci, strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared, numa >= 0 and nic.numa == numa, nic.bits_per_s

    active = [nic for nic in nics(sysfs) if nic.active]
    best = max(map(nearness, active), default=None)
    return [nic for nic in active if nearness(nic) == best]


def _nic(path: Path, sysfs: Path) -> Nic | None:
    folder = path / "ports"
    ports = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not ports:
        return None
    up = [port for port in ports if _text(folder / str(port) / "state").startswith("4")]  # "4: ACTIVE"
    port = (up or ports)[0]
    rate = re.match(r"[\d.]+", _text(folder / str(port) / "rate"))  # "200 Gb/sec (4X HDR)"
    return Nic(
        path.name,
        port,
        bool(up),
        _text(folder / str(port) / "link_layer") or "unknown",
        float(rate[0]) * 1e9 if rate else 0.0,
        _number(path / "device" / "numa_node", -1),
        _pci_path(path / "device"),
    )


def _pci_path(device: Path) -> tuple[str, ...]:
    """Addresses from the root complex down to the device. The root's own name ("pci0000:3a") counts: two devices under it are nearer."""
    if not device.exists():
        return ()
    return tuple(part for part in device.resolve().parts if _PCI.fullmatch(part) or re.fullmatch(r"pci[0-9a-f]{4,}:[0-9a-f]{2}", part))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, otherwise: int) -> int:
    try:
        return int(_text(path))
    except ValueError:
        return otherwise


def npu_address(index: int, environ: Mapping[str, str], hccn: Path | None = None) -> str:
    """Of the NPU that this process numbers `index`, where ASCEND_RT_VISIBLE_DEVICES may say which those are; empty where it is unknown."""
    visible = environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    with contextlib.suppress(ValueError, IndexError):
        return npu_addresses(hccn).get(int(visible.split(",")[index]) if visible else index, "")
    return ""


def npu_addresses(hccn: Path | None = None) -> dict[int, str]:
    """The network address of each Ascend NPU's own NIC, by device number, from lines such as `address_0=192.168.100.101`; none where the
    file is not there. What is no IP address is left out."""
    found: dict[int, str] = {}
    for line in _text(hccn or HCCN).splitlines():
        if match := re.fullmatch(r"\s*address_(\d{1,4})\s*=\s*(\S+)\s*", line):
            with contextlib.suppress(ValueError):
                found[int(match[1])] = str(ipaddress.ip_address(match[2]))
    return found


def gpus(sysfs: Path | None = None) -> list[str]:
    """PCI addresses of accelerators: display controllers of NVIDIA and AMD, and processing accelerators, in the order of the bus."""
    folder = (sysfs or SYSFS) / "bus" / "pci" / "devices"
    found = []
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind, vendor = _text(device / "class"), _text(device / "vendor")
        if kind.startswith("0x12") or (kind.startswith("0x03") and vendor in ("0x10de", "0x1002")):
            found.append(device.name)
    return found


def assignments(place: str, environ: Mapping[str, str], sysfs: Path | None = None, hccn: Path | None = None) -> list[str]:
    """KVCACHE_RDMA_NICS=, as FastDeploy reads it, and UCX_NET_DEVICES=, as UCX does: "gpu" has one NIC for each GPU that
    CUDA_VISIBLE_DEVICES leaves, the nearest, and those that are as near in turn; "cpu" the fastest of each NUMA node. Then address_N= of
    each NPU. What this machine has not is left out."""
    chosen = _nearest_gpus(environ, sysfs) if place == "gpu" else _of_nodes(sysfs)
    lines = []
    if chosen:
        lines.append(f"KVCACHE_RDMA_NICS={','.join(nic.name for nic in chosen)}")
        lines.append(f"UCX_NET_DEVICES={','.join(dict.fromkeys(nic.ucx_name for nic in chosen))}")
    return [*lines, *(f"address_{number}={address}" for number, address in sorted(npu_addresses(hccn).items()))]


def _nearest_gpus(environ: Mapping[str, str], sysfs: Path | None) -> list[Nic]:
    there = gpus(sysfs)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.fullmatch(r"\d+(,\d+)*", visible):
        there = [there[index] for index in map(int, visible.split(",")) if index < len(there)]
    near = [nearest(pci, sysfs) for pci in there]
    return [some[at % len(some)] for at, some in enumerate(near) if some]


def _of_nodes(sysfs: Path | None) -> list[Nic]:
    best: dict[int, Nic] = {}
    for nic in nics(sysfs):
        if nic.active and (nic.numa not in best or nic.bits_per_s > best[nic.numa].bits_per_s):
            best[nic.numa] = nic
    return [best[node] for node in sorted(best)]
