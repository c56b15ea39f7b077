"""Is an instance dead? Sans-IO: asked after something of it broke, told what probes of it bring, and when it last reported.

Dead is who refuses connections, hangs up on new ones, or says itself that its engine has ended. Who is merely slow to answer is not: a
report that is not older than a lease outranks a probe without an answer, since a busy machine is late with both. Where there is no fresh
report either, it is asked again, each time with twice the patience, and held dead after the last.
"""

from __future__ import annotations

from enum import Enum

FIRST_S, PROBES = 1.0, 3


class Verdict(Enum):
    LIVES = "lives"
    DEAD = "dead"
    UNKNOWN = "unknown"  # probe again


class Inquiry:
    """`lease_s`: an instance that has reported within it is there."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.within_s = FIRST_S  # how long the next probe may take
        self.probes = 0

    def probed(self, answer: bool | None, silent_s: float) -> Verdict:
        """`answer`: it is well (True), it is dead by its own account, refuses connections or hangs up (False), or nothing came in time
        (None). `silent_s` ago it reported last."""
        self.probes += 1
        if answer is not None:
            return Verdict.LIVES if answer else Verdict.DEAD
        if silent_s < self.lease_s:
            return Verdict.LIVES
        self.within_s *= 2
        return Verdict.UNKNOWN if self.probes < PROBES else Verdict.DEAD
