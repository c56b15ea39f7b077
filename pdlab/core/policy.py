"""The policy interface: four questions, each with a plain default answer.

A policy is a dataclass in a file of `pdlab/policies/` (or any file named `path.py:Class`); its fields are its parameters in YAML, and
what it remembers between calls lives in attributes it makes in `__post_init__`, where it also checks its fields with `require`. It
decides from the view it is given and `cluster.rng`; it never reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdlab.core.types import Event, Request, Role, Scale, UsageError
from pdlab.core.view import Cluster, Instance

HOOKS = ("dispatch", "handoff", "migrate", "resize")


def require(holds: bool, name: str, value: object, must: str) -> None:
    """Check a policy's parameter: `require(self.tick_s > 0, "tick_s", self.tick_s, "be above 0")`. Raises UsageError."""
    if not holds:
        raise UsageError(f"policy parameter {name} must {must}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Reject:
    """A dispatch answer: turn the request away now, with this reason."""

    reason: str


class Policy:
    """Answers to the router's questions. Override what you decide; the rest stays plain."""

    tick_s: float | None = None  # how often migrate and resize are asked; None is never
    pairs: bool = False  # choose the decode instance at dispatch time; it reserves blocks before prefill starts
    rests: bool = False  # of one with resize or observe: with no request about, ticks and reports alone change nothing it does or remembers

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        """Who prefills it. None keeps it queued; the router asks again when something has changed. The instance with the fewest queued
        prompt tokens by the router's ledger."""
        return min(cluster.prefill, key=lambda x: (x.prefill_tokens, x.index), default=None)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        """Who decodes it, asked when the prompt is computed on an instance of role prefill (or, with `pairs`, at dispatch). None waits;
        the prefill instance itself keeps it. The instance with the fewest decode tokens by the router's ledger."""
        return min(cluster.decode, key=lambda x: (x.decode_tokens, x.index), default=None)

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        """Running requests to move: (request id, target)."""
        return ()

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        """Role switches, and scaling where it is on."""
        return ()

    def observe(self, event: Event, cluster: Cluster) -> None:
        """Every event the router has taken in, after its books are kept. Costs a call an event: override only where needed."""
