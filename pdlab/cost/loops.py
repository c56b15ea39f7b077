"""Mean TPOT and TTFT of many closed loops at once, by arithmetic on arrays: what a fit evaluates thousands of times.

A request decodes for D = (n - 1) TPOT seconds, n its output tokens, and cycles in W = TTFT + D. Each of the other B - 1 prefills once a
cycle and out of step, so D meets (B - 1) D / W prefills, each of which lengthens the decode step it rides on by I = mixed step - decode
step:

    D = (n - 1) t + (B - 1) (D / W) I,     W = P + D,    P = the request's own prefill step, riding on the others' decodes

t is the decode step with a mean context of prompt + n / 2 and, as prefilling requests do not decode, B D / W sequences. It is solved by
iteration. An engine that lets prompts go first (SGLang) keeps its requests in step: they arrive together, and each stalls while those
behind it in the queue prefill, alone (I = prefill step). Of a cycle W = (n - 1) t + B I that takes the share r = B I / W, and a request
meets the fewer others the larger it is, half of them where prefill is all:  D = (n - 1) t + (B - 1) (1 - r / 2) I.

Where B requests exceed the KV capacity, B is what fits. On disaggregated servers a decode step meets no prefill, and the slower side sets
the pace: of C requests those decode that prefill lets through, and no more than decoding servers take at once. The others wait.

TTFT is the front end's time, what the prompt is held back, half a decode step, the prompt's own step, and what of the first wave's queue a
mean over all waves holds.
It is rough: the fit multiplies both by simulated / computed of each row, which changes little with the coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.cost.amounts import Amounts, amounts
from pdlab.cost.capacity import kv_capacity_tokens
from pdlab.cost.launches import decode_slots, delay, front_share, waves
from pdlab.cost.measurements import SHORTEST_SHARE, MeasuredRow
from pdlab.cost.parallel import fitting
from pdlab.cost.step import StepParts, step_parts, without_attention_s

Floats = NDArray[np.float64]
MEAN_SHARE = (1 + SHORTEST_SHARE) / 2  # of nominal lengths
CHUNK_TOKENS = 8192
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Rates:
    """`Coefficients` as arrays, one value a row."""

    values: Mapping[str, Floats]

    def __getattr__(self, name: str) -> Floats:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """Rows as arrays. `serving` is what decodes, `prefilling` what computes prompts: the same of aggregated rows."""

    concurrency: Floats
    room: Floats  # requests that what decodes takes at once: its KV cache has room for so many, and its launch allows no more
    prompt: Floats
    output: Floats
    drafted: Floats  # tokens a step
    layers: Floats
    waves: Floats
    front: Floats  # of what the engine's front end takes
    delayed: Floats  # decode steps that a prompt is held back, in the mean
    prompts_first: NDArray[np.bool_]
    apart: NDArray[np.bool_]
    decoders: Floats
    prefillers: Floats
    serving: Amounts
    prefilling: Amounts


def loops(rows: Sequence[MeasuredRow]) -> Loops:
    """Raises UsageError where a row's model does not fit."""
    prefill = [_amounts(row, 0) for row in rows]
    decode = [_amounts(row, -1) for row in rows]
    return Loops(
        concurrency=np.array([float(row.concurrency) for row in rows]),
        room=np.array([_room(row) for row in rows]),
        prompt=np.array([MEAN_SHARE * row.prompt_tokens for row in rows]),
        output=np.array([MEAN_SHARE * row.output_tokens for row in rows]),
        drafted=np.array([float(row.mtp_tokens) for row in rows]),
        layers=np.array([float(row.model().layers) for row in rows]),
        waves=np.array([float(waves(row)) for row in rows]),
        front=np.array([front_share(row) for row in rows]),
        delayed=np.array([_delayed(row) for row in rows]),
        prompts_first=np.array([row.engine == "sglang" for row in rows]),
        apart=np.array([row.disaggregated for row in rows]),
        decoders=np.array([float(row.sides[-1].workers) for row in rows]),
        prefillers=np.array([float(row.sides[0].workers) for row in rows]),
        serving=stacked(decode),
        prefilling=stacked(prefill),
    )


