"""The simulated network: transfers between instances share links by max-min fairness.

A *resource* is one direction of something with a bandwidth: an instance's NICs out, its NICs in, its scale-up or PCIe ports, a device's
copy engine, a switch core. A *path* is the resources between two instances, chosen by how near they are: on the same *device*, on the
same *host* (scale-up links where both have them, else PCIe), or over the *network*. A *transfer* waits out its path's latency, then
flows through all of its path's resources at one rate until its bytes are delivered.

Rates are max-min fair with a limit for each transfer: all rise together until a resource is full or a limit is reached, those
concerned stay there, the others go on rising. So no transfer could be faster without slowing one that is no faster than itself. (Source:
progressive filling, Bertsekas and Gallager, Data Networks, 6.5.2.) Rates change only when a transfer starts, ends or gets another
limit, or a resource another bandwidth, and then only for the transfers that are connected to it through shared resources; in
between everything is linear, so this is the exact fluid solution and bytes are conserved.

Most transfers meet nobody. One that finds its whole path empty is *alone*: it is entered at once, even while it waits out its latency,
and costs one SimPy event, its end. Should another start on its path, it is made to share if it is flowing by then, or to wait for
its start like any other if it is not. Events are never cancelled: each transfer knows the one it listens to. One that comes
too early, since the transfer was slowed meanwhile, is answered by waiting again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from math import inf

import simpy

from pdlab.records import LinkUse
from pdlab.sim.topology import IDEAL, Endpoint, Transport
from pdlab.types import UsageError

WAITING, ALONE, SHARING, IDLE, ENDED = range(5)  # ALONE and SHARING are in their resources' `flows`, the others are not


class Resource:
    """One direction of a link. `flows` are the transfers on it; one that is alone may not have begun to flow yet."""

    __slots__ = (
        "bytes",
        "bytes_per_s",
        "busy_s",
        "busy_since_s",
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
        self.mark = 0  # scratch of Network._share
        self.unfixed = 0
        self.left_bytes_per_s = 0.0

    def __repr__(self) -> str:
        return f"<{self.name} {self.bytes_per_s:.4g} B/s, {len(self.flows)} flows>"


class Path:
    """From one instance to another; read only. `bytes_per_s` is what a transfer gets alone, `flow_bytes_per_s` the most it may take."""

    __slots__ = ("bytes_per_s", "dst", "flow_bytes_per_s", "kind", "latency_s", "resources", "src")

    def __init__(
        self, src: str, dst: str, kind: str, resources: tuple[Resource, ...], latency_s: float, flow_bytes_per_s: float = inf
    ) -> None:
        self.src, self.dst, self.kind, self.resources, self.latency_s = src, dst, kind, resources, latency_s
        self.flow_bytes_per_s = flow_bytes_per_s
        self.bytes_per_s = 0.0
        self.refresh()

    def refresh(self) -> None:
        self.bytes_per_s = min([self.flow_bytes_per_s, *(r.bytes_per_s for r in self.resources)])

    def __repr__(self) -> str:
        return f"<{self.src} -> {self.dst} {self.kind} {self.bytes_per_s:.4g} B/s>"


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
        self, path: Path, size_bytes: float, done: Callable[[Transfer], None], limit_bytes_per_s: float, open: bool, owner: object
    ) -> None:
        self.path = path
        self.size_bytes = self.left_bytes = size_bytes  # in all; still to deliver at `since_s`
        self.done = done
        self.limit_bytes_per_s = limit_bytes_per_s
        self.open = open
        self.owner = owner
        self.failed = False
        self.charged_bytes = 0.0  # that its resources have counted
        self.wake: _Wake | None = None  # the only event it listens to, and that one's time
        self.wake_s = inf
        self.mark = self.fixed = 0  # scratch of Network._share
        # Set when it joins: state, since_s (flows, or will, at this rate since then), rate_bytes_per_s, end_s.
        self.state: int
        self.since_s: float
        self.rate_bytes_per_s: float
        self.end_s: float
        self.fair_bytes_per_s: float

    @property
    def ended(self) -> bool:
        return self.state == ENDED

    def __repr__(self) -> str:
        state = ("waiting", "alone", "sharing", "idle", "ended")[self.state]
        return f"<{self.path.src} -> {self.path.dst} {self.size_bytes:.4g} B, {state}>"


class _Wake(simpy.Event):
    """A timeout born with its callbacks, which all of them share."""

    def __init__(self, env: simpy.Environment, delay_s: float, callbacks: list[Callable[[_Wake], None]], transfer: Transfer) -> None:
        self.env = env
        self.callbacks = callbacks  # type: ignore[assignment]
        self._value = None
        self._ok = True
        self.transfer = transfer
        env.schedule(self, simpy.events.NORMAL, delay_s)


class Network:
    """All links of one simulated cluster.

    `latency_s` delays every transfer over the network, on top of the transport's set-up; `host_latency_s` those within a host or device.
    `transport` and `piece_bytes` (contiguous pieces that KV moves in) say what is achieved of the NICs' line rate. `core_bytes_per_s` is
    a switch core that all network paths share, for oversubscribed fabrics. `nics_per_transfer` limits how many NICs one transfer
    stripes over; all of both sides by default.
    """

    def __init__(
        self,
        env: simpy.Environment,
        endpoints: Iterable[Endpoint] = (),
        *,
        latency_s: float = 0.0,
        host_latency_s: float = 0.0,
        transport: Transport = IDEAL,
        piece_bytes: float = inf,
        core_bytes_per_s: float = inf,
        nics_per_transfer: int | None = None,
    ) -> None:
        self.env = env
        self.latency_s, self.host_latency_s = latency_s, host_latency_s
        self.transport, self.piece_bytes, self.nics_per_transfer = transport, piece_bytes, nics_per_transfer
        self.endpoints: dict[str, Endpoint] = {}
        self.resources: dict[str, Resource] = {}
        self._ports: dict[str, dict[str, Resource]] = {}  # by endpoint, then "nic.out", "nic.in", ...
        self._paths: dict[tuple[str, str], Path] = {}
        self._parked: dict[Transfer, None] = {}  # waiting or idle
        self._woken_callbacks = [self._woken]
        self._marks = 0
        self._core = self._resource("core", core_bytes_per_s) if core_bytes_per_s < inf else None
        for endpoint in endpoints:
            self.add(endpoint)

    # ------------------------------------------------------------ topology

    def add(self, endpoint: Endpoint) -> None:
        """An instance comes up, perhaps again: links keep their counts and faults by name. Raises UsageError when it shares NICs with an
        endpoint that describes them otherwise."""
        name = endpoint.name
        if name in self.endpoints:
            raise UsageError(f"two endpoints are called {name}; give each instance its own name")
        nic = endpoint.nic_group or name
        for other in self.endpoints.values():
            shared = nic == (other.nic_group or other.name)
            if shared and (other.nics, other.nic_bytes_per_s) != (endpoint.nics, endpoint.nic_bytes_per_s):
                raise UsageError(f"{name} and {other.name} share the NICs {nic} but give them different numbers or bandwidths")
        ports: dict[str, Resource] = {}
        for port, owner, bytes_per_s in (
            ("nic", nic, self.transport.bytes_per_s(endpoint.nics * endpoint.nic_bytes_per_s, self.piece_bytes)),
            ("scaleup", name, endpoint.scaleup_bytes_per_s),
            ("pcie", name, endpoint.pcie_bytes_per_s),
        ):
            if 0.0 < bytes_per_s < inf:
                ports[f"{port}.out"] = self._resource(f"{owner}.{port}.out", bytes_per_s)
                ports[f"{port}.in"] = self._resource(f"{owner}.{port}.in", bytes_per_s)
        if endpoint.device_bytes_per_s < inf:
            ports["copy"] = self._resource(f"{endpoint.device or name}.copy", endpoint.device_bytes_per_s)
        self.endpoints[name] = endpoint
        self._ports[name] = ports

    def remove(self, name: str) -> list[Transfer]:
        """An instance is gone. Its transfers are cancelled and returned, in a fixed order; their `done` is not called."""
        found = {t: None for t in self._parked if name in (t.path.src, t.path.dst)}
        for path in [path for path in self._paths.values() if name in (path.src, path.dst)]:
            for resource in path.resources:
                found.update((t, None) for t in resource.flows if t.path is path)
                resource.paths.remove(path)
            del self._paths[path.src, path.dst]
        for transfer in found:
            self.cancel(transfer)
        del self.endpoints[name], self._ports[name]
        return list(found)

    def path(self, src: str, dst: str) -> Path:
        """From one instance to another. Raises UsageError where an instance is unknown or nothing connects the two."""
        path = self._paths.get((src, dst))
        if path is None:
            path = self._paths[src, dst] = self._find_path(src, dst)
            for resource in path.resources:
                resource.paths.append(path)
        return path

    def _find_path(self, src: str, dst: str) -> Path:
        a, b = self._endpoint(src), self._endpoint(dst)
        if src == dst or (a.device and a.device == b.device):
            return Path(src, dst, "device", self._between(src, "copy", dst, "copy"), self.host_latency_s)
        if a.host and a.host == b.host:
            near = "scaleup" if a.scaleup_bytes_per_s and b.scaleup_bytes_per_s else "pcie"
            if near == "scaleup" or (a.pcie_bytes_per_s and b.pcie_bytes_per_s):
                return Path(src, dst, "host", self._between(src, f"{near}.out", dst, f"{near}.in"), self.host_latency_s)
        elif a.scaleup_domain and a.scaleup_domain == b.scaleup_domain and a.scaleup_bytes_per_s and b.scaleup_bytes_per_s:
            return Path(src, dst, "host", self._between(src, "scaleup.out", dst, "scaleup.in"), self.host_latency_s)
        for end in (a, b):
            if not end.nics * end.nic_bytes_per_s:
                raise UsageError(f"nothing connects {src} and {dst}: {end.name} has no NIC; give it nic_bytes_per_s or put both on one host")
        most = inf
        if self.nics_per_transfer is not None:
            shares = (self._line(end) * min(1.0, self.nics_per_transfer / end.nics) for end in (a, b))
            most = min(shares)
        core = () if self._core is None else (self._core,)
        latency_s = self.latency_s + self.transport.setup_s
        return Path(src, dst, "network", (*self._between(src, "nic.out", dst, "nic.in"), *core), latency_s, most)

    def _line(self, endpoint: Endpoint) -> float:
        return self.transport.bytes_per_s(endpoint.nics * endpoint.nic_bytes_per_s, self.piece_bytes)

    def _between(self, src: str, out: str, dst: str, into: str) -> tuple[Resource, ...]:
        """The two ports; those of infinite bandwidth are no resource."""
        found = (self._ports[src].get(out), self._ports[dst].get(into))
        return tuple(dict.fromkeys(r for r in found if r is not None))

    def _endpoint(self, name: str) -> Endpoint:
        try:
            return self.endpoints[name]
        except KeyError:
            raise UsageError(f"no instance is called {name}{_nearest(name, self.endpoints)}") from None

    def _resource(self, name: str, bytes_per_s: float) -> Resource:
        resource = self.resources.get(name)
        if resource is None:
            resource = self.resources[name] = Resource(name, bytes_per_s, self.env.now)
        elif resource.nominal_bytes_per_s != bytes_per_s:
            resource.nominal_bytes_per_s = bytes_per_s
            self._set_factor(resource, resource.factor)
        return resource

    # ------------------------------------------------------------ transfers

    def transfer(
        self,
        src: str,
        dst: str,
        size_bytes: float,
        done: Callable[[Transfer], None],
        *,
        rate_limit_bytes_per_s: float = inf,
        delay_s: float = 0.0,
        open: bool = False,
        owner: object = None,
    ) -> Transfer:
        """Start moving `size_bytes` after `delay_s` and the path's latency. `done(transfer)` is called once, from an event of its own, when
        all is delivered; with `open`, only after `close`. `owner` is the caller's."""
        path = self._paths.get((src, dst)) or self.path(src, dst)
        transfer = Transfer(path, size_bytes, done, rate_limit_bytes_per_s, open, owner)
        self._join(transfer, path.latency_s + delay_s)
        return transfer

    def extend(self, transfer: Transfer, more_bytes: float) -> None:
        """More bytes of an open transfer are ready to be sent."""
        assert transfer.open, f"{transfer} is closed"
        transfer.size_bytes += more_bytes
        if transfer.state == IDLE:
            transfer.left_bytes = more_bytes
            del self._parked[transfer]
            self._join(transfer, 0.0)
        elif transfer.state != WAITING:
            self._settle(transfer)
            transfer.left_bytes += more_bytes
            self._time(transfer)
        else:
            transfer.left_bytes += more_bytes

    def close(self, transfer: Transfer) -> None:
        """No more will come: an open transfer ends when what it has is delivered, in an event right after this call if that is so now."""
        transfer.open = False
        if transfer.state == IDLE:
            self._wake(transfer, 0.0)

    def set_limit(self, transfer: Transfer, rate_limit_bytes_per_s: float) -> None:
        """Change the most that a transfer may take."""
        transfer.limit_bytes_per_s = rate_limit_bytes_per_s
        if transfer.state == ALONE:
            self._set_rate(transfer, min(rate_limit_bytes_per_s, transfer.path.bytes_per_s))
        elif transfer.state == SHARING:
            self._share(transfer.path.resources)

    def cancel(self, transfer: Transfer) -> None:
        """Stop a transfer, which has then failed. Does nothing to one that has ended."""
        state = transfer.state
        if state == ENDED:
            return
        if state == WAITING or state == IDLE:
            del self._parked[transfer]
        else:
            self._settle(transfer)
            self._leave(transfer)
        transfer.state, transfer.wake, transfer.failed = ENDED, None, True
        if state == SHARING:
            self._share(transfer.path.resources)

    def remaining(self, transfer: Transfer) -> float:
        """Bytes that are known of and not yet delivered."""
        if transfer.state == ALONE or transfer.state == SHARING:
            self._settle(transfer)
            self._time(transfer)
        return transfer.left_bytes

    # ------------------------------------------------------------ faults and figures

    def set_bandwidth(self, name: str, bytes_per_s: float) -> None:
        """Give a resource, or every port of an instance, another bandwidth; at 0 transfers stall. Stays through restarts, until
        `scale_bandwidth(name, 1.0)`. Raises UsageError on an unknown name."""
        for resource in self._named(name):
            self._set_factor(resource, bytes_per_s / resource.nominal_bytes_per_s)

    def scale_bandwidth(self, name: str, factor: float) -> None:
        """Give a resource, or every port of an instance, this part of its nominal bandwidth: 0 cuts it, 1 restores it. Raises UsageError on
        an unknown name."""
        for resource in self._named(name):
            self._set_factor(resource, factor)

    def stats(self) -> list[LinkUse]:
        """What each link that two instances have ever been connected by did until now, by name."""
        now = self.env.now
        return [_use(resource, now) for name, resource in sorted(self.resources.items()) if resource.paths or resource.bytes]

    def _named(self, name: str) -> Sequence[Resource]:
        if name in self._ports:
            return list(self._ports[name].values())
        if name not in self.resources:
            raise UsageError(f"no instance or link is called {name}{_nearest(name, [*self._ports, *self.resources])}")
        return [self.resources[name]]

    def _set_factor(self, resource: Resource, factor: float) -> None:
        now = self.env.now
        resource.capacity_bytes += resource.bytes_per_s * (now - resource.capacity_since_s)
        resource.capacity_since_s = now
        resource.factor = factor
        resource.bytes_per_s = resource.nominal_bytes_per_s * factor
        for path in resource.paths:
            path.refresh()
        for transfer in resource.flows:
            if transfer.state == ALONE:
                self._set_rate(transfer, min(transfer.limit_bytes_per_s, transfer.path.bytes_per_s))
            else:
                self._share((resource,))
            break

    # ------------------------------------------------------------ the life of a transfer

    def _join(self, transfer: Transfer, delay_s: float) -> None:
        """Alone from now on if its path is empty, else at its start."""
        path = transfer.path
        for resource in path.resources:
            if resource.flows:
                break
        else:
            now = self.env._now
            start_s = now + delay_s
            for resource in path.resources:
                resource.flows[transfer] = None
                resource.busy_since_s = start_s
            rate = transfer.limit_bytes_per_s
            if rate > path.bytes_per_s:
                rate = path.bytes_per_s
            transfer.state, transfer.since_s, transfer.rate_bytes_per_s = ALONE, start_s, rate
            if rate > 0.0:
                delay_s += transfer.left_bytes / rate
                transfer.end_s = transfer.wake_s = now + delay_s
                transfer.wake = _Wake(self.env, delay_s, self._woken_callbacks, transfer)  # type: ignore[arg-type]
            else:
                self._time(transfer)
            return
        if delay_s > 0.0:
            self._wait(transfer, delay_s)
        else:
            self._begin(transfer)

    def _wait(self, transfer: Transfer, delay_s: float) -> None:
        transfer.state = WAITING
        transfer.rate_bytes_per_s, transfer.since_s, transfer.end_s = 0.0, self.env.now + delay_s, inf
        self._parked[transfer] = None
        self._wake(transfer, delay_s)

    def _begin(self, transfer: Transfer) -> None:
        """It flows from now on. Others on its path that are still in their latency make way until their start."""
        now = self.env.now
        state = ALONE
        for resource in transfer.path.resources:
            for other in resource.flows:
                if other.state == SHARING or other.since_s <= now:
                    other.state = state = SHARING
                else:
                    self._leave(other)
                    self._wait(other, other.since_s - now)
                break
        for resource in transfer.path.resources:
            if not resource.flows:
                resource.busy_since_s = now
            resource.flows[transfer] = None
            if len(resource.flows) > resource.peak_flows:
                resource.peak_flows = len(resource.flows)
        transfer.state, transfer.since_s, transfer.rate_bytes_per_s = state, now, -1.0  # a rate that no new one equals
        if state == ALONE:
            self._set_rate(transfer, min(transfer.limit_bytes_per_s, transfer.path.bytes_per_s))
        else:
            self._share(transfer.path.resources)

    def _leave(self, transfer: Transfer) -> None:
        """Off its resources, which count what they have carried of it."""
        now = self.env._now
        carried = transfer.size_bytes - transfer.left_bytes - transfer.charged_bytes
        transfer.charged_bytes += carried
        for resource in transfer.path.resources:
            flows = resource.flows
            del flows[transfer]
            resource.bytes += carried
            if not flows and now > resource.busy_since_s:
                resource.busy_s += now - resource.busy_since_s

    def _woken(self, event: _Wake) -> None:
        transfer = event.transfer
        if event is not transfer.wake:
            return
        transfer.wake, transfer.wake_s = None, inf
        state = transfer.state
        if state == WAITING:
            del self._parked[transfer]
            self._begin(transfer)
            return
        if state == IDLE:
            del self._parked[transfer]
        elif self.env._now < transfer.end_s:
            self._time(transfer)
            return
        else:
            transfer.left_bytes = 0.0
            self._leave(transfer)
        if transfer.open:
            transfer.state = IDLE
            self._parked[transfer] = None
        else:
            transfer.state = ENDED
        if state == SHARING:
            self._share(transfer.path.resources)
        if not transfer.open:
            transfer.done(transfer)

    # ------------------------------------------------------------ rates

    def _settle(self, transfer: Transfer) -> None:
        """Bring its bytes up to now."""
        elapsed_s = self.env._now - transfer.since_s
        if elapsed_s > 0.0:
            left = transfer.left_bytes - transfer.rate_bytes_per_s * elapsed_s
            transfer.left_bytes = left if left > 0.0 else 0.0
            transfer.since_s = self.env._now

    def _set_rate(self, transfer: Transfer, rate: float) -> None:
        self._settle(transfer)
        transfer.rate_bytes_per_s = rate
        self._time(transfer)

    def _time(self, transfer: Transfer) -> None:
        """When it ends at its present rate; see that an event comes no later."""
        rate = transfer.rate_bytes_per_s
        if rate > 0.0:
            seconds = transfer.left_bytes / rate
        else:
            seconds = inf if transfer.left_bytes else 0.0
        now = self.env._now
        delay_s = transfer.since_s - now + seconds
        transfer.end_s = now + delay_s
        if transfer.end_s < transfer.wake_s:
            self._wake(transfer, delay_s)

    def _wake(self, transfer: Transfer, delay_s: float) -> None:
        transfer.wake_s = self.env._now + delay_s
        transfer.wake = _Wake(self.env, delay_s, self._woken_callbacks, transfer)  # type: ignore[arg-type]

    def _share(self, around: Iterable[Resource]) -> None:
        """Fair rates for all transfers that `around` connects, directly or through others."""
        self._marks += 1
        mark = self._marks
        flows: list[Transfer] = []
        resources = list(around)
        for resource in resources:
            resource.mark = mark
        for resource in resources:  # which grows meanwhile
            resource.left_bytes_per_s = resource.bytes_per_s
            resource.unfixed = len(resource.flows)
            for transfer in resource.flows:
                if transfer.mark != mark:
                    transfer.mark = mark
                    flows.append(transfer)
                    for other in transfer.path.resources:
                        if other.mark != mark:
                            other.mark = mark
                            resources.append(other)
        if len(flows) == 1:
            flow = flows[0]
            flow.state = ALONE
            flow.fair_bytes_per_s = min(flow.limit_bytes_per_s, flow.path.bytes_per_s)
        else:
            _fill(flows, resources, mark)
        for transfer in flows:
            if transfer.fair_bytes_per_s != transfer.rate_bytes_per_s:
                self._set_rate(transfer, transfer.fair_bytes_per_s)


