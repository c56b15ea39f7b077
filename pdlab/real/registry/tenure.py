"""What the holder of a claim may believe about it, sans-IO.

A lease runs at the store from the moment the store handled its renewal, here from the moment *before* the renewal was sent, and
for a tenth less: so a holder that gives up at its `deadline_s` does so before anybody else can hold the key, however slow the answer was or
long the process was paused, as long as the two clocks' rates differ by less than a tenth (Gray and Cheriton 1989). Leaders do that.

An instance is `patient`: when the store is silent, all instances lose their leases together, and to stop all of them would be worse than
anything that a lease guards against. It goes on, and when the store answers again it takes its place again under the same number. It loses
its place where the store answers that the lease is over though it was not silent, or that another has the place.
"""

from __future__ import annotations

VALID = 0.9  # of the lease


class Tenure:
    """Times are of one monotonic clock, seconds."""

    def __init__(self, lease_s: float, since_s: float, *, patient: bool = False) -> None:
        self.lease_s, self.patient = lease_s, patient
        self.over = False
        self.silent = False  # the store has left a renewal unanswered since the last that it granted
        self.asked_s = since_s
        self.deadline_s = since_s + VALID * lease_s

    def alive(self, now: float) -> bool:
        """Does the holder still hold it?"""
        return not self.over and (self.patient or now < self.deadline_s)

    def confirmed(self, now: float) -> bool:
        """Does nobody else hold it, for certain?"""
        return not self.over and now < self.deadline_s

    def ask(self, now: float) -> bool:
        """A renewal is about to be sent. May a claim that has run out, and that nobody has taken since, be taken again? Only where the
        store's silence explains that it ran out: not where the holder itself has slept for a lease."""
        awake = now - self.asked_s <= self.lease_s
        self.asked_s = now
        return self.patient and self.silent and awake and now >= self.deadline_s

    def granted(self) -> None:
        """The store has answered the renewal last asked for, and renewed it."""
        self.silent = False
        self.deadline_s = self.asked_s + VALID * self.lease_s

    def unanswered(self) -> None:
        self.silent = True

    def refused(self) -> None:
        """The store has answered that it is over; or it was given up."""
        self.over = True
