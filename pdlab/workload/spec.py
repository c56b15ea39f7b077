"""The experiment's `workload:` mapping, and the workload it asks for.

    workload: {source: azure-conv-2023, requests: 2000, rate: 8.0}
    workload: {source: traces/mine.jsonl.zst, format: mooncake, requests: 5000}
    workload: {source: synthetic, requests: 1000, rate: 30, prompt: 1024, output: 128, arrival: {process: gamma, cv: 2}}

A trace keeps its own times unless `rate` stretches them; built-ins are drawn anew from figures fitted to the traces they are named after.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pdlab.types import UsageError
from pdlab.workload import arrivals, builtin, lengths, readers
from pdlab.workload.base import Workload
from pdlab.workload.sessions import Sessions, unroll

SYNTHETIC = "synthetic"


def _arrival(value: object) -> object:
    return {"process": value} if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Lengths = Annotated[int, Field(ge=1)] | lengths.Lengths
PerPriority = Positive | dict[int, Positive]


class WorkloadSpec(BaseModel):
    """`rate` is in requests/s. `prompt` and `output` replace the source's lengths. `priorities` maps each priority to its share; an SLO is a
    number for all, or one for each priority."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    format: Literal["auto", "azure", "mooncake", "burstgpt", "bailian", "generic"] = "auto"
    requests: Count | None = None
    duration_s: Positive | None = None
    rate: Positive | None = None
    arrival: Annotated[arrivals.Arrival | None, BeforeValidator(_arrival)] = None
    prompt: Lengths | None = None
    output: Lengths | None = None
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None
    sessions: Sessions | None = None
    hash_tokens: Count = 16
    priorities: dict[int, Positive] | None = None
    ttft_slo_s: PerPriority | None = None
    tpot_slo_s: PerPriority | None = None
    n: Count = 1
    best_of: Count | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} must be at least n {self.n}")
        if self.source == SYNTHETIC:
            if self.prompt is None or self.output is None:
                raise ValueError("source synthetic needs prompt and output lengths, such as prompt: 1024, output: 128")
            if self.rate is None and (self.arrival is None or self.arrival.process != "closed"):
                raise ValueError("source synthetic needs rate, in requests/s")
            if self.requests is None and self.duration_s is None:
                raise ValueError("source synthetic needs requests or duration_s")
        elif self.sessions is not None:
            raise ValueError("sessions are for source synthetic: a trace brings its own")
        for key in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, key)
            if isinstance(value, dict) and set(value) - set(self.priorities or {0: 1.0}):
                raise ValueError(f"{key} names a priority that priorities does not: {sorted(set(value) - set(self.priorities or {0: 1.0}))}")
        if self.source not in (SYNTHETIC, *builtin.NAMES) and not _is_path(self.source):
            raise ValueError(builtin.unknown(self.source))
        return self


def _is_path(source: str) -> bool:
    return any(part in source for part in (".csv", ".json", "/"))


def build(spec: WorkloadSpec, seed: int, base_dir: Path) -> Workload:
    """The workload that a spec asks for; equal seeds give equal workloads. Paths are relative to `base_dir`. Raises UsageError."""
    rng = np.random.default_rng(seed)
    if spec.source == SYNTHETIC:
        made = _synthetic(spec, rng)
    elif spec.source in builtin.NAMES:
        made = _builtin(spec, rng)
    else:
        made = readers.load(base_dir / spec.source, format=spec.format, requests=spec.requests)
        made = _retimed(spec, made, rng)
    return _clip(spec, _labelled(spec, made, rng))


def _count(spec: WorkloadSpec, rate: float, default: int) -> int:
    if spec.requests is not None:
        return spec.requests
    return max(1, round(rate * spec.duration_s)) if spec.duration_s is not None else default


