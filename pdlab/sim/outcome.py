"""What a simulated run has come to: what each instance did, the summary, and what its reader should know."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdlab import cost
from pdlab.cost.basis import basis
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import EventLog
from pdlab.results.metrics import summarise
from pdlab.results.records import InstanceUse
from pdlab.sim.worker import SimInstance
from pdlab.sim.world import World


def summary(
    world: World, experiment: Experiment, run: dict[str, Any], *, log: EventLog | None, partial: bool, trim: bool
) -> dict[str, Any]:
    """The content of summary.json. `run` is what it says of the run itself; with `trim` a steady state's warm-up is left out."""
    return summarise(
        world.records,
        world.gaps,
        world.samples,
        _uses(world, experiment),
        world.network.stats(),
        slo=(experiment.slo.ttft_s, experiment.slo.tpot_s),
        duration_s=world.env.now,
        run=run,
        partial=partial,
        leaked_blocks=world.leaked_blocks,
        warnings=[*_warnings(world), *([log.stopped] if log is not None and log.stopped else [])],
        trim=trim and _steady(experiment),
    )


def rests_on(experiment: Experiment) -> list[str]:
    """A line for each kind of instance: what its seconds are calibrated on, and how far off that may be."""
    served = cost.model(experiment.model, experiment.base_dir)
    placed = experiment.placements()
    kinds = dict.fromkeys((one.hardware, one.parallel, one.engine.like, one.engine.version or "") for one in placed)
    drafting = dict.fromkeys(one.engine.speculation for one in placed if one.engine.speculation is not None)
    return [
        *(
            basis(experiment.formats, served, cost.hardware(name, experiment.base_dir), parallel, like, version)
            for name, parallel, like, version in kinds
        ),
        *(spec.assumption for spec in drafting),
    ]


def _steady(experiment: Experiment) -> bool:
    """Could it come to a steady state? Where faults are planned, or a file says when requests arrive, what happens first is no warm-up."""
    return not experiment.faults and not experiment.workload.own_times


def _uses(world: World, experiment: Experiment) -> list[InstanceUse]:
    """What each instance did, its incarnations together."""
    whose, kv_use = (
        world.samples.column("instance").astype(np.int64),
        world.samples.column("used_blocks") / world.samples.column("kv_blocks"),
    )
    reports, kv_uses = (np.bincount(whose, weights, minlength=len(world.instances)) for weights in (None, kv_use))
    placed = experiment.placements()
    placements = {p.name: p for p in placed}
    earlier: dict[str, list[SimInstance]] = {}
    for instance in world.lifecycle.retired:
        earlier.setdefault(instance.name, []).append(instance)
    uses = []
    for name, last in world.instances.items():
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
                hardware=str(placement.hardware),
                accelerators=placement.accelerators,
                max_seqs=last.scheduler.max_seqs,
                decode_profile=last.spec.decode_profile,
            )
        )
    return uses


def _warnings(world: World) -> list[str]:
    workload = world.workload
    said = [*workload.notes, *world.notices]
    if workload.dropped and not any("dropped" in note for note in workload.notes):  # which would say why, too
        said.append(f"{workload.dropped} rows of the workload were dropped")
    for name, instance in world.instances.items():
        beyond = getattr(instance.cost, "extrapolated", 0)
        if beyond:
            said.append(f"{name}: the cost table was extrapolated {beyond} times")
    if blindness := world.router.blindness:
        said.append(blindness)
    if world.leaked_blocks:
        said.append(f"{world.leaked_blocks} KV blocks were still held at the end: a bug of pdlab's, please report it")
    return said
