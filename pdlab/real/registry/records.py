"""What stands in the store: JSON, checked for size, types and sense, as any peer may have written it."""

from __future__ import annotations

import math
import re
from typing import TypeVar

import msgspec

from pdlab.core.types import UNKNOWN, InstanceSpec, Report, UsageError

MAX_BYTES = 1 << 20  # etcd refuses requests over 1.5 MiB
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
INT64 = 1 << 63
MAY_BE_UNKNOWN = ("waiting_tokens", "context_tokens", "used_blocks", "free_blocks", "waiting_head_blocks", "waiting_blocks")
NUMBERS = ("incarnation", "waiting", "running", "preempted", "decode_steps", "decode_s")  # of a Report, besides those
MOST_STEPS = 8  # in one report
T = TypeVar("T")


class Garbage(ValueError):
    """A value that no sane peer writes."""


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    lease_s: float
    spec: InstanceSpec


class LeaderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`url` is where it answers; empty where others cannot reach it."""

    lease_s: float
    candidate: str
    fencing: int
    url: str = ""


_instance_record, _report = msgspec.json.Decoder(InstanceRecord), msgspec.json.Decoder(Report)


def check_name(name: str, what: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(f"{what} {name!r}: use 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit")


def check_lease(lease_s: float) -> None:
    if not 0.2 <= lease_s <= 3600:
        raise UsageError(f"lease_s {lease_s}: use 0.2 to 3600 seconds")


def encode(record: InstanceRecord | LeaderRecord | Report) -> bytes:
    return msgspec.json.encode(record)


def read_instance(name: str, value: bytes) -> InstanceRecord:
    """Raises Garbage."""
    record = _decode(value, _instance_record)
    spec = record.spec
    counts = (
        spec.kv_blocks,
        spec.block_bytes,
        spec.context_tokens,
        spec.spare_blocks,
        spec.max_seqs,
        spec.max_batch_tokens,
        spec.max_requests,
        *(n for row in spec.prefill_profile for n in row),
        *(n for row in spec.decode_profile for n in row),
    )
    rates = (spec.link_bytes_per_s, spec.host_bytes_per_s)
    if not NAME.fullmatch(name):
        raise Garbage("no instance has such a name")
    if spec.name != name:
        raise Garbage(f"it names itself {spec.name[:128]!r}")
    if not 0.2 <= record.lease_s <= 3600:
        raise Garbage("lease_s is not within 0.2 to 3600")
    if not 0 < spec.incarnation < INT64:
        raise Garbage("incarnation is not above 0")
    if spec.block_tokens < 1 or min(counts) < 0 or not all(0 <= rate < math.inf for rate in rates):
        raise Garbage("a size is negative")
    if not max(*counts, spec.block_tokens) < INT64:
        raise Garbage("a size is out of range")
    if spec.kv_blocks and spec.spare_blocks >= spec.kv_blocks:
        raise Garbage("it keeps all its KV blocks free")
    if spec.url and not spec.url.startswith(("http://", "https://")):
        raise Garbage("its URL is neither http nor https")
    return record


def read_report(name: str, value: bytes) -> Report:
    """Raises Garbage."""
    report = _decode(value, _report)
    if report.instance != name:
        raise Garbage(f"it names itself {report.instance[:128]!r}")
    numbers = [getattr(report, field) for field in NUMBERS]
    numbers += [number for field in MAY_BE_UNKNOWN if (number := getattr(report, field)) != UNKNOWN]
    numbers += [number for step in report.steps for number in msgspec.structs.astuple(step)]
    if len(report.steps) > MOST_STEPS or not 0 <= min(numbers) <= max(numbers) < INT64 or not math.isfinite(report.taken_s):
        raise Garbage("a number is out of range")
    return report


def _decode(value: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    if len(value) > MAX_BYTES:
        raise Garbage(f"{len(value)} bytes, at most {MAX_BYTES} are read")
    try:
        return decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Garbage(str(error)[:200]) from None
