"""The one with the least outstanding work by the router's own ledger, for both phases, counted in prompt tokens or in requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class LeastLoaded(Policy):
    by: Literal["tokens", "requests"] = "tokens"

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        """Prompts still to compute come first; what decodes there (on a mixed instance) settles ties."""
        return cluster.prefill.least(prompt_tokens if self.by == "tokens" else prompts)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.decode.least(sequence_tokens if self.by == "tokens" else sequences)


def prompt_tokens(x: Instance) -> tuple[int, int]:
    return x.prefill_tokens, x.decode_tokens


def prompts(x: Instance) -> tuple[int, int]:
    return x.prefill_requests, x.decode_requests


def sequence_tokens(x: Instance) -> int:
    return x.decode_tokens


def sequences(x: Instance) -> int:
    return x.decode_requests
