"""The simulated network: transfers between instances share links by max-min fairness.

A *transfer* waits out its path's latency, then flows through all of the path's resources (see `topology`) at one rate until its bytes
are delivered. Rates are max-min fair with a limit for each transfer: all rise together until a resource is full or a limit is reached,
those concerned stay there, the others go on rising. So no transfer could be faster without slowing one that is no faster than itself.
(Source: progressive filling, Bertsekas and Gallager, Data Networks, 6.5.2.) Rates change only when a transfer starts, ends or gets
another limit, or a resource another bandwidth, and then only for the transfers that are connected to it through shared resources;
in between everything is linear, so this is the exact fluid solution and bytes are conserved.

Most transfers meet nobody. One that finds its whole path empty is *alone*: it is entered at once, even while it waits out its latency,
and costs one SimPy event, its end. Should another start on its path, it is made to share if it is flowing by then, or to wait for
its start like any other if it is not. Events are never cancelled: each transfer knows the one it listens to. One that comes
too early, since the transfer was slowed meanwhile, is answered by waiting again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf

import simpy

from pdlab.results.records import LinkUse
from pdlab.sim.calls import call_at
from pdlab.sim.due_call import DueCall
from pdlab.sim.path import ALONE, ENDED, IDLE, SHARING, WAITING, Path, Resource, Transfer
from pdlab.sim.topology import Endpoint, NetworkTopology
from pdlab.sim.transport import IDEAL, Transport


class Network:
    """All links of one simulated cluster, in use.

    `latency_s` delays every transfer over the network, on top of the transport's set-up; `host_latency_s` those within a host or device.
    `transport` and `piece_bytes` (contiguous pieces that KV moves in) say what is achieved of the NICs' line rate. `core_bytes_per_s` is
    a switch core that all network paths share, for oversubscribed fabrics. `nics_per_transfer` limits how many NICs one transfer
    stripes over; all of both sides by default. Raises UsageError for figures that make no sense.
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
        self.topology = NetworkTopology(
            latency_s=latency_s,
            host_latency_s=host_latency_s,
            transport=transport,
            piece_bytes=piece_bytes,
            core_bytes_per_s=core_bytes_per_s,
            nics_per_transfer=nics_per_transfer,
            now=env.now,
        )
        self._paths = self.topology.paths
        self._parked: dict[Transfer, None] = {}  # waiting or idle
        self._marks = 0
        for endpoint in endpoints:
            self.add(endpoint)

    def add(self, endpoint: Endpoint) -> None:
        """An instance comes up, perhaps again: links keep their counts and faults by name. Raises UsageError for a name in use, and when it
        describes what it shares with another endpoint otherwise."""
        self.topology.add(endpoint, self.env.now)

    def remove(self, name: str) -> list[Transfer]:
        """An instance is gone. Its transfers are cancelled and returned, in a fixed order; their `done` is not called."""
        found = {transfer: None for transfer in self._parked if name in (transfer.path.src, transfer.path.dst)}
        for path in self.topology.remove(name):
            found.update((transfer, None) for transfer in path.resources[0].flows if transfer.path is path)
        for transfer in found:
            self.cancel(transfer)
        return list(found)

    def path(self, src: str, dst: str) -> Path:
        """From one instance to another. Raises UsageError where one is unknown or nothing connects the two."""
        return self._paths.get((src, dst)) or self.topology.path(src, dst)

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
        return self.send(self.path(src, dst), size_bytes, done, rate_limit_bytes_per_s, delay_s, open, owner)

    def send(
        self,
        path: Path,
        size_bytes: float,
        done: Callable[[Transfer], None],
        limit_bytes_per_s: float,
        delay_s: float,
        open: bool,
        owner: object,
    ) -> Transfer:
        """`transfer`, on a path that is known."""
        transfer = Transfer(path, size_bytes, done, limit_bytes_per_s, open, owner)
        self._join(transfer, path.latency_s + delay_s)
        return transfer

    def extend(self, transfer: Transfer, more_bytes: float) -> None:
        """More bytes of an open transfer are ready to be sent. Does nothing to one that has failed."""
        if transfer.failed:
            return
        assert transfer.open, f"{transfer} is closed"
        transfer.size_bytes += more_bytes
        if transfer.state == IDLE:
            transfer.left_bytes = more_bytes
            del self._parked[transfer]
            self._join(transfer, 0.0)
            return
        transfer.left_bytes += more_bytes
        if transfer.state != WAITING:
            self._set_rate(transfer, transfer.rate_bytes_per_s)

    def close(self, transfer: Transfer) -> None:
        """No more will come: an open transfer ends when what it has is delivered, in an event right after this call if that is so now."""
        transfer.open = False
        if transfer.state == IDLE:
            self._wake(transfer, 0.0)

    def set_limit(self, transfer: Transfer, rate_limit_bytes_per_s: float) -> None:
        """Change the most that a transfer may take."""
        before, transfer.limit_bytes_per_s = transfer.limit_bytes_per_s, rate_limit_bytes_per_s
        if transfer.state == ALONE:
            self._set_rate(transfer, min(rate_limit_bytes_per_s, transfer.path.bytes_per_s))
        elif transfer.state == SHARING and not before > transfer.rate_bytes_per_s <= rate_limit_bytes_per_s:
            self._share(transfer.path.resources)  # what held it was its limit, or now will be

    def cancel(self, transfer: Transfer) -> None:
        """Stop a transfer, which has then failed. Does nothing to one that has ended."""
        state = transfer.state
        if state == ENDED:
            return
        if state in (WAITING, IDLE):
            del self._parked[transfer]
        else:
            transfer.left_bytes = transfer.left_at(self.env.now)
            self._leave(transfer)
        transfer.state, transfer.wake, transfer.failed = ENDED, None, True
        if state == SHARING:
            self._share(transfer.path.resources)

    def remaining(self, transfer: Transfer) -> float:
        """Bytes that are known of and not yet delivered."""
        return transfer.left_at(self.env.now)

    # ------------------------------------------------------------ faults and figures

    def set_bandwidth(self, name: str, bytes_per_s: float) -> None:
        """Give a resource, or every port of an instance, another bandwidth; at 0 transfers stall. Stays through restarts, until
        `scale_bandwidth(name, 1.0)`. Raises UsageError on an unknown name."""
        for resource in self.topology.named(name):
            self._scale(resource, bytes_per_s / resource.nominal_bytes_per_s)

    def scale_bandwidth(self, name: str, factor: float) -> None:
        """Give a resource, or every port of an instance, this part of its nominal bandwidth: 0 cuts it, 1 restores it. Raises UsageError on
        an unknown name."""
        for resource in self.topology.named(name):
            self._scale(resource, factor)

    def _scale(self, resource: Resource, factor: float) -> None:
        assert factor >= 0.0, f"{resource} scaled by {factor}"
        resource.rescale(resource.nominal_bytes_per_s, factor, self.env.now)
        first = next(iter(resource.flows), None)
        if first is None:
            return
        if first.state == ALONE:
            self._set_rate(first, min(first.limit_bytes_per_s, first.path.bytes_per_s))
        else:
            self._share((resource,))

    def stats(self) -> list[LinkUse]:
        """What each link on a path that was ever used did until now, by name."""
        now = self.env.now
        return [resource.use(now) for name, resource in sorted(self.topology.resources.items()) if resource.paths or resource.bytes]

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
                transfer.end_s = transfer.wake_s = end_s = now + delay_s
                transfer.wake = call_at(self.env, end_s, self._woken, transfer)
            else:
                self._set_rate(transfer, rate)
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

    def _woken(self, event: DueCall) -> None:
        transfer: Transfer = event.value
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
            self._set_rate(transfer, transfer.rate_bytes_per_s)
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

    def _set_rate(self, transfer: Transfer, rate: float) -> None:
        """From now on (from its start, if that is still to come). Sees that an event comes no later than its end."""
        now = self.env._now
        start_in_s, left = transfer.since_s - now, transfer.left_bytes
        if start_in_s < 0.0:
            left += transfer.rate_bytes_per_s * start_in_s
            if left < 0.0:
                left = 0.0
            transfer.left_bytes, transfer.since_s, start_in_s = left, now, 0.0
        transfer.rate_bytes_per_s = rate
        delay_s = start_in_s + (left / rate if rate > 0.0 else inf if left else 0.0)
        transfer.end_s = now + delay_s
        if transfer.end_s < transfer.wake_s:
            self._wake(transfer, delay_s)

    def _wake(self, transfer: Transfer, delay_s: float) -> None:
        transfer.wake_s = at_s = self.env._now + delay_s
        transfer.wake = call_at(self.env, at_s, self._woken, transfer)

    def _share(self, around: Iterable[Resource]) -> None:
        """Fair rates for all transfers that `around` connects, directly or through others."""
        self._marks += 1
        mark = self._marks
        flows: list[Transfer] = []
        limited: list[Transfer] = []
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
                    path = transfer.path
                    if transfer.limit_bytes_per_s < inf or path.flow_bytes_per_s < inf:
                        limited.append(transfer)
                    for other in path.resources:
                        if other.mark != mark:
                            other.mark = mark
                            resources.append(other)
        if len(flows) == 1:
            flow = flows[0]
            flow.state = ALONE
            flow.fair_bytes_per_s = min(flow.limit_bytes_per_s, flow.path.bytes_per_s)
        else:
            _fill(flows, limited, resources, mark)
        for transfer in flows:
            if transfer.fair_bytes_per_s != transfer.rate_bytes_per_s:
                self._set_rate(transfer, transfer.fair_bytes_per_s)


