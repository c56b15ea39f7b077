"""From an experiment file to a run, and from a run to a Result."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from pdlab import __version__, batching, cost
from pdlab.core import collector
from pdlab.core.instance_spec import MeasuredInstance, Placed, instance_spec
from pdlab.core.kv import PLAIN, UNBOUNDED, BlockLayout, BlockPool
from pdlab.core.policy import Policy
from pdlab.core.scheduler import Scheduler
from pdlab.core.types import InstanceSpec, Role, UsageError
from pdlab.core.watchdog import watched
from pdlab.cost.profile import InstanceProfile, Overheads
from pdlab.experiment.cluster import Placement
from pdlab.experiment.experiment import Experiment, indivisible
from pdlab.experiment.make_router import router
from pdlab.policies import load as load_policy
from pdlab.replay.log import EventLog, head_of
from pdlab.report.result import Result
from pdlab.results.metrics import summarise
from pdlab.results.records import InstanceUse
from pdlab.sim import faults
from pdlab.sim.host import Host
from pdlab.sim.link import Network
from pdlab.sim.moves import TransferMode
from pdlab.sim.topology import Endpoint
from pdlab.sim.transport import TRANSPORTS
from pdlab.sim.worker import SimInstance
from pdlab.sim.world import World
from pdlab.workload.base import Workload
from pdlab.workload.spec import build as build_workload

LONGEST_S = 1e9  # 31 years
Profiles = tuple[tuple[tuple[int, float], ...], tuple[tuple[int, int, float], ...]]
Progress = Callable[[float, int, int], None]


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """One kind of instance: all that its incarnations share."""

    placement: Placement
    cost: cost.Cost
    kv_blocks: int
    context_tokens: int  # of prompt and output, at most; 0: not known
    token_bytes: int
    block_bytes: int
    windows: tuple[tuple[int, int], ...]  # (of a token's bytes, tokens that those layers keep)
    overheads: Overheads
    profile: InstanceProfile | None  # as pdlab calibrate has measured it
    prefill_profile: tuple[tuple[int, float], ...]
    decode_profile: tuple[tuple[int, int, float], ...]

    def spec(self, name: str, role: Role, host: str, *, link_bytes_per_s: float = 0.0, host_bytes_per_s: float = 0.0) -> InstanceSpec:
        engine = self.placement.engine
        placed = Placed(
            name=name,
            role=role,
            host=host,
            max_seqs=engine.max_seqs,
            max_batch_tokens=engine.max_batch_tokens,
            prefix_cache=engine.prefix_cache,
            watermark=engine.watermark,
        )
        measured = MeasuredInstance(
            kv_blocks=self.kv_blocks,
            block_tokens=engine.block_tokens,
            block_bytes=self.block_bytes,
            context_tokens=self.context_tokens,
            sequence_tokens=self.scheduler(0).most_tokens if self.windows else 0,
            prefill_profile=self.prefill_profile,
            decode_profile=self.decode_profile,
            link_bytes_per_s=link_bytes_per_s,
            host_bytes_per_s=host_bytes_per_s,
        )
        return instance_spec(placed, measured)

    @property
    def layout(self) -> BlockLayout:
        """Its blocks' bytes by how much of a sequence they are kept, in whole numbers as small as can be."""
        if not self.windows:
            return PLAIN
        engine = self.placement.engine
        full = self.token_bytes - sum(size for size, _ in self.windows)
        unit = gcd(full, *(size for size, _ in self.windows))
        chunk_tokens = engine.max_batch_tokens if engine.batching == "chunked" else UNBOUNDED
        return BlockLayout(full // unit, tuple((size // unit, tokens) for size, tokens in self.windows), chunk_tokens)

    def scheduler(self, hash_tokens: int) -> Scheduler:
        engine = self.placement.engine
        return Scheduler(
            BlockPool(self.kv_blocks, engine.block_tokens, hash_tokens, engine.prefix_cache, self.layout),
            batching.load(engine.batching),
            max_batch_tokens=engine.max_batch_tokens,
            max_seqs=engine.max_seqs,
            watermark=engine.watermark,
        )


def plans(experiment: Experiment, hash_tokens: int) -> list[InstancePlan]:
    """Every instance of the cluster, with its cost and capacity."""
    model = cost.model(experiment.model, experiment.base_dir)
    formats = experiment.formats
    weights, kv = formats.weights(model), formats.kv
    known: dict[tuple[str, int, object], tuple[cost.Cost, int, Profiles]] = {}
    found = []
    for placement in experiment.placements():
        engine = placement.engine
        if mistake := indivisible(hash_tokens, engine.block_tokens):
            raise UsageError(mistake)
        key = (placement.hardware, placement.tp, engine)
        if key not in known:
            chip = cost.hardware(placement.hardware, experiment.base_dir)
            model_cost = cost.build(formats, model, chip, placement.tp, experiment.base_dir)
            blocks = engine.kv_blocks
            if blocks is None:
                tokens = cost.kv_capacity_tokens(
                    model, chip, placement.tp, engine.hbm_utilization, weights, kv, engine.max_batch_tokens, engine.max_seqs
                )
                blocks = tokens // engine.block_tokens
            profiles = cost.profiles(model_cost, engine.max_batch_tokens, engine.max_seqs, blocks * engine.block_tokens)
            known[key] = (model_cost, blocks, profiles)
        model_cost, blocks, profiles = known[key]
        chip = cost.hardware(placement.hardware, experiment.base_dir)
        token_bytes = cost.kv_bytes_per_token(model, chip, kv, placement.tp)
        overheads = chip.profile.overheads if chip.profile is not None else cost.Overheads()
        found.append(
            InstancePlan(
                placement=placement,
                cost=model_cost,
                kv_blocks=blocks,
                context_tokens=engine.max_model_len or model.max_positions,
                token_bytes=token_bytes,
                block_bytes=round(token_bytes * engine.block_tokens),
                windows=cost.kv_windows(model, chip, kv, placement.tp) if engine.hybrid_kv else (),
                overheads=overheads,
                profile=chip.profile,
                prefill_profile=profiles[0],
                decode_profile=profiles[1],
            )
        )
    return found


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
    sending = [m for m in members if m.placement.role.prefills] or members
    largest = max(sending, key=lambda m: m.token_bytes)
    mode = TransferMode(
        mode=experiment.transfer.mode,
        granularity=experiment.transfer.granularity,
        first_token=experiment.transfer.first_token,
        layers=model.layers,
        bytes_per_token=largest.token_bytes,
        windows=largest.windows,
        state_bytes=model.state_bytes,
        setup_s=max(m.overheads.handoff_s for m in members),
        ask_s=max(m.overheads.request_s for m in members),
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
        host, new_size_s = hosts.get(plan.placement.host), plan.overheads.new_size_s
        if host is None or plan.placement.name != incarnation.name:  # scaled up: on a host of its own
            return SimInstance(env, made, incarnation, scheduler, plan.cost, made.gaps, horizon=horizon, new_size_s=new_size_s)
        one = SimInstance(env, made, incarnation, scheduler, plan.cost, made.gaps, horizon=1, host=host, new_size_s=new_size_s)
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
        gbytes = network.gbytes_per_s
        return Endpoint(
            name=name,
            host=placement.host if placement.name == name else name,
            nic_bytes_per_s=gbytes * 1e9 if gbytes is not None else chip.nic_bytes_per_s * placement.tp / placement.nics,
            nics=placement.nics,
            scaleup_bytes_per_s=inside * 1e9 if inside is not None else chip.scaleup_bytes_per_s * placement.tp,
            pcie_bytes_per_s=chip.pcie_bytes_per_s * placement.tp,
        )


def simulate(
    experiment: Experiment | str | Path,
    *,
    policy: Policy | type[Policy] | str | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    trace_events: Path | None = None,
    workload: Workload | None = None,
) -> Result:
    """Run an experiment, or the one in a file. `policy` decides in place of the experiment's: an object, a class, or what a file may say.
    `progress(simulated seconds, requests ended, requests)` is called at every report; `trace_events` is where the event log goes. A
    KeyboardInterrupt ends the run early: what there is by then comes back marked partial. Raises UsageError, also where a
    policy's hook does not return."""
    if isinstance(experiment, str | Path):
        experiment = Experiment.load(experiment)
    elif not isinstance(experiment, Experiment):
        raise UsageError(f"simulate takes an experiment, or the path of its file, not {experiment!r}")
    decider = load_policy.instantiate(experiment.policy if policy is None else policy, experiment.base_dir)
    if policy is None or isinstance(policy, str | Mapping):
        experiment = experiment if policy is None else experiment.with_(policy=policy)
        said: str | Mapping[str, Any] = experiment.policy
    else:
        said = load_policy.describe(decider)
    if workload is None:
        workload = build_workload(experiment.workload, experiment.seed, experiment.base_dir)
    last_s = float(workload.arrival_s.max()) if len(workload) else 0.0
    if not last_s <= LONGEST_S:
        raise UsageError(
            f"workload: its last request arrives after {last_s:.3g} s, and a clock tells microseconds apart for {LONGEST_S:.0e} s only: "
            "raise workload.rate, or take fewer requests"
        )
    policy_hash = load_policy.source_hash(decider)
    log = None
    if trace_events is not None:
        try:
            log = EventLog(trace_events, head_of(_recorded(experiment, said), decider, workload.hash_tokens))
        except OSError as error:
            raise UsageError(f"event log {trace_events}: {error.strerror}") from None
    with watched(decider):
        made = world(experiment, workload, log=log, spans=trace_events is not None, policy=decider)
    made.on_progress = progress
    started = time.process_time()
    partial = False
    try:
        with collector.seldom(), watched(decider):
            made.run()
    except KeyboardInterrupt:
        partial = True
        made.interrupt()
    finally:
        cpu_s = time.process_time() - started
        if log is not None:
            log.close()
    duration_s = made.env.now
    summary = summarise(
        made.records,
        made.gaps,
        made.samples,
        _uses(made, experiment, duration_s),
        made.network.stats(),
        slo=(experiment.slo.ttft_s, experiment.slo.tpot_s),
        duration_s=duration_s,
        run={
            "world": "sim",
            "version": __version__,
            "seed": experiment.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "policy": said,
            "policy_hash": policy_hash,
            "workload": workload.reading,
            "cpu_s": cpu_s,
            "requests_per_cpu_s": made.ended / cpu_s if cpu_s else 0.0,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        partial=partial,
        leaked_blocks=made.leaked_blocks,
        warnings=[*_warnings(made, workload), *([log.stopped] if log is not None and log.stopped else [])],
    )
    plain = {**experiment.resolved(), "policy": said}
    return Result(summary, made.records, made.gaps, made.samples, plain, log=trace_events, spans=made.spans or ())


def _recorded(experiment: Experiment, policy: str | Mapping[str, Any]) -> Experiment:
    """With the policy that a replay is to build. Raises UsageError where none can be built of what is said of it."""
    if policy == experiment.policy:
        return experiment
    try:
        return experiment.with_(policy=policy)
    except UsageError:
        raise UsageError(
            f"policy {policy}: the event log of a class that is in no file cannot be replayed; put it into one, "
            "and give path/to/file.py:Class"
        ) from None


def _uses(made: World, experiment: Experiment, duration_s: float) -> list[InstanceUse]:
    """What each instance did, its incarnations together."""
    whose, kv_use = made.samples.column("instance").astype(np.int64), made.samples.column("used_blocks") / made.samples.column("kv_blocks")
    reports, kv_uses = (np.bincount(whose, weights, minlength=len(made.instances)) for weights in (None, kv_use))
    placed = experiment.placements()
    placements = {p.name: p for p in placed}
    earlier: dict[str, list[SimInstance]] = {}
    for instance in made.lifecycle.retired:
        earlier.setdefault(instance.name, []).append(instance)
    uses = []
    for name, last in made.instances.items():
        lives = [*earlier.get(name, ()), last]
        all_reports = reports[last.index] + sum(x.reports_at_rest for x in lives)
        placement = placements.get(name, placed[0])
        pool = last.scheduler.pool
        decode_s = sum(x.decode_busy_s for x in lives)
        uses.append(
            InstanceUse(
                name=name,
                role=str(last.role),
                busy_s=sum(x.prefill_busy_s for x in lives) + decode_s,
                prefill_busy_s=sum(x.prefill_busy_s for x in lives),
                decode_busy_s=decode_s,
                up_s=sum(x.lived_s for x in lives),
                kv_blocks=last.spec.kv_blocks,
                kv_use_mean=float(kv_uses[last.index] / all_reports) if all_reports else 0.0,
                kv_use_peak=max(x.peak_blocks for x in lives) / pool.total,
                requests=sum(x.requests for x in lives),
                prefill_tokens=sum(x.prefill_tokens for x in lives),
                decode_tokens=sum(x.decode_tokens for x in lives),
                preemptions=sum(x.scheduler.preemptions for x in lives),
                compute_bound_fraction=sum(x.compute_bound_s for x in lives) / decode_s if decode_s else 0.0,
                hardware=placement.hardware,
                accelerators=placement.tp,
                max_seqs=last.scheduler.max_seqs,
            )
        )
    return uses


def _warnings(made: World, workload: Workload) -> list[str]:
    said = [*workload.notes, *made.notices]
    if workload.dropped and not any("dropped" in note for note in workload.notes):  # which would say why, too
        said.append(f"{workload.dropped} rows of the workload were dropped")
    for name, instance in made.instances.items():
        beyond = getattr(instance.cost, "extrapolated", 0)
        if beyond:
            said.append(f"{name}: the cost table was extrapolated {beyond} times")
    if blindness := made.router.blindness:
        said.append(blindness)
    if made.leaked_blocks:
        said.append(f"{made.leaked_blocks} KV blocks were still held at the end: a bug of pdlab's, please report it")
    return said
