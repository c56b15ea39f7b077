"""Which steps are measured. Knots stand closer where an engine's kernels change (few rows), held-out points between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pdlab.cost.profile import Point

TOKENS = (1, 2, 4, 8, 9, 16, 24, 32, 33, 48, 64, 96, 128, 192, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
TOKENS_AFTER = (1, 16, 32, 64, 128, 256, 512)  # that a chunk after cached tokens is measured with: attention to those is linear in both
BATCHES = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (16, 128, 512, 1024, 2048, 4096, 8192, 16384)
UNFINISHED = (64, 256)  # tokens of a chunk that does not end its prompt: what it saves is the same with any number
MIXED_TOKENS = (1, 16, 64, 256, 1024, 4096)
MIXED_BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
HELD_OUT_TOKENS = (6, 20, 40, 80, 110, 150, 220, 384, 640, 900, 1300)
HELD_OUT_AFTER = (
    (28, 0.1),
    (80, 0.05),
    (40, 0.3),
    (150, 0.2),
    (150, 0.7),
    (400, 0.5),
)  # tokens, and the share of the longest context before them
HELD_OUT_PROMPTS = ((20, 3), (60, 4), (130, 2), (200, 3))
HELD_OUT_UNFINISHED = (110, 220)
HELD_OUT_DECODES = ((1, 300), (2, 700), (5, 90), (7, 400), (10, 200), (14, 60), (20, 300), (40, 100), (56, 200), (100, 60))
HELD_OUT_MIXED = ((40, 2, 100), (30, 6, 300), (100, 3, 250), (150, 10, 120), (300, 5, 60), (200, 24, 100), (500, 12, 200))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the instance can take: tokens a step, sequences, tokens of one, KV tokens in all."""

    step_tokens: int
    seqs: int
    max_tokens: int
    kv_tokens: int

    def holds(self, point: Point, spare: int = 16) -> bool:
        """Can it be run, with `spare` tokens made besides by every sequence?"""
        chunk = point.tokens + point.cached
        prompts = point.prompts if point.tokens else 0
        return (
            point.tokens * prompts + point.batch <= self.step_tokens
            and point.batch + prompts <= self.seqs
            and max(chunk, point.context) + spare <= self.max_tokens
            and prompts * (chunk + spare) + point.batch * (point.context + spare) <= self.kv_tokens
        )


def knots(bounds: Bounds) -> list[Point]:
    """The points that a fit is made of."""
    longest = bounds.max_tokens - 16
    tokens = _upto(TOKENS, min(bounds.step_tokens, longest))
    contexts = _contexts(bounds)
    found = [Point(tokens=n) for n in tokens]
    after = sorted(
        {
            *(c for c in CONTEXTS[1:2] if c < longest - TOKENS_AFTER[0]),
            *contexts[1:-1],
            longest - TOKENS_AFTER[-1] if longest > 2 * TOKENS_AFTER[-1] else longest // 2,
        }
    )
    found += [Point(tokens=n, cached=c) for n in TOKENS_AFTER for c in after]
    found += [Point(batch=b, context=c) for b in _upto(BATCHES, bounds.seqs) for c in contexts]
    found += [Point(tokens=n, prompts=k) for n, k in ((16, 2), (64, 2), (64, 4), (256, 2))]
    found += [Point(tokens=n, cached=c, ends=False) for n in UNFINISHED for c in (0, *after[:1])]
    short = contexts[0]
    batches = _upto(MIXED_BATCHES, bounds.seqs - 1)
    found += [Point(tokens=n, batch=b, context=short) for n in _mixed_tokens(bounds, batches) for b in batches]
    return [point for point in _once(found) if bounds.holds(point)]


def held_out(bounds: Bounds) -> list[Point]:
    """The points that it is judged by."""
    longest = bounds.max_tokens - 16
    found = [Point(tokens=n) for n in HELD_OUT_TOKENS]
    found += [Point(tokens=n, cached=max(1, int(share * longest))) for n, share in HELD_OUT_AFTER]
    found += [Point(tokens=n, prompts=k) for n, k in HELD_OUT_PROMPTS]
    found += [Point(tokens=n, ends=False) for n in HELD_OUT_UNFINISHED]
    found += [Point(batch=b, context=c) for b, c in HELD_OUT_DECODES]
    found += [Point(tokens=n, batch=b, context=c) for n, b, c in HELD_OUT_MIXED]
    kept = [point.model_copy(update={"held_out": True}) for point in found]
    known = set(knots(bounds))
    return [p for p in kept if bounds.holds(p) and p.model_copy(update={"held_out": False}) not in known]


def affordable(bounds: Bounds, s_per_token: float, step_s: float, budget_s: float) -> Bounds:
    """`bounds` with steps so short that one round of all points takes at most `budget_s`: tokens at `s_per_token`, steps at `step_s` at
    least. Not below 256 tokens."""

    def round_s(step_tokens: int) -> float:
        of = replace(bounds, step_tokens=step_tokens)
        each = (p.tokens * p.prompts * s_per_token + (8 if p.batch and not p.tokens else 1) * step_s for p in [*knots(of), *held_out(of)])
        return sum(each)

    smaller = (n for n in sorted(TOKENS, reverse=True) if 256 <= n < bounds.step_tokens)
    for tokens in (bounds.step_tokens, *smaller):
        if round_s(tokens) <= budget_s:
            return replace(bounds, step_tokens=tokens)
    return replace(bounds, step_tokens=min(bounds.step_tokens, 256))


def _contexts(bounds: Bounds) -> list[int]:
    """From the shortest to the longest, four at most."""
    longest = min(bounds.max_tokens, bounds.kv_tokens) - 32
    inside = [c for c in CONTEXTS if c < longest]
    if len(inside) < 4:
        return [*inside, longest] if longest - inside[-1] > 16 else inside
    return [inside[0], inside[len(inside) // 2 - 1], inside[-2], longest]


def _mixed_tokens(bounds: Bounds, batches: Iterable[int]) -> list[int]:
    """Up to what fits into a step beside some decodes: what these add grows ever less with the prompt's tokens, so that going on from short
    ones, by more than twice, says too much."""
    beside = max((b for b in batches if 8 * b <= bounds.step_tokens), default=1)
    most = min(bounds.step_tokens - beside, bounds.max_tokens - 16)
    inside = [n for n in MIXED_TOKENS if n <= most]
    return inside if 2 * inside[-1] >= most else [*inside, most]


def _upto(axis: Iterable[int], most: int) -> list[int]:
    return sorted({x for x in axis if x < most} | {most})


def _once(points: Iterable[Point]) -> Iterator[Point]:
    yield from dict.fromkeys(points)
