"""An experiment's workload sent to a running server, and what it measured as a Result: the same figures and files as of a simulation."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdlab import __version__
from pdlab.core import garbage_collection
from pdlab.core.types import Request, UsageError
from pdlab.experiment.experiment import Trial
from pdlab.policies import load as load_policy
from pdlab.proof.bench import overhead
from pdlab.proof.bench.load import Load, extras
from pdlab.proof.bench.poll import poll
from pdlab.proof.bench.prompts import Prompts
from pdlab.proof.bench.server import BenchServer, address, ask
from pdlab.proof.bench.uses import uses
from pdlab.real.net.http import HttpClient
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.report.result import Result
from pdlab.results.metrics import summarise
from pdlab.results.records import Records, Samples
from pdlab.workload.base import Workload
from pdlab.workload.spec import build as build_workload

Progress = Callable[[float, int, int], None]
_LEAST_POLL_S = 0.5
MOST_IDLE = 1 << 16


@dataclass(frozen=True, slots=True)
class Target:
    """A server. `model` and `vocab` None: asked of it; `raw`: a file for the times of all chunks. Another `salt` gives other token ids with
    the same sharing, so that a repeated run does not find the last one's prompts in the server's cache."""

    url: str
    model: str | None = None
    vocab: int | None = None
    api_key: str | None = None
    raw: Path | None = None
    salt: int = 0
    tls: Tls = PLAIN


def measure(experiment: Trial, target: Target, *, progress: Progress | None = None, workload: Workload | None = None) -> Result:
    """Send the workload and wait for all answers. `progress(seconds, requests ended, requests)` is called several times a second. SIGINT
    ends the run early: what there is by then comes back marked partial. Raises UsageError."""
    if workload is None:
        workload = build_workload(experiment.workload, experiment.seed, experiment.base_dir)
    return asyncio.run(_measure(experiment, target, workload, progress))


async def _measure(experiment: Trial, target: Target, workload: Workload, progress: Progress | None) -> Result:
    with contextlib.closing(HttpClient(address(target.url), api_key=target.api_key or "", tls=target.tls, most_idle=MOST_IDLE)) as client:
        server = await ask(client, model=target.model, vocab=target.vocab, extra=_all_extras(workload))
        prompts = Prompts(workload, experiment.seed + (target.salt << 32), server.vocabulary)
        with _written(target.raw) as raw, garbage_collection.seldom():
            load = Load(client, server, workload, prompts, timeout_s=experiment.limits.request_timeout_s, raw=raw)
            samples = Samples(instances=load.book.records.instances)
            complete = await _watched(load, samples, max(experiment.cluster.reports.period_s, _LEAST_POLL_S), progress)
        cost = load.overhead.summary(client.opened)
    return _result(experiment, load, samples, server, cost, salt=target.salt, partial=not complete)


async def _watched(load: Load, samples: Samples, period_s: float, progress: Progress | None) -> bool:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    shown_s = 0.0

    def tick() -> None:
        nonlocal shown_s
        if progress is not None and load.now_s - shown_s >= 0.2:
            shown_s = load.now_s
            progress(shown_s, load.ended, len(load.workload))

    with _interrupts(loop, stop):
        beside = [
            asyncio.create_task(load.overhead.watch(tick)),
            asyncio.create_task(poll(load.client, samples, lambda: load.now_s, period_s)),
        ]
        try:
            return await load.run(stop)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


@contextlib.contextmanager
def _interrupts(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """The first SIGINT sets `stop`, the second one interrupts as ever. Nothing of the kind outside the main thread."""

    def first() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (RuntimeError, ValueError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _written(path: Path | None) -> Iterator[Callable[[bytes], object] | None]:
    if path is None:
        yield None
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise UsageError(f"{path}: cannot write there ({error.strerror}); give another file with --raw") from None
    with file:
        yield file.write


def _all_extras(workload: Workload) -> dict[str, Any]:
    """Every extra field that any request brings."""
    priority = int(workload.priority.max()) if workload.priority is not None else 0
    ttft_s, tpot_s = (None if column is None else 1.0 for column in (workload.ttft_slo_s, workload.tpot_slo_s))
    return extras(Request(0, 0.0, 1, priority=priority, ttft_slo_s=ttft_s, tpot_slo_s=tpot_s))


def _result(
    experiment: Trial, load: Load, samples: Samples, server: BenchServer, cost: dict[str, Any], *, salt: int, partial: bool
) -> Result:
    policy = load_policy.build(experiment.policy, experiment.base_dir)
    records = load.book.records
    instances = uses(records, load.duration_s, first_by_prefill=experiment.transfer.first_token == "prefill")
    summary = summarise(
        records,
        load.gaps,
        samples,
        instances,
        [],  # a link's capacity is not known from outside
        slo=(experiment.slo.ttft_s, experiment.slo.tpot_s),
        duration_s=load.duration_s,
        run={
            "world": "real",
            "version": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": experiment.seed,
            "salt": salt,
            "policy": experiment.policy,
            "policy_hash": load_policy.source_hash(policy),
            "workload": load.workload.reading,
            "url": server.url,
            "model": server.model,
            "server_version": server.version,
            "timelines": load.timelines,
            "zero_s": load.zero_s,  # of this machine's monotonic clock
        },
        partial=partial,
        warnings=[*_warnings(load, server), *overhead.warnings(cost)],
    )
    summary |= {"client": cost, "bottleneck": _seen_from_outside(summary["bottleneck"], bool(instances))}
    return Result(summary, records, load.gaps, samples, experiment.resolved())


def _seen_from_outside(bottleneck: dict[str, Any], instances: bool) -> dict[str, Any]:
    """Where time was lost is measured; what a decode step was bound by is not, and without instances nobody is to blame."""
    if not instances:
        use = dict.fromkeys(bottleneck["use"])
        return {"resource": "unknown", "role": None, "instance": None, "evidence": "the server tells nothing of its instances", "use": use}
    where, _, why = bottleneck["evidence"].partition("; ")
    if why.startswith("decode steps were bound by"):
        return {**bottleneck, "resource": "decode", "evidence": where}
    return bottleneck


def _warm(records: Records) -> bool:
    """Were tokens of the very first prompt in the cache?"""
    found = records.columns()
    return bool(len(records)) and bool(found["cached_tokens"][found["arrival_s"].argmin()] > 0)


def _warnings(load: Load, server: BenchServer) -> list[str]:
    workload = load.workload
    said = [*workload.notes, *server.notes]
    if workload.dropped and not any("dropped" in note for note in workload.notes):  # which would say why, too
        said.append(f"{workload.dropped} rows of the workload were dropped")
    if load.other_lengths:
        said.append(f"{load.other_lengths} answers had another length than was asked for")
    if _warm(load.book.records):
        said.append("the server's prefix cache knew these prompts from an earlier run: restart it, or give another --salt")
    if workload.best_of is not None and workload.n is not None and (workload.best_of > workload.n).any():
        said.append("best_of above n cannot be streamed: all candidates were asked for as n")
    if workload.after is not None and "return_token_ids" in server.refused:
        said.append("later turns did not repeat the server's answers, whose tokens it does not tell: it found less in its cache")
    return said
