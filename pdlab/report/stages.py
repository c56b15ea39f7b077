"""A request's life as stretches of time, for timelines and traces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdlab.results.records import Column, Records


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stage of many requests: `start_s` and `end_s` have one entry a request, nan where it never got there. `place` says who it
    occupies: the prefill instance, the link, the decode instance, or nobody (a wait)."""

    name: str
    place: str
    start_s: Column
    end_s: Column


def stretches(records: Records, rows: slice = slice(None)) -> list[Stretch]:
    """The stages of the requests in `rows`, in the order of a request's life. The transfer may overlap the prefill (layer-wise push)."""
    found = records.columns(rows)
    first, finish = found["first_token_s"], found["finish_s"]
    started, sent = found["transfer_start_s"], found["transfer_end_s"]
    by_decode = first > sent  # its first token came from the decode instance
    computed = np.where(by_decode, np.fmin(np.fmax(found["handoff_s"], found["prefill_start_s"]), sent), first)
    stayed = np.isnan(started)
    begun = np.where(np.isnan(found["decode_start_s"]), np.where(stayed, first, np.nan), found["decode_start_s"])
    never_began = np.isnan(found["prefill_start_s"])
    return [
        Stretch("queued", "", found["arrival_s"].copy(), np.where(never_began, finish, found["prefill_start_s"])),
        Stretch("prefill", "prefill", found["prefill_start_s"].copy(), computed),
        Stretch("wait for room", "", computed, np.where(stayed, begun, np.fmax(started, computed))),
        Stretch("KV transfer", "link", started.copy(), sent.copy()),
        Stretch("wait to decode", "", np.where(stayed, np.nan, np.fmax(sent, computed)), np.where(stayed, np.nan, begun)),
        Stretch("decode", "decode", begun, finish.copy()),
    ]