def _amounts(row: MeasuredRow, side: int) -> Amounts:
    model = row.model()
    return amounts(model, row.hardware(), fitting(model, row.sides[side].parallel), row.weight_dtype, row.kv_dtype)


def _room(row: MeasuredRow) -> float:
    side = row.sides[-1]
    model = row.model()
    dtype = row.weight_dtype or model.weight_dtype
    tokens = kv_capacity_tokens(model, row.hardware(), side.parallel, 0.9, dtype, row.kv_dtype)
    slots = decode_slots(row)
    each = tokens / (MEAN_SHARE * (row.prompt_tokens + row.output_tokens / 2))
    return max(1.0, side.workers * (each if slots is None else min(each, slots)))


def _delayed(row: MeasuredRow) -> float:
    held = delay(row)
    if held is None or row.concurrency == 1:
        return 0.0
    return held.waited_steps(row.concurrency / (MEAN_SHARE * row.output_tokens), MEAN_SHARE * row.prompt_tokens)


def stacked(parts: Sequence[Any]) -> Any:
    """Like dataclasses of numbers as one of arrays; of tuples of unlike length, the shorter are filled up with nothing."""
    first = parts[0]
    if isinstance(first, int | float):
        return np.array(parts, dtype=np.float64)
    if isinstance(first, tuple):
        longest = max(parts, key=len)
        filled = [(*part, *(_nothing(longest[k]) for k in range(len(part), len(longest)))) for part in parts]
        return tuple(stacked([part[k] for part in filled]) for k in range(len(longest)))
    made: Any = type(first)
    return made(**{f.name: stacked([getattr(part, f.name) for part in parts]) for f in fields(first)})


def _nothing(like: Any) -> Any:
    return type(like)(**{f.name: 1.0 if f.name == "window" else 0.0 for f in fields(like)})


