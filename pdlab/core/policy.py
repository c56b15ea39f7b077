"""The policy interface: four questions, each with a plain default answer.

A policy is a dataclass in a file of `pdlab/policies/` (or any file named `path.py:Class`); its fields are its parameters in YAML, with
their bounds in `Annotated[float, Range(...)]`. What it remembers between calls lives in attributes it makes in `__post_init__`. It
decides from the view it is given and `cluster.rng`; it never reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pdlab.core.types import Event, Request, Role, Scale
from pdlab.core.view import Cluster, Instance

HOOKS = ("dispatch", "handoff", "migrate", "resize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Of a policy's number, in its annotation: `tick_s: Annotated[float, Range(gt=0.0, tuned=(0.05, 5.0), log=True)] = 0.5`.

    What lies outside is refused. `tuned` is the range that `pdlab tune` searches, else all of the bounds where both ends are finite, and
    nothing where they are not; `log` searches it by factors."""

    ge: float = -inf
    gt: float = -inf
    le: float = inf
    lt: float = inf
    tuned: tuple[float, float] | None = None
    log: bool = False

    def hold(self, value: float) -> bool:
        """Not for nan."""
        return self.ge <= value <= self.le and (value > self.gt or self.gt == -inf) and (value < self.lt or self.lt == inf)

    @property
    def searched(self) -> tuple[float, float] | None:
        """What is searched, ends included."""
        if self.tuned is not None:
            return self.tuned
        return (self.ge, self.le) if -inf < self.ge and self.le < inf else None

    def __str__(self) -> str:
        """above 0 and at most 1."""
        words = (("{:g} or more", self.ge), ("above {:g}", self.gt), ("at most {:g}", self.le), ("below {:g}", self.lt))
        return " and ".join(word.format(end) for word, end in words if -inf < end < inf)


def prefill_tokens(x: Instance) -> int:
    """Queued prompt tokens by the router's ledger."""
    return x.prefill_tokens


def decode_tokens(x: Instance) -> int:
    return x.decode_tokens


@dataclass(frozen=True, slots=True)
class Reject:
    """A dispatch answer: turn the request away now, with this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Borrow:
    """A dispatch answer: prefill it on `instance`, which first reads from `holder` what that has of its prefix. Ask `cluster.can_fetch`
    before."""

    instance: Instance
    holder: Instance


class Policy:
    """Answers to the router's questions. Override what you decide; the rest stays plain."""

    tick_s: float | None = None  # how often migrate and resize are asked; None is never
    pairs: bool = False  # choose the decode instance at dispatch time; it reserves blocks before prefill starts
    queues: bool = False  # it orders those who wait for a prefill instance, and may give up what runs: `first` and `evict` are asked
    rests: bool = False  # of one with resize or observe: with no request about, ticks and reports alone change nothing it does or remembers

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Borrow | Reject | None:
        """Who prefills it. None keeps it queued; the router asks again when something has changed. The instance with the fewest queued
        prompt tokens by the router's ledger."""
        return cluster.prefill.least(prefill_tokens)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        """Who decodes it, asked when the prompt is computed on an instance of role prefill (or, with `pairs`, at dispatch). None waits;
        the prefill instance itself keeps it. The instance with the fewest decode tokens by the router's ledger."""
        return cluster.decode.least(decode_tokens)

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        """Running requests to move: (request id, target)."""
        return ()

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        """Role switches, and scaling where it is on."""
        return ()

    def first(self, waiting: Sequence[Request], cluster: Cluster) -> Request:
        """With `queues`: of those who wait for a prefill instance, by priority and arrival, the one to be dispatched next. Where that one
        gets no place, nobody does for now."""
        return waiting[0]

    def evict(self, cluster: Cluster) -> Sequence[int]:
        """With `queues`, every `tick_s`, or each second: requests under way that are given up for others. They end as rejected."""
        return ()

    def observe(self, event: Event, cluster: Cluster) -> None:
        """Every event the router has taken in, after its books are kept. Costs a call an event: override only where needed."""
