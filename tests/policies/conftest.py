"""Small clusters of real Instances: what a policy is given, without a world around it."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from pdlab.core.types import InstanceSpec, Report, Request, Role, Stage
from pdlab.core.view import Cluster, Instance, LiveRequest

PREFILL_PROFILE = tuple((tokens, 1e-4 * tokens) for tokens in (100, 1000, 4000))  # 0.1 ms a token
DECODE_PROFILE = tuple((b, t, 0.01 + 1e-3 * b + 1e-6 * t) for b in (1, 8, 32) for t in (1000, 10_000, 100_000))
ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}


class Small:
    """A cluster made from letters: `Small("PPD")` has prefill instances 0 and 1 and decode instance 2, of 1000 blocks of 16 tokens."""

    def __init__(self, roles: str, *, profiled: bool = True, seed: int = 0, kv_blocks: int = 1000) -> None:
        self.cluster = Cluster(random.Random(seed))
        for i, letter in enumerate(roles):
            spec = InstanceSpec(
                name=f"x{i}",
                role=ROLES[letter],
                kv_blocks=kv_blocks,
                prefill_profile=PREFILL_PROFILE if profiled else (),
                decode_profile=DECODE_PROFILE if profiled else (),
            )
            self.cluster.admit(spec)
        self.cluster.refresh()

    def __getitem__(self, i: int) -> Instance:
        return self.cluster.instances[i]

    def report(self, i: int, **load: float) -> None:
        """Replace instance i's report, taken now."""
        fields = {"free_blocks": self[i].spec.kv_blocks, "taken_s": self.cluster.now, **load}
        self[i].report = msgspec.structs.replace(Report(self[i].name), **fields)

    def hold(self, i: int, hashes: tuple[int, ...]) -> None:
        """Let instance i cache these prefix blocks."""
        self.cluster.index.add(hashes, self[i].bit)

    def queue(self, i: int, *prompts: int) -> None:
        """Prompts dispatched to instance i and not computed."""
        self[i].prefill_requests += len(prompts)
        self[i].prefill_tokens += sum(prompts)

    def prefilling(self, i: int, request_id: int, prompt_tokens: int, **more: float) -> LiveRequest:
        """A request whose prompt waits on instance i, asked for now."""
        live = LiveRequest(Request(request_id, self.cluster.now, prompt_tokens, **more))  # type: ignore[arg-type]
        live.stage, live.prefill, live.attempt, live.prefill_tokens = Stage.PREFILL, self[i], 1, prompt_tokens
        self.cluster.live[request_id] = live
        self.queue(i, prompt_tokens)
        return live

    def decoding(self, i: int, request_id: int, prompt_tokens: int, *, priority: int = 0) -> LiveRequest:
        """A request decoding on instance i."""
        live = LiveRequest(Request(request_id, 0.0, prompt_tokens, priority=priority))
        live.stage, live.decode, live.attempt, live.decode_tokens = Stage.DECODE, self[i], 1, prompt_tokens
        self.cluster.live[request_id] = self[i].decoding[request_id] = live
        self[i].decode_requests += 1
        self[i].decode_tokens += prompt_tokens
        return live


@pytest.fixture(scope="session")
def small() -> type[Small]:
    return Small


@pytest.fixture(scope="session")
def ask() -> Callable[..., Request]:
    """A request of so many prompt tokens."""

    def make(prompt_tokens: int, request_id: int = 0, **more: object) -> Request:
        return Request(request_id, 0.0, prompt_tokens, **more)  # type: ignore[arg-type]

    return make