def closed_loops(loops: Loops, k: Rates) -> tuple[Floats, Floats]:
    """(TPOT, TTFT) in seconds, one a row."""
    serving, prefilling = step_parts(loops.serving, k), step_parts(loops.prefilling, k)
    steps = np.maximum(1.0, loops.output - 1.0)
    most = np.minimum(loops.concurrency, loops.room)
    share = np.ones_like(most)
    alone_s = _prefill_s(loops, prefilling, k, np.ones_like(most))
    fits = prefilling.groups * np.where(loops.apart, np.maximum(1.0, CHUNK_TOKENS // loops.prompt), 1.0)  # prompts of a step
    queued = np.minimum(fits, np.maximum(1.0, most / loops.prefillers))
    each_s = _prefill_s(loops, prefilling, k, queued) / queued
    decode_s, added_s = np.zeros_like(most), np.zeros_like(most)
    step = np.zeros_like(most)
    together = np.ones_like(most)  # prompts of a step, on groups of their own
    for _ in range(_ROUNDS):
        batch = np.maximum(1.0, most * share / loops.decoders)
        context = batch * (loops.prompt + loops.output / 2)
        step = _decode_s(loops, serving, k, batch, context)
        mixed = _added_s(loops, serving, k, batch, together)
        added_s = np.where(loops.prompts_first, each_s, mixed)
        first_share = 1.0 - most * each_s / (steps * step + most * each_s) / 2
        first = steps * step + (most - 1) * first_share * each_s
        chunked = steps * step + (most - 1) * share * mixed
        decoding_s = np.maximum(steps * step / most, (steps * step + alone_s) / loops.concurrency)
        pace_s = np.maximum(each_s / loops.prefillers, decoding_s)  # of P/D: between two requests
        decode_s = np.where(loops.apart, steps * step, np.where(loops.prompts_first, first, chunked))
        wanted = np.where(loops.apart, decode_s / (pace_s * most), decode_s / (decode_s + step + mixed))
        busy = np.minimum(1.0, most * mixed / (decode_s + step + mixed))
        together = 0.5 * together + 0.5 * (1.0 + (np.minimum(loops.serving.groups, most) - 1.0) * busy)
        share = np.where(loops.prompts_first & ~loops.apart, 1.0, 0.5 * share + 0.5 * np.minimum(1.0, wanted))
    burst_s = np.where(loops.apart, each_s / loops.prefillers, added_s) * np.maximum(0.0, most - 1) / 2 / loops.waves
    round_s = loops.concurrency * np.maximum(each_s / loops.prefillers, decode_s / most)  # of P/D: what its slower side takes for all
    waiting_s = np.maximum(0.0, round_s - decode_s - alone_s)
    own_s = np.where(loops.apart, alone_s, np.where(loops.prompts_first, alone_s, step + added_s))
    queued_s = np.maximum(0.0, loops.concurrency / most - 1.0) * (decode_s + own_s)
    held_s = loops.delayed * decode_s / steps
    return decode_s / steps, k.request_s * loops.front + held_s + 0.5 * step + own_s + burst_s + np.where(loops.apart, waiting_s, queued_s)


def _context_s(k: Rates, read_s: Floats, compute_s: Floats, groups: Floats) -> Floats:
    slower: Floats = np.maximum(read_s / k.attention_memory, compute_s / k.attention_compute) / groups
    return slower


def _decode_s(loops: Loops, parts: StepParts, k: Rates, batch: Floats, context: Floats) -> Floats:
    """For a token of each sequence: `Roofline` has the words on drafts."""
    tokens = batch * (1.0 + loops.drafted)
    seconds: Floats = without_attention_s(parts, tokens, tokens / parts.groups, batch)
    for a in loops.serving.attended:
        seen = np.where(a.window > 1.0, np.minimum(context, batch * a.window), context)
        seconds = seconds + seen * _context_s(k, a.read_s, a.context_s, parts.groups)
    heads = loops.drafted * ((batch * parts.head_token_s) ** 2 + parts.head_read_s**2) ** 0.5
    made_s: Floats = (seconds * (1.0 + loops.drafted / loops.layers) + heads) / _made(loops, k)
    return made_s


def _made(loops: Loops, k: Rates) -> Floats:
    """Tokens of a step, in the mean."""
    made = np.ones_like(loops.drafted)
    for d in range(1, int(loops.drafted.max(initial=0.0)) + 1):
        made = made + np.where(loops.drafted >= d, k.acceptance**d, 0.0)
    return made


def _added_s(loops: Loops, parts: StepParts, k: Rates, batch: Floats, together: Floats) -> Floats:
    """By how much a prompt lengthens decode steps, of so many in a step."""
    chunks = np.maximum(1.0, np.ceil(loops.prompt / CHUNK_TOKENS))
    tokens = loops.prompt / chunks
    verified = batch * (1.0 + loops.drafted)
    both = without_attention_s(parts, verified + together * tokens, verified / parts.groups + tokens, batch + together)
    alone = without_attention_s(parts, verified, verified / parts.groups, batch)
    added_s: Floats = (chunks * (both - alone) + _pairs_s(loops.serving, loops, k)) / together
    return added_s


def _prefill_s(loops: Loops, parts: StepParts, k: Rates, together: Floats) -> Floats:
    """Of so many prompts in a step, spread over the groups of ranks."""
    chunks = np.maximum(1.0, np.ceil(loops.prompt / CHUNK_TOKENS))
    tokens = loops.prompt / chunks
    own = np.maximum(1.0, together / parts.groups)  # on a group
    linear_s = chunks * without_attention_s(parts, together * tokens, own * tokens, together)
    whole_s: Floats = linear_s + own * _pairs_s(loops.prefilling, loops, k)
    return whole_s


def _pairs_s(counted: Amounts, loops: Loops, k: Rates) -> Floats:
    seconds = np.zeros_like(loops.prompt)
    for a in counted.attended:
        growing = np.where(a.window > 1.0, np.minimum(loops.prompt, a.window), loops.prompt)
        pairs = growing * (growing + 1) / 2 + (loops.prompt - growing) * a.window
        seconds = seconds + pairs * a.pair_s / k.attention_compute
    return seconds
