"""From measured points to StepTimes. What must not fall with more work is made monotone first, so that noise gives no negative slope.

A grid needs all its cells. Cells that an instance cannot run (too long, too many) go on from those it can, in proportion to the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pdlab.cost.measured import MeasuredCost
from pdlab.cost.profile import AddedGrid, FitError, MeasuredPoint, Point, StepTimes
from pdlab.cost.table import DecodeGrid, PrefillGrid

POOR_MEAN, POOR_WORST = 0.05, 0.15
KINDS = ("prefill", "cached", "prompts", "unfinished", "decode", "mixed")
GROUPS = {kind: kind if kind in ("decode", "mixed") else "prefill" for kind in KINDS}
LEAST_S = 1e-7


def monotone(values: Sequence[float]) -> list[float]:
    """The nearest sequence that does not fall (least squares, by pooling neighbours)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def fit(measured: Iterable[MeasuredPoint]) -> StepTimes:
    """Of the points that are not held out. Without mixed points these are taken to share what a decode of one costs anyway.

    A machine has bad moments, and means of latencies have them in them. A point's few repeats tell its usual time; how much longer the mean
    is, all repeats of its kind tell together."""
    measured = list(measured)
    longer = _longer(measured)
    times = {m.point: m.median_s * longer[GROUPS[m.point.kind]] for m in measured if not m.point.held_out}
    prefill, decode = _prefill(times), _decode(times)
    bare = StepTimes(prefill=prefill, decode=decode, added=_shared(decode))
    prompts = {p: s for p, s in times.items() if p.kind == "prompts"}
    if prompts:
        bare = bare.model_copy(update={"prompt_s": _prompt_s(prompts, bare)})
    unfinished = {p: s for p, s in times.items() if p.kind == "unfinished"}
    if unfinished:
        bare = bare.model_copy(update={"unfinished_chunk_saving_s": _unfinished_chunk_saving_s(unfinished, bare)})
    mixed = {p: s for p, s in times.items() if p.kind == "mixed"}
    if not mixed:
        return bare.model_copy(update={"additive": True})
    return bare.model_copy(update={"added": _added(mixed, MeasuredCost(bare))})


def _longer(measured: Iterable[MeasuredPoint]) -> dict[str, float]:
    """By kind of step, the mean time over the usual one."""
    sums: dict[str, list[float]] = {}
    for m in measured:
        of = sums.setdefault(GROUPS[m.point.kind], [0.0, 0.0])
        of[0] += m.mean_s
        of[1] += m.median_s
    return {group: mean_s / usual_s for group, (mean_s, usual_s) in sums.items()}


def predicted(steps: StepTimes, points: Iterable[Point]) -> list[float]:
    """What the simulator will take these points to cost, seconds."""
    cost = MeasuredCost(steps)
    return [_predicted(cost, point) for point in points]


def errors(steps: StepTimes, measured: Iterable[MeasuredPoint]) -> tuple[FitError, ...]:
    """On the held-out points, by kind."""
    found: dict[str, list[float]] = {}
    cost = MeasuredCost(steps)
    measured = list(measured)
    longer = _longer(measured)
    for m in measured:
        if m.point.held_out:
            usual_s = _predicted(cost, m.point) / longer[GROUPS[m.point.kind]]
            found.setdefault(m.point.kind, []).append(abs(usual_s / m.median_s - 1.0))
    return tuple(
        FitError(kind=kind, points=len(found[kind]), mean=float(np.mean(found[kind])), worst=max(found[kind]))
        for kind in KINDS
        if kind in found
    )


def warnings(found: Iterable[FitError]) -> list[str]:
    return [
        f"the fit is poor for {e.kind}: {100 * e.mean:.1f} % on average and {100 * e.worst:.1f} % at worst on what was held out"
        for e in found
        if e.mean > POOR_MEAN or e.worst > POOR_WORST
    ]


def _predicted(cost: MeasuredCost, point: Point) -> float:
    chunks = [(point.tokens, point.cached)] * point.prompts
    if not point.batch:
        return max(LEAST_S, cost.prefill_s(chunks) - (0.0 if point.ends else cost.unfinished_chunk_saving_s))
    context = point.batch * point.context
    return cost.mixed_s(chunks, point.batch, context) if point.tokens else cost.decode_s(point.batch, context)