def _synthetic(spec: WorkloadSpec, rng: np.random.Generator) -> Workload:
    assert spec.prompt is not None and spec.output is not None
    arrival = spec.arrival or arrivals.Arrival()
    rate = spec.rate or 1.0
    count = _count(spec, rate, 1000)
    prompts, outputs = lengths.draw(spec.prompt, rng.random(count)), lengths.draw(spec.output, rng.random(count))
    if spec.sessions is not None:
        s = spec.sessions
        mean = s.turns
        turns = np.full(count, round(mean)) if s.fixed_turns else rng.geometric(1 / mean, count)
        needed = int(np.searchsorted(np.cumsum(turns), count)) + 1
        starts = arrivals.draw(arrival, rate / mean, count, rng)
        columns = unroll(s, starts, turns.astype(np.int32), prompts, outputs, count, spec.hash_tokens, rng)
        assert needed <= count
        times, prompts, outputs, after, hashes = columns
        return Workload(SYNTHETIC, times, prompts, outputs, hashes, spec.hash_tokens, after=after, concurrency=arrival.concurrency)
    times = arrivals.draw(arrival, rate, count, rng)
    return Workload(SYNTHETIC, times, prompts, outputs, hash_tokens=spec.hash_tokens, concurrency=arrival.concurrency)


def _builtin(spec: WorkloadSpec, rng: np.random.Generator) -> Workload:
    own_rate = builtin.rate_rps(spec.source)
    count = _count(spec, spec.rate or own_rate, builtin.requests(spec.source))
    return _retimed(spec, builtin.draw(spec.source, count, rng), rng)


def _retimed(spec: WorkloadSpec, made: Workload, rng: np.random.Generator) -> Workload:
    """The source's workload with the times and lengths that the spec replaces."""
    changes: dict[str, Any] = {}
    count = len(made)
    if spec.prompt is not None:
        changes |= {"prompt_tokens": lengths.draw(spec.prompt, rng.random(count)), "hashes": None}
    if spec.output is not None:
        changes["output_tokens"] = lengths.draw(spec.output, rng.random(count))
    if spec.arrival is not None:
        rate = spec.rate or made.rate_rps
        changes |= {"arrival_s": arrivals.draw(spec.arrival, rate, count, rng), "concurrency": spec.arrival.concurrency, "after": None}
        made = dataclasses.replace(made, **changes)
    else:
        made = dataclasses.replace(made, **changes)
        if spec.rate is not None:
            made = made.rescaled(spec.rate)
    if spec.duration_s is not None and made.concurrency is None:
        made = made.head(max(1, int(np.searchsorted(made.arrival_s, spec.duration_s))))
    return made


def _labelled(spec: WorkloadSpec, made: Workload, rng: np.random.Generator) -> Workload:
    """Priorities, SLOs, n and best_of, where the spec gives them."""
    count, changes = len(made), dict[str, Any]()
    priority = made.priority
    if spec.priorities is not None:
        values = np.array(list(spec.priorities), np.int16)
        shares = np.array(list(spec.priorities.values()))
        priority = changes["priority"] = rng.choice(values, count, p=shares / shares.sum())
    for key in ("ttft_slo_s", "tpot_slo_s"):
        slo = getattr(spec, key)
        if isinstance(slo, dict):
            column = np.full(count, np.nan)
            for value, seconds in slo.items():
                column[(priority if priority is not None else np.zeros(count)) == value] = seconds
            changes[key] = column
        elif slo is not None:
            changes[key] = np.full(count, slo)
    best_of = spec.best_of or spec.n
    if best_of > 1:
        changes |= {"n": np.full(count, spec.n, np.int16), "best_of": np.full(count, best_of, np.int16)}
    return dataclasses.replace(made, **changes) if changes else made


def _clip(spec: WorkloadSpec, made: Workload) -> Workload:
    """Requests beyond max_prompt_tokens are dropped and counted, answers beyond max_output_tokens are cut."""
    if spec.max_output_tokens is not None:
        made = dataclasses.replace(made, output_tokens=np.minimum(made.output_tokens, spec.max_output_tokens))
    if spec.max_prompt_tokens is None or made.prompt_tokens.max() <= spec.max_prompt_tokens:
        return made
    keep = np.flatnonzero(made.prompt_tokens <= spec.max_prompt_tokens)
    if not keep.size:
        raise UsageError(f"workload.max_prompt_tokens {spec.max_prompt_tokens} leaves no request; the shortest has {made.prompt_tokens.min()}")
    return made.only(keep, f"prompts over {spec.max_prompt_tokens} tokens")
