"""What a transfer flows through.

A `Resource` is one direction of something with a bandwidth: an instance's NICs out, its NICs in, its scale-up or PCIe ports, a device's
copy engine, a switch core. A `Path` is the resources between two instances (`topology` finds it). A `Transfer` is bytes on their way
along one; `link.Network` moves it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from pdlab.results.records import LinkUse
from pdlab.sim.due_call import DueCall

WAITING, ALONE, SHARING, IDLE, ENDED = range(5)  # ALONE and SHARING are in their resources' `flows`, the others are not


class Transfer:
    """Bytes on their way; changed only by its network. `failed` once it was cancelled, `done` then is never called."""

    __slots__ = (
        "charged_bytes",
        "done",
        "end_s",
        "failed",
        "fair_bytes_per_s",
        "fixed",
        "left_bytes",
        "limit_bytes_per_s",
        "mark",
        "open",
        "owner",
        "path",
        "rate_bytes_per_s",
        "since_s",
        "size_bytes",
        "state",
        "wake",
        "wake_s",
    )

    def __init__(
        self, path: Path, size_bytes: float, done: Callable[[Transfer], None], limit_bytes_per_s: float, open: bool, owner: Any
    ) -> None:
        self.path = path
        self.size_bytes = self.left_bytes = size_bytes  # in all; still to deliver at `since_s`
        self.done = done
        self.limit_bytes_per_s = limit_bytes_per_s
        self.open = open
        self.owner = owner
        self.failed = False
        self.charged_bytes = 0.0  # that its resources have counted
        self.wake: DueCall | None = None  # the only event it listens to, and that one's time
        self.wake_s = inf
        self.mark = self.fixed = 0  # scratch of Network._share
        # Set when it joins: state, since_s (flows, or will, at this rate since then), rate_bytes_per_s, end_s.
        self.state: int
        self.since_s: float
        self.rate_bytes_per_s: float
        self.end_s: float
        self.fair_bytes_per_s: float

    def left_at(self, now: float) -> float:
        """Bytes to deliver at `now`, if no event lies between."""
        flown_s = now - self.since_s
        if self.state not in (ALONE, SHARING) or flown_s <= 0.0:
            return self.left_bytes
        return max(0.0, self.left_bytes - self.rate_bytes_per_s * flown_s)

    @property
    def ended(self) -> bool:
        return self.state == ENDED

    def __repr__(self) -> str:
        state = ("waiting", "alone", "sharing", "idle", "ended")[self.state]
        return f"<{self.path.src} -> {self.path.dst} {self.size_bytes:.4g} B, {state}>"


class Resource:
    """One direction of a link. `flows` are the transfers on it; one that is alone may not have begun to flow yet. Only the network changes
    it."""

    __slots__ = (
        "busy_s",
        "busy_since_s",
        "bytes",
        "bytes_per_s",
        "capacity_bytes",
        "capacity_since_s",
        "factor",
        "flows",
        "left_bytes_per_s",
        "mark",
        "name",
        "nominal_bytes_per_s",
        "paths",
        "peak_flows",
        "since_s",
        "unfixed",
    )

    def __init__(self, name: str, bytes_per_s: float, now: float) -> None:
        self.name = name
        self.nominal_bytes_per_s = self.bytes_per_s = bytes_per_s
        self.factor = 1.0  # faults: bytes_per_s = nominal * factor
        self.flows: dict[Transfer, None] = {}
        self.paths: list[Path] = []
        self.bytes = 0.0  # of transfers that have left it
        self.busy_s = 0.0  # until it was last empty
        self.busy_since_s = 0.0
        self.capacity_bytes = 0.0  # it could have carried until `capacity_since_s`
        self.since_s = self.capacity_since_s = now
        self.peak_flows = 0
        self.mark = 0  # scratch while rates are shared out
        self.unfixed = 0
        self.left_bytes_per_s = 0.0

    def __repr__(self) -> str:
        return f"<{self.name} {self.bytes_per_s:.4g} B/s, {len(self.flows)} flows>"

    def rescale(self, nominal_bytes_per_s: float, factor: float, now: float) -> None:
        """Another bandwidth from now on."""
        self.capacity_bytes += self.bytes_per_s * (now - self.capacity_since_s)
        self.capacity_since_s = now
        self.nominal_bytes_per_s, self.factor = nominal_bytes_per_s, factor
        self.bytes_per_s = nominal_bytes_per_s * factor
        for path in self.paths:
            path.refresh()

    def use(self, now: float) -> LinkUse:
        """What it did until now. Utilisation is of the bandwidth it had, faults taken into account; busy counts stalled transfers too."""
        carried, busy_s = self.bytes, self.busy_s
        for transfer in self.flows:
            carried += transfer.size_bytes - transfer.left_at(now) - transfer.charged_bytes
        if self.flows:
            busy_s += max(0.0, now - self.busy_since_s)
        could = self.capacity_bytes + self.bytes_per_s * (now - self.capacity_since_s)
        up_s = now - self.since_s
        return LinkUse(
            name=self.name,
            bytes=carried,
            capacity_bytes_per_s=self.nominal_bytes_per_s,
            busy_fraction=busy_s / up_s if up_s > 0.0 else 0.0,
            utilisation=carried / could if could > 0.0 else 0.0,
            peak_flows=max(self.peak_flows, 1 if carried > 0.0 else 0),
        )


class Path:
    """From one instance to another; read only. `kind` is "device", "host" or "network". `bytes_per_s` is what a transfer gets alone,
    `flow_bytes_per_s` the most that any one may take."""

    __slots__ = ("bytes_per_s", "dst", "flow_bytes_per_s", "kind", "latency_s", "resources", "src")

    def __init__(
        self, src: str, dst: str, kind: str, resources: tuple[Resource, ...], latency_s: float, flow_bytes_per_s: float = inf
    ) -> None:
        self.src, self.dst, self.kind, self.resources, self.latency_s = src, dst, kind, resources, latency_s
        self.flow_bytes_per_s = flow_bytes_per_s
        self.bytes_per_s = 0.0
        self.refresh()

    def __repr__(self) -> str:
        return f"<{self.src} -> {self.dst} {self.kind} {self.bytes_per_s:.4g} B/s>"

    def refresh(self) -> None:
        """A resource has another bandwidth."""
        self.bytes_per_s = min([self.flow_bytes_per_s, *(r.bytes_per_s for r in self.resources)])
