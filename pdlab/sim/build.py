"""The simulated cluster of an experiment: its world, with network, hosts, instances and faults in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import simpy

from pdlab import cost
from pdlab.core.policy import Policy
from pdlab.core.types import InstanceSpec, Role
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.replay.log import EventLog
from pdlab.sim import faults
from pdlab.sim.host import Host
from pdlab.sim.kv_size import KvSize
from pdlab.sim.link import Network
from pdlab.sim.moves import TransferMode
from pdlab.sim.plans import InstancePlan, plans
from pdlab.sim.topology import Endpoint
from pdlab.sim.transport import TRANSPORTS
from pdlab.sim.worker import SimInstance
from pdlab.sim.world import World
from pdlab.workload.base import Workload


def world(
    experiment: Experiment,
    workload: Workload,
    *,
    log: EventLog | None = None,
    spans: bool = False,
    horizon: int = 1 << 30,
    policy: Policy | None = None,
) -> World:
    """The simulated cluster of an experiment, ready to `run`. `horizon` bounds the decode steps slept through at once; `policy` is asked in
    place of the experiment's."""
    env = simpy.Environment(0.0)
    spec = experiment.cluster
    inside = spec.network.intra_host
    transport = next(t for t in TRANSPORTS if t.name == spec.network.transport)
    network = Network(env, latency_s=spec.network.latency_us * 1e-6, host_latency_s=inside.latency_us * 1e-6, transport=transport)
    model = cost.model(experiment.model, experiment.base_dir)
    members = plans(experiment, workload.hash_tokens)
    mode = TransferMode(
        mode=experiment.transfer.mode,
        granularity=experiment.transfer.granularity,
        first_token=experiment.transfer.first_token,
        via_prefill=experiment.transfer.response_path == "via_prefill",
        layers=model.layers,
        state_bytes=model.state_bytes,
        setup_s=max(m.overheads.handoff_s for m in members),
        ask_s=max(m.overheads.request_s if m.profile is not None else 0.0 for m in members),
        between_steps=any(m.profile is not None for m in members),
    )
    hosts = _hosts(members)
    fresh = _Newcomers(members, network, experiment)
    made = World(
        env,
        router(experiment, hash_tokens=workload.hash_tokens, policy=policy),
        workload,
        network,
        mode,
        report_period_s=spec.reports.period_s,
        report_delay_s=spec.reports.delay_s,
        switch_s=spec.role_switch_s,
        detect_s=spec.detect_s,
        request_s=max(m.overheads.request_s + m.overheads.router_s for m in members),
        hosts=list(hosts.values()),
        log=log,
        spans=spans,
        start_instance=fresh.start if spec.autoscale.enabled else None,
    )

    def make(plan: InstancePlan, incarnation: InstanceSpec) -> SimInstance:
        scheduler = plan.scheduler(workload.hash_tokens)
        own: dict[str, Any] = {
            "new_size_s": plan.overheads.new_size_s,
            "kv_size": KvSize(plan.token_bytes, plan.windows, plan.element_bytes),
        }
        host = hosts.get(plan.placement.host)
        if host is None or plan.placement.name != incarnation.name:  # scaled up: on a host of its own
            return SimInstance(env, made, incarnation, scheduler, plan.cost, made.gaps, horizon=horizon, **own)
        one = SimInstance(env, made, incarnation, scheduler, plan.cost, made.gaps, horizon=1, host=host, **own)
        host.add(one)
        return one

    fresh.world, fresh.make = made, make
    for plan in members:
        fresh.add(plan, plan.placement.name, plan.placement.role)
    faults.plan(made, experiment.faults)
    return made


def _hosts(members: Sequence[InstancePlan]) -> dict[str, Host]:
    """Machines whose instances slow each other, as their profiles say. What serves them takes their cores where all are on one machine, and
    as many threads as it has cores."""
    found = {}
    for host in dict.fromkeys(m.placement.host for m in members):
        own = [m.profile for m in members if m.placement.host == host and m.profile is not None]
        if not own:
            continue
        beside, front, machine = own[0].beside, own[0].front, own[0].machine
        crowded = len(own) == len(members) and sum(profile.machine.threads or 1 for profile in own) >= machine.cores
        if (len(own) > 1 and beside.matters) or (crowded and front.matters):
            found[host] = Host(beside, front if crowded and front.matters else None)
    return found


class _Newcomers:
    """Adds instances to a world: those of the file, and those that a policy scales up."""

    def __init__(self, members: Sequence[InstancePlan], network: Network, experiment: Experiment) -> None:
        self.members, self.network, self.experiment = members, network, experiment
        self.plans: dict[str, InstancePlan] = {}
        self.world: World
        self.make: Callable[[InstancePlan, InstanceSpec], SimInstance]

    def add(self, plan: InstancePlan, name: str, role: Role) -> None:
        self.plans[name] = plan
        endpoint = self._endpoint(plan, name)
        self.network.add(endpoint)
        spec = plan.spec(
            name,
            role,
            endpoint.host,
            link_bytes_per_s=self.network.topology.nic_bytes_per_s(endpoint),
            host_bytes_per_s=endpoint.scaleup_bytes_per_s or endpoint.pcie_bytes_per_s,
        )
        self.world.add(spec, lambda incarnation: self.make(plan, incarnation))

    def start(self, role: Role) -> tuple[Callable[[], None], float]:
        """Like the first of that role in the file, or the first at all."""
        like = next((m for m in self.members if m.placement.role is role), self.members[0])
        number = sum(1 for name in self.plans if name.startswith(f"{role}-"))
        while (name := f"{role}-{number}") in self.plans:
            number += 1
        self.plans[name] = like
        return lambda: self.add(like, name, role), self.experiment.cluster.autoscale.start_s

    def _endpoint(self, plan: InstancePlan, name: str) -> Endpoint:
        placement, network = plan.placement, self.experiment.cluster.network
        chip, inside = cost.hardware(placement.hardware, self.experiment.base_dir), network.intra_host.gbytes_per_s
        gbytes, factors = network.gbytes_per_s, self.experiment.cost.factors
        slower = 1.0 if factors is None else factors.link
        return Endpoint(
            name=name,
            host=placement.host if placement.name == name else name,
            nic_bytes_per_s=(gbytes * 1e9 if gbytes is not None else chip.nic_bytes_per_s * placement.accelerators / placement.nics)
            / slower,
            nics=placement.nics,
            scaleup_bytes_per_s=(inside * 1e9 if inside is not None else chip.scaleup_bytes_per_s * placement.accelerators) / slower,
            pcie_bytes_per_s=chip.pcie_bytes_per_s * placement.accelerators / slower,
            ranks=plan.ranks,
            kv_heads=plan.kv_heads,
        )
