"""How long the router waits for what, and how much it takes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on waiting, in seconds, and on what is taken in."""

    request_timeout_s: float = 900.0  # arrival to end
    transfer_timeout_s: float = 30.0  # hand-off to arrival of the KV
    max_attempts: int = 3  # losses (of an instance, of a transfer) that one request survives, and one more
    lease_s: float = 3.0  # an instance unheard for that long, and two probes of 1 s, is suspect
    probe_s: float = 2.0
    suspect_s: float = 15.0  # and is fenced when suspect for that long
    grace_s: float = 0.0  # that requests wait for an instance when the last that could serve them has left
    max_in_flight: int | None = None  # requests that have arrived and not ended; more are refused