def _fill(flows: Sequence[Transfer], limited: Sequence[Transfer], resources: Sequence[Resource], mark: int) -> None:
    """Progressive filling over a connected set: sets each flow's `fair_bytes_per_s`. Those in `limited` have a limit of their own. Each
    resource comes with all of its bandwidth left and all of its flows unfixed."""
    limits = sorted([(min(t.limit_bytes_per_s, t.path.flow_bytes_per_s), -i) for i, t in enumerate(limited)], reverse=True)
    unfixed = len(flows)
    while unfixed:
        share, tightest = inf, None
        for resource in resources:
            if resource.unfixed:
                level = resource.left_bytes_per_s / resource.unfixed
                if level < share:
                    share, tightest = level, resource
        fixing: list[tuple[Transfer, float]] = []
        while limits and limits[-1][0] <= share:
            limit, i = limits.pop()
            if limited[-i].fixed != mark:
                fixing.append((limited[-i], limit))
        if not fixing:
            assert tightest is not None, "every transfer that shares has a resource with a finite bandwidth"
            if tightest.unfixed == unfixed:  # it holds all the rest
                for transfer in flows:
                    if transfer.fixed != mark:
                        transfer.fair_bytes_per_s = share
                return
            fixing = [(transfer, share) for transfer in tightest.flows if transfer.fixed != mark]
        for transfer, rate in fixing:
            transfer.fixed = mark
            transfer.fair_bytes_per_s = rate
            for resource in transfer.path.resources:
                left = resource.left_bytes_per_s - rate
                resource.left_bytes_per_s = left if left > 0.0 else 0.0
                resource.unfixed -= 1
        unfixed -= len(fixing)
        resources = [resource for resource in resources if resource.unfixed]
