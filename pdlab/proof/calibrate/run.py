"""From an engine, or a server, to a profile."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from pdlab import __version__, cost
from pdlab.core.types import UsageError, nearest
from pdlab.cost.error import cost_error
from pdlab.cost.measured import MeasuredCost
from pdlab.cost.measurements import BACKENDS
from pdlab.cost.profile import (
    BesideSeen,
    CoreSpeed,
    EngineShape,
    FrontCosts,
    InstanceProfile,
    Machine,
    MeasuredPoint,
    ModelShape,
    Overheads,
    Point,
    StepTimes,
    TransferFit,
)
from pdlab.cost.shapes import Model
from pdlab.experiment.deployment import Deployment
from pdlab.kernels.cpu_build import build_all
from pdlab.proof.calibrate import grid, multipliers, over_http, rounds, transfer
from pdlab.proof.calibrate.bench import Bench
from pdlab.proof.calibrate.fit import errors, fit, warnings
from pdlab.proof.calibrate.front import through
from pdlab.proof.calibrate.machine import this_machine
from pdlab.proof.calibrate.neighbour import beside, neighbours
from pdlab.proof.calibrate.stream import MeasuredServer, model_of, servers
from pdlab.proof.calibrate.undisturbed import calmed, unsteadiness
from pdlab.proof.local_cluster import local_cluster
from pdlab.real.engine.load import Loaded, load
from pdlab.real.engine.options import EngineOptions
from pdlab.real.host import processes
from pdlab.real.host.core_probe import Pace, Slower, slower_on, watched
from pdlab.real.net.http import HttpClient

Say = Callable[[str, float], None]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
FIRST = (Point(tokens=64), Point(batch=1, context=64), Point(batch=4, context=64))
REFERENCES = (Point(tokens=256), Point(tokens=96), Point(batch=4, context=64))  # again and again: long ones see more of the machine
BESIDE = 0.5  # of the time that steps are given, for steps beside a neighbour's
QUIET = 0.9  # of the time that the engine's thread computes, on a machine of its own
LEAST_TOKENS = 96  # of prompt and output, that there is a grid at all


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """How to measure. `transport`: of KV transfers; empty: they are left out. `http`: are the front end's overheads measured? `beside`:
    with it, is what servers on one machine cost each other?"""

    seconds: float = 180.0
    temperature: float = 0.0
    clock: str = "wall"
    transport: str = "auto"
    http: bool = True
    beside: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured and fitted."""

    measured: list[MeasuredPoint]
    fit: StepTimes
    warnings: list[str]
    new_size_s: float = 0.0
    references: Sequence[MeasuredPoint] = ()
    unsteady: CoreSpeed = field(default_factory=CoreSpeed)


def of_engine(options: EngineOptions, plan: CalibrationPlan, say: Say, file: Path | None = None) -> InstanceProfile:
    """Measure an engine in this process, then its server's overheads and transfers of its KV, and what serves the cluster of the experiment
    `file`, where this machine has room for it. `say(what, share done)`. Raises UsageError."""
    if options.device != "cpu":
        return _of_engine(options, plan, say, file, None)
    with processes.awake(), watched(sorted(os.sched_getaffinity(0))) as pace:
        return _of_engine(options, plan, say, file, pace)


