"""How far decoding is from its objective: the batch and context it works with now, against those at which a step takes as long as TPOT may.

A decode instance is busy with one sequence as with hundreds, so that its busy share says nothing. Its step, as the cost model has it, is a
line in the tokens of all contexts for each batch; between the batches that were sampled it is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pdlab.core.types import Role
from pdlab.results.records import InstanceUse, Samples
from pdlab.results.units import number, seconds

DecodeProfile = Sequence[tuple[int, int, float]]  # (batch, context tokens in all, seconds)


@dataclass(frozen=True, slots=True)
class Headroom:
    """Of one instance. `batch` and `context_tokens` (of a sequence) are means over its reports under load, `step_s` such a step. TPOT is
    met up to `batch_limit` sequences of that context (`bounded`: as many as were sampled, or `engine.max_seqs`), and up to `context_limit`
    tokens each at that batch; `kv_batch` of them fit its KV memory."""

    instance: str
    batch: float
    batch_most: int
    context_tokens: float
    step_s: float
    objective_s: float
    batch_limit: int
    bounded: bool
    context_limit: float
    kv_batch: float

    @property
    def evidence(self) -> str:
        each = number(round(self.context_tokens))
        now = f"{self.instance} decodes {number(self.batch)} sequences of {each} tokens in {seconds(self.step_s)}"
        if self.batch_limit == 0:
            return f"{now} (most {self.batch_most:,}); TPOT {seconds(self.objective_s)} is not met with one such sequence"
        up_to = f"{self.batch_limit:,}" + (" at least" if self.bounded else "")
        fit = f"; {number(math.floor(self.kv_batch))} fit its KV memory" if math.isfinite(self.kv_batch) else ""
        longer = f", or {number(round(self.context_limit))} tokens each" if math.isfinite(self.context_limit) and not self.bounded else ""
        return f"{now} (most {self.batch_most:,}); TPOT {seconds(self.objective_s)} is met up to {up_to}{longer}{fit}"

    def figures(self) -> dict[str, float | int | str | bool]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "evidence": self.evidence}


def decode_headroom(samples: Samples, instances: Sequence[InstanceUse], tpot_slo_s: float) -> Headroom | None:
    """Of the decode instance with the largest batch. None without an objective, without reports, or where step times are not known."""
    if not math.isfinite(tpot_slo_s):
        return None
    decoders = {use.name: use for use in instances if Role(use.role).decodes and use.decode_profile}
    instance, running, context = (samples.column(name) for name in ("instance", "running", "context_tokens"))
    kv_use = samples.column("used_blocks") / np.maximum(samples.column("kv_blocks"), 1)
    busiest: tuple[float, InstanceUse, float, float, int] | None = None
    for k, name in enumerate(samples.instances or [use.name for use in instances]):
        mine = (instance == k) & (running > 0)
        if name not in decoders or not mine.any():
            continue
        batch = float(running[mine].mean())
        if busiest is None or batch > busiest[0]:
            used = float(kv_use[mine].mean())
            kv_batch = batch / used if used else math.inf
            busiest = (batch, decoders[name], float(context[mine].sum() / running[mine].sum()), kv_batch, int(running[mine].max()))
    if busiest is None:
        return None
    batch, use, each, kv_batch, most = busiest
    return _headroom(use, batch, most, each, kv_batch, tpot_slo_s)


def _headroom(use: InstanceUse, batch: float, most: int, each: float, kv_batch: float, tpot_slo_s: float) -> Headroom | None:
    lines = StepLines.of(use.decode_profile)
    if not lines.batches.size:
        return None
    sampled = int(lines.batches[-1])
    largest = sampled if use.max_seqs is None else min(sampled, use.max_seqs)
    sizes = np.arange(1, largest + 1)
    met = sizes[lines.step_s(sizes, sizes * each) <= tpot_slo_s]
    batch_limit = int(met[-1]) if met.size else 0
    base_s, step_s = float(lines.step_s(batch, 0.0)), float(lines.step_s(batch, batch * each))
    slope_s = float(lines.step_s(batch, 1.0)) - base_s
    return Headroom(
        instance=use.name,
        batch=batch,
        batch_most=most,
        context_tokens=each,
        step_s=step_s,
        objective_s=tpot_slo_s,
        batch_limit=batch_limit,
        bounded=batch_limit == largest,
        context_limit=(tpot_slo_s - base_s) / slope_s / batch if slope_s > 0.0 else math.inf,
        kv_batch=kv_batch,
    )


@dataclass(frozen=True, slots=True, eq=False)
class StepLines:
    """For each batch of a profile with two contexts or more, in order: seconds of a decode step at no context, and seconds a token."""

    batches: NDArray[np.float64]
    base_s: NDArray[np.float64]
    slope_s: NDArray[np.float64]

    @classmethod
    def of(cls, profile: DecodeProfile) -> StepLines:
        by_batch: dict[int, list[tuple[int, float]]] = {}
        for batch, context, taken_s in profile:
            by_batch.setdefault(batch, []).append((context, taken_s))
        lines = []
        for batch, points in sorted(by_batch.items()):
            (first, first_s), (last, last_s) = min(points), max(points)
            if last > first:
                slope_s = (last_s - first_s) / (last - first)
                lines.append((batch, first_s - slope_s * first, slope_s))
        return cls(*np.array(lines, dtype=np.float64).reshape(-1, 3).T)

    def step_s(self, batch: ArrayLike, context_tokens: ArrayLike) -> NDArray[np.float64]:
        """Seconds of a decode step of so many sequences with so many tokens in all, one figure for each pair."""
        at = np.asarray(batch, dtype=np.float64)
        return np.asarray(np.interp(at, self.batches, self.base_s) + np.interp(at, self.batches, self.slope_s) * np.asarray(context_tokens))
