"""What each instance of a measured run did, as far as the timelines of its requests tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pdlab.core.types import Role
from pdlab.results.records import Column, InstanceUse, Records

NAN = math.nan


def uses(records: Records, duration_s: float, *, first_by_prefill: bool = True) -> list[InstanceUse]:
    """What each instance did, as far as timelines tell: it was busy with prompts from a prompt's begin to its first token, with decoding
    from there to its last, whatever else it did meanwhile. Its KV memory and max_seqs are not known. The first token is the prompt's work,
    not a decode's; where it is not told `first_by_prefill`, it is sampled again after a transfer, by a decode."""
    found = records.columns()
    begun, first, finish = found["prefill_start_s"], found["first_token_s"], found["finish_s"]
    decoding = np.where(np.isnan(found["decode_start_s"]), first, found["decode_start_s"])
    prompts, outputs = found["prompt_tokens"] - found["cached_tokens"], found["output_tokens"]
    decoded = outputs - (1 if first_by_prefill else found["prefill_instance"] == found["decode_instance"])
    uses = []
    for index, name in enumerate(records.instances):
        here, there = found["prefill_instance"] == index, found["decode_instance"] == index
        if not (here | there).any():
            continue  # it was polled, and no timeline names it
        prefill = spans(begun[here], first[here])
        decode = spans(decoding[there], finish[there])
        uses.append(
            InstanceUse(
                name=name,
                role=str(Role.MIXED if here.any() and there.any() else Role.PREFILL if here.any() else Role.DECODE),
                busy_s=length_s([*prefill, *decode]),
                prefill_busy_s=length_s(prefill),
                decode_busy_s=length_s(decode),
                up_s=duration_s,
                kv_blocks=0,
                kv_use_mean=NAN,
                kv_use_peak=NAN,
                requests=int((here | there).sum()),
                prefill_tokens=int(prompts[here].sum()),
                decode_tokens=int(decoded[there].sum()),
            )
        )
    return uses


def spans(start_s: Column, end_s: Column) -> list[tuple[float, float]]:
    """Those that began and ended."""
    held = ~np.isnan(start_s) & (end_s > start_s)
    return list(zip(start_s[held].tolist(), end_s[held].tolist(), strict=True))


def length_s(stretches: Sequence[tuple[float, float]]) -> float:
    """Of their union."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(stretches):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
