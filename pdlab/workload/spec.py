"""The experiment's `workload:` mapping, and the workload it asks for.

    workload: {source: azure-conv-2023, requests: 2000, rate: 8.0}
    workload: {source: traces/mine.jsonl.zst, format: mooncake, requests: 5000}
    workload: {source: my.csv, columns: {arrival_s: timestamp, prompt_tokens: input_tokens, output_tokens: answer}}
    workload: {source: synthetic, requests: 1000, rate: 30, prompt: 1024, output: 128, arrival: {process: gamma, cv: 2}}

A trace keeps its own times unless `rate` stretches them; built-ins are drawn anew from figures fitted to the traces they are named after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.workload import arrivals, builtin, lengths, objectives, readers
from pdlab.workload.base import Workload
from pdlab.workload.chains import Chains
from pdlab.workload.columns import Wanted, wrong_roles
from pdlab.workload.sessions import Sessions, unroll
from pdlab.workload.text import PACKED
from pdlab.workload.times import Unit

SYNTHETIC = "synthetic"
HASH_TOKENS = 16  # of synthetic prompts
_SUFFIXES = (".csv", ".json", ".jsonl", ".tsv", ".txt", ".log", ".parquet", *PACKED)
_MOST_REQUESTS = 100_000_000


def _arrival(value: object) -> object:
    return {"process": value} if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Requests = Annotated[int, Field(ge=1, le=_MOST_REQUESTS)]
Candidates = Annotated[int, Field(ge=1, le=1024)]


Format = Literal["auto", "azure", "burstgpt", "vidur", "splitwise", "bailian", "mooncake", "guidellm", "aiperf", "vllm", "generic", "table"]


class WorkloadSpec(Strict):
    """`rate` is in requests/s. `prompt` and `output` replace the source's lengths, and new prompts share nothing. Where both `requests` and
    `duration_s` are given, whichever comes first ends the workload. Prompts over `max_prompt_tokens` are dropped and counted, outputs over
    `max_output_tokens` cut. `columns` (role to the file's name) and `time_unit` are of a trace file that does not say them itself;
    `hash_tokens` behind an id of a prefix, of a file whose ids are of another unit than it seems, or of synthetic prompts."""

    source: str
    format: Format = "auto"
    columns: Annotated[dict[str, str], Field(min_length=1)] | None = None
    time_unit: Unit | None = None
    requests: Requests | None = None
    duration_s: Positive | None = None
    rate: Positive | None = None
    arrival: Annotated[arrivals.Arrival | None, BeforeValidator(_arrival)] = None
    prompt: lengths.Lengths = None
    output: lengths.Lengths = None
    max_prompt_tokens: lengths.Tokens | None = None
    max_output_tokens: lengths.Tokens | None = None
    sessions: Sessions | None = None
    hash_tokens: lengths.Tokens | None = None
    priorities: objectives.Priorities | None = None
    ttft_slo_s: objectives.Objective = None
    tpot_slo_s: objectives.Objective = None
    tenants: objectives.Priorities | None = None
    offline: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Candidates = 1
    best_of: Candidates | None = None

    @property
    def closed(self) -> bool:
        return self.arrival is not None and self.arrival.process == "closed"

    @property
    def own_times(self) -> bool:
        """Do requests arrive when a trace file says, at that rate or another?"""
        return _is_path(self.source) and self.arrival is None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for mistake in (self._wrong_source(), self._wrong_loop(), self._wrong_labels()):
            if mistake:
                raise ValueError(mistake)
        return self

    def _wrong_source(self) -> str | None:
        if self.source not in (SYNTHETIC, *builtin.NAMES) and not _is_path(self.source):
            return builtin.unknown(self.source)
        if self.columns is not None and (mistake := wrong_roles(self.columns)):
            return f"columns.{mistake}"
        if not _is_path(self.source):
            for key in ("columns", "time_unit", *(("hash_tokens",) if self.source != SYNTHETIC else ())):
                if getattr(self, key) is not None:
                    return f"{key} is of a trace file, which {self.source} is not"
            if self.format != "auto":
                return f"format is of a trace file, which {self.source} is not"
        if self.source != SYNTHETIC:
            return "sessions are for source synthetic: a trace brings its own" if self.sessions is not None else None
        if self.prompt is None or self.output is None:
            return "source synthetic needs prompt and output lengths, such as prompt: 1024, output: 128"
        if self.rate is None and not self.closed:
            return "source synthetic needs rate, in requests/s"
        if self.requests is None and self.duration_s is None:
            return "source synthetic needs requests or duration_s"
        return None

    def _wrong_loop(self) -> str | None:
        if not self.closed:
            return None
        if self.rate is not None or self.duration_s is not None:
            key = "rate" if self.rate is not None else "duration_s"
            return f"arrival process closed takes no {key}: a request comes when one has ended; requests says how many"
        return "arrival process closed takes no sessions: a turn would come twice" if self.sessions is not None else None

    def _wrong_labels(self) -> str | None:
        if self.best_of is not None and self.best_of < self.n:
            return f"best_of {self.best_of} must be at least n {self.n}"
        known = set(self.priorities or {0: 1.0})
        for key in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, key)
            if (
                value is not None
                and (strange := sorted(set(value.by_priority or ()) - known))
                and (self.priorities or not _is_path(self.source))
            ):
                return f"{key} names priority {', '.join(map(str, strange))}, which priorities does not"
        return None

    @property
    def wanted(self) -> Wanted:
        """What is said of a trace file, and what need not be in it."""
        replaced = {"arrival_s": self.arrival, "prompt_tokens": self.prompt, "output_tokens": self.output}
        return Wanted(
            self.columns or {}, self.time_unit, self.hash_tokens, frozenset(role for role, by in replaced.items() if by is not None)
        )


def _is_path(source: str) -> bool:
    return any(part in source for part in (".csv", ".json", "/")) or source.endswith(_SUFFIXES)


def build(spec: WorkloadSpec, seed: int, base_dir: Path) -> Workload:
    """The workload that a spec asks for; equal seeds give equal workloads. Paths are relative to `base_dir`. Raises UsageError."""
    lengths_read = {key: lengths.read(getattr(spec, key), base_dir) for key in ("prompt", "output")}
    spec = spec.model_copy(update=lengths_read)
    if spec.source == SYNTHETIC:
        made = _enough(spec, spec.rate or 1.0, None, lambda count: _synthetic(spec, count, np.random.default_rng(seed)))
    elif spec.source in builtin.NAMES:
        rate, own = spec.rate or builtin.rate_rps(spec.source), builtin.requests(spec.source)
        made = _enough(spec, rate, own, lambda count: _drawn_like(spec, count, np.random.default_rng(seed)))
    else:
        made = readers.load(base_dir / spec.source, format=spec.format, requests=spec.requests, wanted=spec.wanted)
        made = _changed(spec, made, np.random.default_rng(seed))
        made = _until(spec, made)
    labels = np.random.default_rng([seed, 1])  # of their own, so that a priority more moves no arrival
    return _clipped(spec, _labelled(spec, made, labels))


def _enough(spec: WorkloadSpec, rate: float, own: int | None, make: Callable[[int], Workload]) -> Workload:
    """`requests` of them, or as many as come within `duration_s`, or the trace's `own` number."""
    if spec.requests is not None:
        return _until(spec, make(spec.requests))
    if spec.duration_s is None:
        assert own is not None, "WorkloadSpec makes sure that there is an end"
        return make(own)
    count = int(1.2 * rate * spec.duration_s) + 100
    while count <= _MOST_REQUESTS:
        made = make(count)
        if made.opening_s[-1] >= spec.duration_s:
            return _until(spec, made)
        count *= 2
    raise UsageError(f"workload.duration_s {spec.duration_s:g} at this rate means more than {_MOST_REQUESTS:,} requests; shorten it")


def _until(spec: WorkloadSpec, made: Workload) -> Workload:
    if spec.duration_s is None or made.concurrency is not None:
        return made
    if made.opening_s[0] >= spec.duration_s:
        raise UsageError(f"workload.duration_s {spec.duration_s:g}: the first request of {spec.source} comes at {made.opening_s[0]:g} s")
    return made.until(spec.duration_s)


def _synthetic(spec: WorkloadSpec, count: int, rng: np.random.Generator) -> Workload:
    assert spec.prompt is not None
    assert spec.output is not None
    arrival, rate, hash_tokens = spec.arrival or arrivals.Arrival(), spec.rate or 1.0, spec.hash_tokens or HASH_TOKENS
    prompts, outputs = lengths.draw(spec.prompt, rng.random(count)), lengths.draw(spec.output, rng.random(count))
    if spec.sessions is None:
        times_s = arrivals.draw(arrival, rate, count, rng)
        return Workload(SYNTHETIC, times_s, prompts, outputs, hash_tokens=hash_tokens, concurrency=arrival.concurrency)
    if spec.max_output_tokens is not None:  # before later turns' prompts hold them
        outputs = np.minimum(outputs, np.int32(spec.max_output_tokens))
    starts_s = arrivals.draw(arrival.slower(spec.sessions.mean_turns), rate / spec.sessions.mean_turns, count, rng)
    times_s, prompts, outputs, after, hashes = unroll(spec.sessions, starts_s, prompts, outputs, hash_tokens, rng)
    return Workload(SYNTHETIC, times_s, prompts, outputs, hashes, hash_tokens, after=after)


def _drawn_like(spec: WorkloadSpec, count: int, rng: np.random.Generator) -> Workload:
    return _changed(spec, builtin.draw(spec.source, count, rng), rng)


def _changed(spec: WorkloadSpec, made: Workload, rng: np.random.Generator) -> Workload:
    """The source's workload with the times and lengths that the spec replaces."""
    changes: dict[str, Any] = {}
    count = len(made)
    if spec.prompt is not None:
        changes |= {"prompt_tokens": lengths.draw(spec.prompt, rng.random(count)), "hashes": None}
    if spec.output is not None:
        changes["output_tokens"] = lengths.draw(spec.output, rng.random(count))
    if spec.arrival is not None:
        rate = spec.rate or made.rate_rps
        if not spec.closed and not rate > 0:
            raise UsageError(f"workload.arrival needs workload.rate: {spec.source} has no times, and so no rate of its own")
        changes |= _arriving(spec.arrival, rate, made, rng)
    made = dataclasses.replace(made, **changes)
    return made.rescaled(spec.rate) if spec.rate is not None and spec.arrival is None else made


def _arriving(arrival: arrivals.Arrival, rate: float, made: Workload, rng: np.random.Generator) -> dict[str, Any]:
    """Arrivals drawn anew: of all requests, or where sessions are open loop, of their first turns."""
    if made.after is None or arrival.concurrency is not None:
        notes = made.notes if made.after is None else (*made.notes, "closed loop over all requests: sessions' delays are not kept")
        times_s = arrivals.draw(arrival, rate, len(made), rng)
        return {"arrival_s": times_s, "concurrency": arrival.concurrency, "after": None, "notes": notes}
    starts = made.after < 0
    mean_turns = len(made) / int(starts.sum())
    times_s = made.arrival_s.copy()
    times_s[starts] = arrivals.draw(arrival.slower(mean_turns), rate / mean_turns, int(starts.sum()), rng)
    return {"arrival_s": times_s}


def _labelled(spec: WorkloadSpec, made: Workload, rng: np.random.Generator) -> Workload:
    """Priorities, objectives, tenants, who is in no hurry, n and best_of, where the spec gives them."""
    count, changes = len(made), dict[str, Any]()
    priority = made.priority if made.priority is not None else np.zeros(count, np.int16)
    if spec.priorities is not None:
        priority = changes["priority"] = objectives.draw_priorities(spec.priorities, count, rng)
    for key in ("ttft_slo_s", "tpot_slo_s"):
        objective = getattr(spec, key)
        if objective is not None:
            changes[key] = objectives.draw(objective, priority, rng)
    if spec.tenants is not None:
        changes["tenant"] = objectives.draw_priorities(spec.tenants, count, rng).astype(np.int32)
    if spec.offline is not None:
        changes["offline"] = (rng.random(count) < spec.offline).astype(np.int16)
    best_of = spec.best_of or spec.n
    if best_of > 1:
        changes |= {"n": np.full(count, spec.n, np.int16), "best_of": np.full(count, best_of, np.int16)}
    return dataclasses.replace(made, **changes) if changes else made


def _clipped(spec: WorkloadSpec, made: Workload) -> Workload:
    """Too long prompts dropped, too long outputs cut; a chain ends where the shorter context does."""
    if spec.max_output_tokens is not None:
        made = dataclasses.replace(made, output_tokens=np.minimum(made.output_tokens, np.int32(spec.max_output_tokens)))
    shortened = spec.source != SYNTHETIC and (spec.max_output_tokens is not None or spec.output is not None)
    if made.hashes is not None and shortened:
        context_units = (made.prompt_tokens.astype(np.int64) + made.output_tokens) // made.hash_tokens
        made = dataclasses.replace(made, hashes=Chains(made.hashes).cut(context_units.tolist()))
    if spec.max_prompt_tokens is None or made.prompt_tokens.max() <= spec.max_prompt_tokens:
        return made
    drop = made.prompt_tokens > spec.max_prompt_tokens
    if drop.all() if made.after is None else drop[made.after < 0].all():
        shortest = made.prompt_tokens.min()
        raise UsageError(f"workload.max_prompt_tokens {spec.max_prompt_tokens} leaves no request; the shortest prompt has {shortest}")
    return made.without(drop, f"prompts over {spec.max_prompt_tokens} tokens")