def _prefill(times: Mapping[Point, float]) -> PrefillGrid:
    """Finely over the tokens, coarsely over what is cached: attention to that is linear in the tokens between what was measured."""
    tokens = sorted(p.tokens for p in times if p.kind == "prefill")
    alone = dict(zip(tokens, monotone([times[Point(tokens=n)] for n in tokens]), strict=True))
    after: dict[int, dict[int, float]] = {}
    for point in times:
        if point.kind == "cached" and point.tokens in alone:
            after.setdefault(point.cached, {})[point.tokens] = times[point] - times[Point(tokens=point.tokens)]
    columns = {0: dict.fromkeys(tokens, 0.0)}
    for cached in sorted(after):
        known = sorted(after[cached])
        raised = monotone([max(0.0, after[cached][n]) for n in known])
        columns[cached] = {n: max(columns[max(columns)][n], _linear(known, raised, n)) for n in tokens}
    axis = tuple(sorted(columns))
    return PrefillGrid(
        tokens=tuple(tokens), cached=axis, seconds=tuple(tuple(max(LEAST_S, alone[n] + columns[c][n]) for c in axis) for n in tokens)
    )


def _linear(axis: Sequence[int], values: Sequence[float], x: int) -> float:
    """Through the points, and on in proportion beyond the last."""
    if x > axis[-1]:
        if len(axis) == 1:
            return values[0] * x / axis[0]
        return values[-1] + (values[-1] - values[-2]) / (axis[-1] - axis[-2]) * (x - axis[-1])
    return float(np.interp(x, axis, values))


def _decode(times: Mapping[Point, float]) -> DecodeGrid:
    """Rows of a batch. Where a context was too long for the batch, a token costs what it costs the batch below."""
    rows: dict[int, dict[int, float]] = {}
    for point, seconds in times.items():
        if point.kind == "decode":
            rows.setdefault(point.batch, {})[point.context] = seconds
    axis = sorted({context for row in rows.values() for context in row})
    full: dict[int, list[float]] = {}
    below: tuple[int, list[float]] | None = None
    for batch in sorted(rows):
        known = sorted(rows[batch])
        row = monotone([rows[batch][c] for c in known])
        for i in range(len(known), len(axis)):
            slope = (below[1][i] - below[1][i - 1]) / below[0] if below is not None else 0.0
            row.append(row[-1] + slope * batch)
        below = batch, row
        full[batch] = row
    if len(axis) > 1 and axis[0] > 1:  # down to a context of one token
        share = (axis[0] - 1) / (axis[1] - axis[0])
        full = {b: [max(0.5 * row[0], row[0] - share * (row[1] - row[0])), *row] for b, row in full.items()}
        axis = [1, *axis]
    return DecodeGrid(batch=tuple(full), context=tuple(axis), seconds=tuple(tuple(max(LEAST_S, s) for s in row) for row in full.values()))


def _shared(decode: DecodeGrid) -> AddedGrid:
    """What decodes add where that was not seen: all but what the smallest batch costs."""
    first = decode.seconds[0][0]
    return AddedGrid(tokens=(1,), batch=decode.batch, seconds=(tuple(max(0.0, row[0] - first) for row in decode.seconds),))


def _prompt_s(prompts: Mapping[Point, float], bare: StepTimes) -> float:
    cost = MeasuredCost(bare)
    return max(0.0, float(np.median([(s - _predicted(cost, p)) / (p.prompts - 1) for p, s in prompts.items()])))


def _unfinished_chunk_saving_s(unfinished: Mapping[Point, float], bare: StepTimes) -> float:
    cost = MeasuredCost(bare)
    return max(0.0, float(np.median([_predicted(cost, p) - s for p, s in unfinished.items()])))


def _added(mixed: Mapping[Point, float], cost: MeasuredCost) -> AddedGrid:
    """What a step took longer than its chunk alone, less attention to the decodes' contexts."""
    found: dict[int, dict[int, float]] = {}
    for p, seconds in mixed.items():
        attention_s = cost.decode_s(p.batch, p.batch * p.context) - cost.decode_s(p.batch, p.batch)
        found.setdefault(p.tokens, {})[p.batch] = seconds - cost.prefill_s([(p.tokens, p.cached)] * p.prompts) - attention_s
    batches = sorted({batch for row in found.values() for batch in row})
    rows = []
    for tokens in sorted(found):
        known = sorted(found[tokens])
        row = [0.0, *monotone([max(0.0, found[tokens][b]) for b in known])]
        axis = [0, *known]
        rows.append(tuple(_linear(axis, row, b) for b in batches))
    return AddedGrid(tokens=tuple(sorted(found)), batch=tuple(batches), seconds=tuple(rows))


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(intercept, slope) of the line nearest in relative terms, neither below nothing."""
    x, y = np.array(points).T
    weight = 1.0 / np.maximum(y, 1e-9)
    made = np.linalg.lstsq(np.stack([weight, x * weight], axis=1), y * weight, rcond=None)[0]
    if made[0] < 0.0:
        return 0.0, float(np.sum(x * y * weight**2) / np.sum((x * weight) ** 2))
    return float(made[0]), max(0.0, float(made[1]))