def _fill(flows: Sequence[Transfer], resources: Sequence[Resource], mark: int) -> None:
    """Progressive filling over a connected set: sets `fair_bytes_per_s`. Each resource comes with all of its bandwidth left and all of
    its flows unfixed."""
    limited = [(min(t.limit_bytes_per_s, t.path.flow_bytes_per_s), i) for i, t in enumerate(flows)]
    limited = sorted([pair for pair in limited if pair[0] < inf], reverse=True)
    unfixed = len(flows)
    while unfixed:
        share, tightest = inf, None
        resources = [resource for resource in resources if resource.unfixed]
        for resource in resources:
            level = resource.left_bytes_per_s / resource.unfixed
            if level < share:
                share, tightest = level, resource
        fixing: list[tuple[Transfer, float]] = []
        while limited and limited[-1][0] <= share:
            limit, i = limited.pop()
            if flows[i].fixed != mark:
                fixing.append((flows[i], limit))
        if not fixing:
            assert tightest is not None, "every transfer that shares has a resource with a finite bandwidth"
            fixing = [(transfer, share) for transfer in tightest.flows if transfer.fixed != mark]
        for transfer, rate in fixing:
            transfer.fixed = mark
            transfer.fair_bytes_per_s = rate
            for resource in transfer.path.resources:
                left = resource.left_bytes_per_s - rate
                resource.left_bytes_per_s = left if left > 0.0 else 0.0
                resource.unfixed -= 1
        unfixed -= len(fixing)


def _use(resource: Resource, now: float) -> LinkUse:
    carried, busy_s = resource.bytes, resource.busy_s
    for transfer in resource.flows:
        flown_s = max(0.0, now - transfer.since_s)
        left = max(0.0, transfer.left_bytes - transfer.rate_bytes_per_s * flown_s) if flown_s else transfer.left_bytes
        carried += transfer.size_bytes - left - transfer.charged_bytes
    if resource.flows:
        busy_s += max(0.0, now - resource.busy_since_s)
    could = resource.capacity_bytes + resource.bytes_per_s * (now - resource.capacity_since_s)
    up_s = now - resource.since_s
    return LinkUse(
        name=resource.name,
        bytes=carried,
        capacity_bytes_per_s=resource.nominal_bytes_per_s,
        busy_fraction=busy_s / up_s if up_s > 0.0 else 0.0,
        utilisation=carried / could if could > 0.0 else 0.0,
        peak_flows=max(resource.peak_flows, 1 if carried > 0.0 else 0),
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(known[:8])}" if known else ""