def _of_engine(options: EngineOptions, plan: CalibrationPlan, say: Say, file: Path | None, pace: Pace | None) -> InstanceProfile:
    if plan.clock not in CLOCKS:
        raise UsageError(f"--clock {plan.clock} is not one of {', '.join(CLOCKS)}")
    if plan.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        raise UsageError("--clock cpu is for --device cpu --threads 1: other engines' time is not this thread's")
    say("loading", 0.0)
    if options.device == "cpu":
        build_all()
    loaded = load(options)
    loaded.engine.runner.warm_up()
    bench = Bench(loaded, temperature=plan.temperature, clock=CLOCKS[plan.clock], seed=plan.seed)
    bounds = bench.bounds
    shape, engine = _model_shape(loaded), _engine_shape(loaded, options, bounds, plan)
    cores = list(pace.files) if pace is not None else []
    own, last = cores[: options.threads or None], cores[-options.threads :]  # of an engine, and of what serves a cluster

    def loops(spans: Sequence[tuple[float, float]]) -> tuple[float, ...]:
        return pace.mean_s(own, spans) if pace is not None else ()

    with _on_its_cores(options):
        steps = _steps(bench, bounds, plan, lambda share: say("steps", 0.7 * share), loops)
    device = loaded.device
    del bench, loaded
    gc.collect()
    overheads, seen, moved, warned = Overheads(), list[BesideSeen](), None, list(steps.warnings)
    if plan.http:
        say("HTTP", 0.7)
        overheads, seen = asyncio.run(
            _served(options, shape, bounds, MeasuredCost(steps.fit), plan, slower_on(pace, own, steps.unsteady), steps.unsteady)
        )
    overheads = overheads.model_copy(update={"new_size_s": steps.new_size_s})
    front = FrontCosts()
    if plan.http and plan.beside and file is not None:
        say("cluster", 0.85)
        direct_s = overheads.request_s + MeasuredCost(steps.fit).prefill_s([(1, 0)])
        router_s, front = _in_cluster(file, options, shape, bounds, direct_s, plan, slower_on(pace, last, steps.unsteady))
        overheads = overheads.model_copy(update={"router_s": router_s})
    if plan.transport:
        say("transfers", 0.95)
        kv = transfer.memory(
            shape.layers,
            shape.kv_heads,
            shape.head_dim,
            options.block_tokens,
            dtype=shape.dtype,
            device=str(device),
            transport=plan.transport,
        )
        setup_s, moved = asyncio.run(transfer.measure(kv, seed=plan.seed))
        overheads = overheads.model_copy(update={"handoff_s": setup_s})
    if plan.clock == "cpu":
        warned.append("steps were timed by CPU time: a busy machine takes longer")
    say("done", 1.0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "" if device.type == "cpu" else str(device)
    machine = this_machine(options.threads or (torch.get_num_threads() if device.type == "cpu" else 0), name)
    return _profile(
        machine=machine,
        shape=shape,
        engine=engine,
        steps=steps,
        overheads=overheads,
        seen=seen,
        front=front,
        moved=moved,
        how="in process",
        warned=warned,
    )


def multipliers_of_server(
    url: str, model_name: str, hardware_name: str, engine: str, tp: int, requests: int, max_tokens: int, plan: CalibrationPlan, say: Say
) -> multipliers.Multipliers:
    """Multipliers of the shipped step times, from so many requests to a running server. Names are the catalogue's; an empty model is the
    server's own word. Raises UsageError on unknown ones, and where nothing answers."""
    url = url.rstrip("/").removesuffix("/v1")
    if engine not in BACKENDS:
        raise UsageError(f"--engine {engine!r} is none of {', '.join(BACKENDS)}{nearest(engine, BACKENDS)}")
    chip, spec = cost.hardware(hardware_name), cost.CostSpec()
    with asyncio.Runner() as runner, closing(HttpClient(url)) as http:
        served = runner.run(model_of(http))
        model = _named(model_name or served)
        computed, error = cost.build(spec, model, chip, tp, like=engine), cost_error(spec, chip, engine)
        if error is None:
            raise UsageError(f"--hardware {hardware_name} is a measured profile already: give an accelerator of pdlab hardware")
        server = MeasuredServer(http, served, model.vocab, temperature=plan.temperature, seed=plan.seed)
        most = min(max_tokens, model.max_positions or max_tokens)
        return runner.run(multipliers.measure(server, computed, error, requests, most, say))


def of_server(
    url: str,
    model_name: str,
    plan: CalibrationPlan,
    say: Say,
    *,
    max_batch_tokens: int,
    max_seqs: int,
    max_tokens: int,
    kv_dtype: str = "bf16",
    loops: rounds.Loops = lambda spans: (),
) -> InstanceProfile:
    """Measure a running server. `model_name` is the catalogue's name of what it serves, or a config.json; empty: the server's own word.
    `loops` tells what the probe of its cores saw, where it runs on this machine (`rounds.measure`)."""
    url = url.rstrip("/").removesuffix("/v1")
    with asyncio.Runner() as runner, closing(HttpClient(url)) as http:
        served = runner.run(model_of(http))
        model = _named(model_name or served)
        blocks, block_tokens = runner.run(over_http.kv_blocks(http))
        most = min(max_tokens, model.max_positions or max_tokens)
        bounds = grid.Bounds(max_batch_tokens, max_seqs, most, blocks * block_tokens or 1 << 40)
        _check(bounds)
        server = MeasuredServer(http, served, model.vocab, temperature=plan.temperature, seed=plan.seed)
        say("requests", 0.0)
        besides_s = runner.run(over_http.request_s(server))
        timed = rounds.measure(
            lambda point: runner.run(over_http.seconds(server, point, besides_s)),
            over_http.points(bounds, block_tokens),
            budget_s=plan.seconds,
            seed=plan.seed,
            progress=lambda share: say("steps", share),
            loops=loops,
        )
    unsteady = unsteadiness(timed)
    calm = calmed(timed, unsteady)
    made = fit(calm)
    said = ["several prompts of a step, and mixed steps, cannot be seen over HTTP: they are put together from single ones"]
    shape = ModelShape(
        name=model.name,
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab,
        kv_bytes_per_token=model.kv_bytes_per_token(kv_dtype),
    )
    engine = EngineShape(
        block_tokens=block_tokens,
        kv_blocks=blocks,
        max_batch_tokens=max_batch_tokens,
        max_seqs=max_seqs,
        max_tokens=most,
        temperature=plan.temperature,
    )
    steps = Steps(timed, made, [*said, *warnings(errors(made, calm))], unsteady=unsteady)
    overheads = Overheads(request_s=besides_s)
    return _profile(
        machine=this_machine(),
        shape=shape,
        engine=engine,
        steps=steps,
        overheads=overheads,
        seen=(),
        front=FrontCosts(),
        moved=None,
        how=url,
        warned=steps.warnings,
    )


def _steps(bench: Bench, bounds: grid.Bounds, plan: CalibrationPlan, progress: Callable[[float], None], loops: rounds.Loops) -> Steps:
    _check(bounds)
    warned = []
    for point in FIRST:  # the first of a kind compiles, and touches memory
        bench.seconds(point)
    step_s, token_s = bench.seconds(FIRST[1]), min(bench.seconds(FIRST[0]) for _ in range(2)) / FIRST[0].tokens
    kept = grid.affordable(bounds, token_s, step_s, plan.seconds / (rounds.LEAST + 1))
    if kept.step_tokens < bounds.step_tokens:
        warned.append(f"steps of more than {kept.step_tokens} tokens were not measured, for want of time: give more --seconds")
    references = [p for p in REFERENCES if bounds.holds(p)]

    def some() -> list[MeasuredPoint]:
        return rounds.measure(bench.seconds, references, budget_s=plan.seconds / 12, seed=plan.seed, clock=bench.clock, loops=loops)

    before = some()
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    timed = rounds.measure(
        bench.seconds,
        [*grid.knots(kept), *grid.held_out(kept)],
        budget_s=plan.seconds * 10 / 12,
        seed=plan.seed,
        progress=progress,
        clock=bench.clock,
        loops=loops,
    )
    share = (time.thread_time() - cpu_s) / (time.perf_counter() - wall_s)
    if bench.device.type == "cpu" and share < QUIET and plan.clock == "wall":
        warned.append(
            f"other processes took {100 * (1 - share):.0f} % of the time: measure on a quiet machine, or with --threads 1 --clock cpu"
        )
    after = some()
    unsteady = unsteadiness([*timed, *before, *after])
    calm = calmed(timed, unsteady)
    made = fit(calm)
    warned += warnings(errors(made, calm))
    if moved := rounds.drift(calmed(before, unsteady), calmed(after, unsteady)):
        warned.append(moved)
    return Steps(timed, made, warned, bench.new_size_s, [*before, *after], unsteady)


def _room_beside(options: EngineOptions) -> bool:
    """Accelerators are not shared, and engines that have all cores would only take turns."""
    return options.device == "cpu" and 0 < 2 * options.threads <= len(os.sched_getaffinity(0))


def _check(bounds: grid.Bounds) -> None:
    if min(bounds.max_tokens, bounds.kv_tokens, bounds.step_tokens) < LEAST_TOKENS or bounds.seqs < 2:
        raise UsageError(
            f"an instance of {bounds.step_tokens} tokens a step, {bounds.max_tokens} a request, {bounds.kv_tokens} of KV and {bounds.seqs} "
            f"sequences is too small to calibrate: it needs {LEAST_TOKENS} tokens of each, and 2 sequences"
        )


async def _served(
    options: EngineOptions,
    shape: ModelShape,
    bounds: grid.Bounds,
    made: MeasuredCost,
    plan: CalibrationPlan,
    slower: Slower,
    unsteady: CoreSpeed,
) -> tuple[Overheads, list[BesideSeen]]:
    """What a server adds, and what two of them on this machine cost each other."""
    arguments = serve_arguments(options)
    two = plan.beside and _room_beside(options)
    async with (
        over_http.all_served(arguments, 2 if two else 1) as urls,
        servers(urls, shape.vocab, temperature=plan.temperature, seed=plan.seed) as [server, *others],
    ):
        overheads = await over_http.overheads(server, made.decode_s, min(8, options.max_seqs))
        if not two:
            return overheads, []
        budget_s = BESIDE * plan.seconds
        with _served_beside(options.threads):
            return overheads, await neighbours(
                server, others[0], bounds, overheads.request_s, budget_s=budget_s, slower=slower, unsteady=unsteady
            )


@contextmanager
def _on_its_cores(options: EngineOptions) -> Iterator[None]:
    """The engine computes on the cores that are looked at."""
    everywhere = os.sched_getaffinity(0)
    try:
        if options.device == "cpu":
            processes.run_on(os.getpid(), set(sorted(everywhere)[: options.threads or None]))
        yield
    finally:
        processes.run_on(os.getpid(), everywhere)


@contextmanager
def _served_beside(threads: int) -> Iterator[None]:
    """The engine started first has its cores to itself, so that what is seen of it is its neighbour's doing; what serves both, and asks
    them, runs where there is room, else beside the second."""
    everywhere = os.sched_getaffinity(0)
    try:
        processes.run_on(os.getpid(), processes.pin(os.getpid(), threads))
        yield
    finally:
        processes.run_on(os.getpid(), everywhere)


def _in_cluster(
    file: Path, options: EngineOptions, shape: ModelShape, bounds: grid.Bounds, direct_s: float, plan: CalibrationPlan, slower: Slower
) -> tuple[float, FrontCosts]:
    """What a router adds to a request, and the front end; nothing where the cluster's engines do not find a core each here."""
    engines = len(Deployment.load(file).placements())
    if options.device != "cpu" or not 0 < engines * options.threads <= len(os.sched_getaffinity(0)):
        return 0.0, FrontCosts()
    whole = msgspec.structs.replace(options, threads=engines * options.threads)
    with local_cluster(file, serve_arguments(whole), options.threads) as url:
        measured = through(url, bounds, shape.vocab, direct_s, temperature=plan.temperature, seed=plan.seed + 2, slower=slower)
        return asyncio.run(measured)


def serve_arguments(options: EngineOptions) -> list[str]:
    """What `pdlab serve` takes to run the same engine."""
    found = ["--model", options.model, "--device", options.device, "--dtype", options.dtype, "--max-seqs", str(options.max_seqs)]
    for name, value in (
        ("--threads", options.threads),
        ("--max-model-len", options.max_model_len),
        ("--kv-gib", options.kv_gib),
        ("--quantization", options.quantization),
        ("--kv-cache-dtype", options.kv_cache_dtype),
    ):
        if value:
            found += [name, str(value)]
    return [*found, "--load-format", options.load_format] if options.load_format != "auto" else found


def _model_shape(loaded: Loaded) -> ModelShape:
    c = loaded.config
    return ModelShape(
        name=c.name,
        fingerprint=loaded.fingerprint,
        layers=c.layers,
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        vocab=c.vocab,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kv_bytes_per_token=c.kv_bytes_per_token(loaded.kv_dtype.itemsize),
    )


def _engine_shape(loaded: Loaded, options: EngineOptions, bounds: grid.Bounds, plan: CalibrationPlan) -> EngineShape:
    return EngineShape(
        device=str(loaded.device),
        block_tokens=options.block_tokens,
        kv_blocks=loaded.engine.scheduler.pool.total,
        max_batch_tokens=bounds.step_tokens,
        max_seqs=bounds.seqs,
        max_tokens=bounds.max_tokens,
        temperature=plan.temperature,
    )


def _named(name: str) -> Model:
    try:
        return cost.model(name)
    except UsageError as error:
        raise UsageError(f"{error}; give with --model what the server serves") from None


def _profile(
    *,
    machine: Machine,
    shape: ModelShape,
    engine: EngineShape,
    steps: Steps,
    overheads: Overheads,
    seen: Sequence[BesideSeen],
    front: FrontCosts,
    moved: TransferFit | None,
    how: str,
    warned: Sequence[str],
) -> InstanceProfile:
    return InstanceProfile(
        name=f"{shape.name} on {machine.cpu}",
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        pdlab=__version__,
        how=how,
        machine=machine,
        model=shape,
        engine=engine,
        steps=steps.fit,
        overheads=overheads,
        beside=beside(seen),
        beside_seen=tuple(seen),
        front=front,
        transfer=moved,
        unsteady=steps.unsteady,
        errors=errors(steps.fit, calmed(steps.measured, steps.unsteady)),
        warnings=tuple(warned),
        points=tuple(steps.measured),
        references=tuple(steps.references),
    )
