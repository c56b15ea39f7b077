"""Points in random order, again and again, so that a machine that slows down or speeds up does so for all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence

from pdlab.cost.profile import MeasuredPoint, Point

MOST = 11  # repeats of a point
LEAST = 3
DRIFT = 0.05

Seconds = Callable[[Point], float]
Loops = Callable[[Sequence[tuple[float, float]]], tuple[float, ...]]
Progress = Callable[[float], None]


def measure(
    seconds: Seconds,
    points: Sequence[Point],
    *,
    budget_s: float,
    seed: int = 0,
    progress: Progress = lambda share: None,
    clock: Callable[[], float] = time.monotonic,
    loops: Loops = lambda spans: (),
) -> list[MeasuredPoint]:
    """Every point once, then over and over, until `budget_s` is spent or each has its repeats; a long one takes no more than its share
    of the time, by `clock`, once it has `LEAST`. The first round is finished whatever it takes. `progress` hears the share that is done,
    and `loops` says what a short loop took in spans of monotonic time, if it was looked at."""
    rng = random.Random(seed)
    spans: dict[Point, list[tuple[float, float]]] = {point: [] for point in points}
    found: dict[Point, list[float]] = {point: [] for point in points}
    spent = dict.fromkeys(points, 0.0)
    start_s = clock()
    share_s = budget_s / max(1, len(points))
    first = True
    while True:
        due = [p for p in points if len(found[p]) < (LEAST if spent[p] > share_s else MOST)]
        if not due:
            break
        rng.shuffle(due)
        for number, point in enumerate(due):
            at_s = clock()
            if not first and at_s - start_s > budget_s:
                return _all(found, spans, loops)
            began_s = time.monotonic()
            found[point].append(seconds(point))
            spans[point].append((began_s, time.monotonic()))
            spent[point] += clock() - at_s
            used = (clock() - start_s) / budget_s
            progress(min(1.0, max(used, number / len(due)) if first else used))
        first = False
    progress(1.0)
    return _all(found, spans, loops)


def _all(found: dict[Point, list[float]], spans: dict[Point, list[tuple[float, float]]], loops: Loops) -> list[MeasuredPoint]:
    return [MeasuredPoint(point=point, seconds=tuple(times), loop_s=loops(spans[point])) for point, times in found.items()]


def together(times: Iterable[Sequence[MeasuredPoint]]) -> list[MeasuredPoint]:
    """The repeats of each point, of all the times that it was measured."""
    found: dict[Point, MeasuredPoint] = {}
    for own in (m for measured in times for m in measured):
        known = found.get(own.point)
        both = (
            own if known is None else MeasuredPoint(point=own.point, seconds=known.seconds + own.seconds, loop_s=known.loop_s + own.loop_s)
        )
        found[own.point] = both
    return list(found.values())


def drift(before: Sequence[MeasuredPoint], after: Sequence[MeasuredPoint]) -> str:
    """A warning where the same points took another time at the end than at the beginning, or ""."""
    worst = max((late.median_s / early.median_s - 1.0 for early, late in zip(before, after, strict=True)), key=abs, default=0.0)
    if abs(worst) <= DRIFT:
        return ""
    how = "longer" if worst > 0 else "less"
    return f"the machine drifted: the same steps took {100 * abs(worst):.0f} % {how} at the end than at the beginning"
